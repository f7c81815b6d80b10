"""Fields of good bundles, each changed in one way: what stock cosign and narseal are asked about."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

Tree = dict[str, Any]
#: Changes a bundle in place, or gives its new text.
Change = Callable[[Tree], str | None]

ZEROES = base64.b64encode(bytes(32)).decode()


def entry(tree: Tree) -> Tree:
    found: Tree = tree["verificationMaterial"]["tlogEntries"][0]
    return found


def proof(tree: Tree) -> Tree:
    found: Tree = entry(tree)["inclusionProof"]
    return found


def material(tree: Tree) -> Tree:
    found: Tree = tree["verificationMaterial"]
    return found


def top(tree: Tree) -> Tree:
    return tree


def content(tree: Tree) -> Tree:
    """Where the signature is."""
    found: Tree = tree.get("messageSignature") or tree["dsseEnvelope"]["signatures"][0]
    return found


def put(place: Callable[[Tree], Tree], name: str, value: Any) -> Change:
    """Another value; with a function, made of the old one."""

    def change(tree: Tree) -> None:
        there = place(tree)
        there[name] = value(there.get(name)) if callable(value) else value

    return change


def drop(place: Callable[[Tree], Tree], name: str) -> Change:
    def change(tree: Tree) -> None:
        place(tree).pop(name, None)

    return change


def doubled(name: str) -> Change:
    """The first field of this name stands twice, with the same value."""

    def change(tree: Tree) -> str:
        class Twice(dict[str, Any]):
            def items(self) -> Any:
                for key, value in super().items():
                    yield key, value
                    if key == name:
                        yield key, value

        def rebuilt(value: Any) -> Any:
            if isinstance(value, dict):
                inner = {key: rebuilt(item) for key, item in value.items()}
                return Twice(inner) if name in inner else inner
            return [rebuilt(item) for item in value] if isinstance(value, list) else value

        # the C encoder does not ask `items`
        return "".join(json.JSONEncoder(indent=0).iterencode(rebuilt(tree)))

    return change


def rename(place: Callable[[Tree], Tree], name: str, other: str) -> Change:
    """protobuf's parsers read a field by either of its names."""

    def change(tree: Tree) -> None:
        found = place(tree)
        found[other] = found.pop(name)

    return change


def flipped(text: str) -> str:
    """One bit of base64."""
    data = bytearray(base64.b64decode(text))
    data[len(data) // 2] ^= 1
    return base64.b64encode(data).decode()


def tail_flipped(text: str) -> str:
    data = bytearray(base64.b64decode(text))
    data[-1] ^= 1
    return base64.b64encode(data).decode()


def plus(number: int) -> Callable[[Any], str]:
    return lambda old: str(int(old or 0) + number)


def note(line: int, value: Callable[[str], str]) -> Change:
    """One line of the checkpoint: origin, size, root hash, nothing, signature."""

    def change(tree: Tree) -> None:
        checkpoint = proof(tree)["checkpoint"]
        lines = checkpoint["envelope"].split("\n")
        lines[line] = value(lines[line])
        checkpoint["envelope"] = "\n".join(lines)

    return change


def body(value: Callable[[Tree], None]) -> Change:
    """What the log has, changed inside."""

    def change(tree: Tree) -> None:
        there = entry(tree)
        inner = json.loads(base64.b64decode(there["canonicalizedBody"]))
        value(inner)
        text = json.dumps(inner, separators=(",", ":"), sort_keys=True)
        there["canonicalizedBody"] = base64.b64encode(text.encode()).decode()

    return change


def spec(inner: Tree) -> Tree:
    found: Tree = inner["spec"]["hashedRekordV002"]
    return found


def both_contents(tree: Tree) -> None:
    tree["messageSignature"] = {
        "messageDigest": {"algorithm": "SHA2_256", "digest": ZEROES}, "signature": "AAAA",
    }  # fmt: skip
    tree["dsseEnvelope"] = {
        "payload": "e30=", "payloadType": "application/vnd.in-toto+json",
        "signatures": [{"sig": "AAAA"}],
    }  # fmt: skip


def no_content(tree: Tree) -> None:
    tree.pop("messageSignature", None)
    tree.pop("dsseEnvelope", None)


def as_chain(tree: Tree) -> None:
    certificate = material(tree).pop("certificate")
    material(tree)["x509CertificateChain"] = {"certificates": [certificate]}


def wrapped(text: str) -> str:
    # four, so that the length stays one of base64 with its padding, whatever the signature's own is
    return text[:20] + "\n" * 4 + text[20:]


#: Of every bundle with a log entry.
LOGGED: dict[str, Change] = {
    "logIndex other": put(entry, "logIndex", plus(1)),
    "logIndex far": put(entry, "logIndex", plus(1 << 40)),
    "logIndex negative": put(entry, "logIndex", "-1"),
    "logIndex beyond 64 bits": put(entry, "logIndex", str(1 << 64)),
    "logIndex no number": put(entry, "logIndex", "x"),
    "logIndex absent": drop(entry, "logIndex"),
    "logIndex as a JSON number": put(entry, "logIndex", lambda old: int(old or 0)),
    "logId other": put(entry, "logId", {"keyId": ZEROES}),
    "logId same first bytes": put(entry, "logId", lambda old: {"keyId": tail_flipped(old["keyId"])}),
    "logId short": put(
        entry, "logId",
        lambda old: {"keyId": base64.b64encode(base64.b64decode(old["keyId"])[:4]).decode()},
    ),
    "logId empty": put(entry, "logId", {}),
    "logId absent": drop(entry, "logId"),
    "kind other": put(entry, "kindVersion", {"kind": "dsse", "version": "0.0.2"}),
    "kind unknown": put(entry, "kindVersion", {"kind": "rubbish", "version": "0.0.2"}),
    "version older": put(entry, "kindVersion", {"kind": "hashedrekord", "version": "0.0.1"}),
    "version unknown": put(entry, "kindVersion", {"kind": "hashedrekord", "version": "0.0.9"}),
    "kindVersion absent": drop(entry, "kindVersion"),
    "integratedTime now": put(entry, "integratedTime", "1795000000"),
    "integratedTime long ago": put(entry, "integratedTime", "1"),
    "integratedTime negative": put(entry, "integratedTime", "-1"),
    "integratedTime zero": put(entry, "integratedTime", "0"),
    "inclusionPromise rubbish": put(entry, "inclusionPromise", {"signedEntryTimestamp": "AAAA"}),
    "inclusionPromise empty": put(entry, "inclusionPromise", {"signedEntryTimestamp": ""}),
    "inclusionPromise without a time": put(entry, "inclusionPromise", {}),
    "inclusionProof absent": drop(entry, "inclusionProof"),
    "inclusionProof empty": put(entry, "inclusionProof", {}),
    "proof logIndex other": put(proof, "logIndex", plus(1)),
    "proof logIndex negative": put(proof, "logIndex", "-1"),
    "proof treeSize other": put(proof, "treeSize", plus(1)),
    "proof treeSize nothing": put(proof, "treeSize", "0"),
    "proof treeSize negative": put(proof, "treeSize", "-5"),
    "proof treeSize absent": drop(proof, "treeSize"),
    "proof hashes one more": put(proof, "hashes", lambda old: [*(old or []), ZEROES]),
    "proof hashes one less": put(proof, "hashes", lambda old: (old or [])[:-1]),
    "proof hashes changed": put(proof, "hashes", lambda old: [flipped(h) for h in old or []]),
    "proof rootHash other": put(proof, "rootHash", ZEROES),
    "proof rootHash absent": drop(proof, "rootHash"),
    "checkpoint absent": drop(proof, "checkpoint"),
    "checkpoint empty": put(proof, "checkpoint", {"envelope": ""}),
    "checkpoint origin other": note(0, lambda _: "elsewhere"),
    "checkpoint size other": note(1, lambda old: str(int(old) + 1)),
    "checkpoint root other": note(2, lambda _: ZEROES),
    "checkpoint one line more": note(2, lambda old: f"{old}\nmore"),
    "checkpoint signature other": note(4, lambda old: old[:-8] + "AAAAAA=="),
    "checkpoint signature of another name": note(4, lambda old: old.replace("localhost", "other")),
    "checkpoint signature absent": note(4, lambda _: ""),
    "checkpoint cosigned by a stranger": note(
        4, lambda old: f"{old}\n— stranger {base64.b64encode(bytes(68)).decode()}"
    ),
    "checkpoint text before the dash": note(4, lambda old: f"x{old}"),
    "checkpoint junk before the signature": note(4, lambda old: f"junk\n{old}"),
    "checkpoint junk behind the signature": note(4, lambda old: f"{old}\njunk"),
    "checkpoint signature with a mark in it": note(4, lambda old: f"{old[:-8]}!{old[-8:]}"),
    "checkpoint signature padded": note(4, lambda old: f"{old}===="),
    "checkpoint cosigned by 200 strangers": note(
        4,
        lambda old: "\n".join(
            [old, *(f"— s{n} {base64.b64encode(bytes(68)).decode()}" for n in range(200))]
        ),
    ),
    "checkpoint cosigned by a name with a plus": note(
        4, lambda old: f"{old}\n— a+b {base64.b64encode(bytes(68)).decode()}"
    ),
    "checkpoint cosigned by a name with a space": note(
        4, lambda old: f"{old}\n— a b {base64.b64encode(bytes(68)).decode()}"
    ),
    **{
        f"{what} as {form!a}": put(where, what, lambda old, form=form: form.format(old or 0))
        for where, what in ((entry, "logIndex"), (proof, "treeSize"), (proof, "logIndex"))
        for form in ("+{}", "0{}", " {}", "{} ", "0_{}")
    },
    "logIndex in other digits": put(
        entry, "logIndex", lambda old: "".join(chr(0x660 + int(digit)) for digit in old or "0")
    ),
    "body under its other name": rename(entry, "canonicalizedBody", "canonicalized_body"),
    "logIndex under its other name": rename(entry, "logIndex", "log_index"),
    "logId under its other name": rename(entry, "logId", "log_id"),
    "integratedTime under its other name, loosely": put(entry, "integrated_time", " +0 "),
    "proof rootHash under its other name": rename(proof, "rootHash", "root_hash"),
    "body padded": put(entry, "canonicalizedBody", lambda old: f"{old}===="),
    "body with a mark in it": put(entry, "canonicalizedBody", lambda old: f"{old[:8]}!!!!{old[8:]}"),
    "body over two lines": put(entry, "canonicalizedBody", lambda old: f"{old[:8]}\n\n\n\n{old[8:]}"),
    "logId padded": put(entry, "logId", lambda old: {"keyId": f"{old['keyId']}===="}),
    "proof rootHash padded": put(proof, "rootHash", lambda old: f"{old}===="),
    "proof rootHash over two lines": put(proof, "rootHash", lambda old: f"{old[:8]}\n{old[8:]}"),
    "body digest other": body(lambda inner: spec(inner)["data"].update(digest=ZEROES)),
    "body algorithm other": body(lambda inner: spec(inner)["data"].update(algorithm="SHA2_512")),
    "body signature other": body(lambda inner: spec(inner)["signature"].update(content="AAAA")),
    "body one field more": body(lambda inner: inner.update(more=1)),
    "body no JSON": put(entry, "canonicalizedBody", "AAAA"),
    "body empty": put(entry, "canonicalizedBody", ""),
    "body absent": drop(entry, "canonicalizedBody"),
    "two entries": put(material, "tlogEntries", lambda old: old * 2),
    "no entry": put(material, "tlogEntries", []),
    "entries absent": drop(material, "tlogEntries"),
}  # fmt: skip

#: Of every bundle.
ANY: dict[str, Change] = {
    "mediaType absent": drop(top, "mediaType"),
    "mediaType other": put(top, "mediaType", "application/json"),
    "mediaType unknown version": put(top, "mediaType", "application/vnd.dev.sigstore.bundle.v0.9+json"),
    "mediaType of version 0.1": put(top, "mediaType", "application/vnd.dev.sigstore.bundle+json;version=0.1"),
    "mediaType of version 0.2": put(top, "mediaType", "application/vnd.dev.sigstore.bundle+json;version=0.2"),
    "mediaType in the older form of 0.3": put(top, "mediaType", "application/vnd.dev.sigstore.bundle+json;version=0.3"),
    "mediaType doubled": doubled("mediaType"),
    "verificationMaterial doubled": doubled("verificationMaterial"),
    "field that no bundle has": put(top, "more", 1),
    "field that no material has": put(material, "more", {"a": []}),
    "both contents": both_contents,
    "no content": no_content,
    "material absent": drop(top, "verificationMaterial"),
    "bytes behind the end": lambda tree: json.dumps(tree) + "{}",
    "byte order mark": lambda tree: "\ufeff" + json.dumps(tree),
    "spaces around": lambda tree: f" \n{json.dumps(tree)}\n ",
    "not a number": lambda tree: json.dumps(tree | {"more": float("nan")}),
    "timestamps of rubbish": put(
        material, "timestampVerificationData", {"rfc3161Timestamps": [{"signedTimestamp": "AAAA"}]}
    ),
    "key beside the material": put(material, "publicKey", {"hint": "x"}),
    "chain beside the material": put(material, "x509CertificateChain", {"certificates": []}),
}  # fmt: skip

#: Of bundles with a timestamp.
STAMPED: dict[str, Change] = {
    "timestamp doubled": put(
        material, "timestampVerificationData",
        lambda old: {"rfc3161Timestamps": old["rfc3161Timestamps"] * 2},
    ),
    "timestamp one bit": put(
        material, "timestampVerificationData",
        lambda old: {
            "rfc3161Timestamps": [
                {"signedTimestamp": flipped(old["rfc3161Timestamps"][0]["signedTimestamp"])}
            ]
        },
    ),
    "timestamp signature one bit": put(
        material, "timestampVerificationData",
        lambda old: {
            "rfc3161Timestamps": [
                {"signedTimestamp": tail_flipped(old["rfc3161Timestamps"][0]["signedTimestamp"])}
            ]
        },
    ),
    "timestamps empty": put(material, "timestampVerificationData", {"rfc3161Timestamps": []}),
}  # fmt: skip

#: Of keyless bundles.
CERTIFIED: dict[str, Change] = {
    "certificate one bit": put(material, "certificate", lambda old: {"rawBytes": flipped(old["rawBytes"])}),
    "certificate signature one bit": put(
        material, "certificate", lambda old: {"rawBytes": tail_flipped(old["rawBytes"])}
    ),
    "certificate empty": put(material, "certificate", {"rawBytes": ""}),
    "certificate absent": drop(material, "certificate"),
    "certificate as a chain": as_chain,
    "certificate doubled": doubled("certificate"),
}  # fmt: skip

#: Of signatures over the file itself.
MESSAGE: dict[str, Change] = {
    "digest other": lambda tree: tree["messageSignature"]["messageDigest"].update(digest=ZEROES),
    "digest short": lambda tree: tree["messageSignature"]["messageDigest"].update(digest="AAAA"),
    "digest absent": lambda tree: tree["messageSignature"].pop("messageDigest") and None,
    "digest algorithm other": lambda tree: tree["messageSignature"]["messageDigest"].update(algorithm="SHA2_512"),
    "digest algorithm unknown": lambda tree: tree["messageSignature"]["messageDigest"].update(algorithm="MD5"),
    "signature one bit": put(content, "signature", flipped),
    "signature empty": put(content, "signature", ""),
    "signature not base64": put(content, "signature", "?!"),
    "signature over two lines": put(content, "signature", wrapped),
    "signature in the URL's alphabet": put(
        content, "signature", lambda old: "-" + old[1:]
    ),
    "signature with bytes behind it": put(
        content, "signature", lambda old: base64.b64encode(base64.b64decode(old) + b"\0").decode()
    ),
    "signature doubled": doubled("signature"),
}  # fmt: skip

#: Of signed statements.
ENVELOPE: dict[str, Change] = {
    "keyid": put(content, "keyid", "x"),
    "keyid empty": put(content, "keyid", ""),
    "sig one bit": put(content, "sig", flipped),
    "sig empty": put(content, "sig", ""),
    "sig doubled": doubled("sig"),
    "no signatures": lambda tree: tree["dsseEnvelope"].update(signatures=[]),
    "two signatures": lambda tree: tree["dsseEnvelope"].update(signatures=tree["dsseEnvelope"]["signatures"] * 2),
    "payloadType other": lambda tree: tree["dsseEnvelope"].update(payloadType="text/plain"),
    "payloadType absent": lambda tree: tree["dsseEnvelope"].pop("payloadType") and None,
    "payload one bit": lambda tree: tree["dsseEnvelope"].update(payload=flipped(tree["dsseEnvelope"]["payload"])),
    "payload empty": lambda tree: tree["dsseEnvelope"].update(payload=""),
    "payload doubled": doubled("payload"),
}  # fmt: skip


#: What neither program minds: it says nothing, or nothing that is signed or asked for.
HARMLESS: dict[str, tuple[str, ...]] = {
    "mediaType in the older form of 0.3": ("keyless", "log", "key"),
    "mediaType of version 0.2": ("log", "key"),
    "mediaType of version 0.1": ("key",),  # without a log entry, nothing is promised
    "spaces around": ("keyless", "log", "key"),
    "integratedTime zero": ("keyless", "log"),
    "inclusionPromise empty": ("keyless", "log"),
    "checkpoint cosigned by a stranger": ("keyless", "log"),
    "key beside the material": ("log", "key"),  # only another hint, which nobody reads
    "keyid empty": ("keyless", "log", "key"),
    "timestamp doubled": ("log",),
    "timestamps empty": ("log",),
    "timestamps of rubbish": ("key",),  # without a trusted root nobody can say who stamped
}
_NOT_READ = "cosign takes it from the checkpoint, or makes it anew, and does not read it"
_BOTH_NAMES = "protobuf's parsers read both names of a field; no signer writes the other one"
_NOT_ASKED = "with a key, cosign does not look at times"
#: What cosign takes and narseal does not, and why cosign may.
STRICTER: dict[str, tuple[tuple[str, ...], str]] = {
    "signature over two lines": (
        ("keyless", "log", "key"),
        "Go's base64 passes over the ends of lines",
    ),
    "mediaType of version 0.2": (("keyless",), "older bundles have a chain of certificates"),
    "logIndex as a JSON number": (("keyless", "log"), "protobuf's parsers read either form"),
    "kind other": (("keyless", "log"), _NOT_READ),
    "kind unknown": (("keyless", "log"), _NOT_READ),
    "version older": (("keyless", "log"), _NOT_READ),
    "version unknown": (("keyless", "log"), _NOT_READ),
    "inclusionPromise without a time": (("keyless", "log"), "an empty one is none"),
    "proof logIndex other": (("keyless", "log"), _NOT_READ),
    "proof logIndex negative": (("keyless", "log"), _NOT_READ),
    "proof treeSize other": (("keyless", "log"), _NOT_READ),
    "proof treeSize nothing": (("keyless", "log"), _NOT_READ),
    "proof treeSize negative": (("keyless", "log"), _NOT_READ),
    "proof treeSize absent": (("keyless", "log"), _NOT_READ),
    "proof rootHash other": (("keyless", "log"), _NOT_READ),
    "proof rootHash absent": (("keyless", "log"), _NOT_READ),
    "body digest other": (("keyless", "log"), _NOT_READ),
    "body algorithm other": (("keyless", "log"), _NOT_READ),
    "body signature other": (("keyless", "log"), _NOT_READ),
    "body over two lines": (("keyless", "log"), "Go's base64 passes over the ends of lines"),
    "body under its other name": (("keyless", "log"), _BOTH_NAMES),
    "logIndex under its other name": (("keyless", "log"), _BOTH_NAMES),
    "logId under its other name": (("keyless", "log"), _BOTH_NAMES),
    "proof rootHash under its other name": (("keyless", "log"), _BOTH_NAMES),
    "timestamp doubled": (("keyless",), "twice the same is still one"),
    "timestamps of rubbish": (("log",), _NOT_ASKED),
    "timestamp one bit": (("log",), _NOT_ASKED),
    "timestamp signature one bit": (("log",), _NOT_ASKED),
    "integratedTime now": (("log",), _NOT_ASKED),
    "integratedTime long ago": (("log",), _NOT_ASKED),
    "integratedTime negative": (("log",), _NOT_ASKED),
}

#: Each table with each kind of bundle that it is of use with.
TABLES: dict[str, tuple[dict[str, Change], ...]] = {
    "keyless-blob": (ANY, MESSAGE, LOGGED, STAMPED, CERTIFIED),
    "keyless-batch": (ENVELOPE,),
    "log-blob": (LOGGED, STAMPED),
    "log-batch": (ENVELOPE,),
    "key-blob": (ANY, MESSAGE),
    "key-batch": (ENVELOPE,),
}
