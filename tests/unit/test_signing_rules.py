"""What the signer demands by itself, rule by rule: its narinfos and realisations come from a liar."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from narseal.config.signer import SignerConfig
from narseal.custody import write_private
from narseal.custody.requests import PathRequest, RealisationRequest
from narseal.errors import ConfigError, NarsealError, Refused
from narseal.nix.content_address import ContentAddress, Method
from narseal.nix.hashes import Hash
from narseal.nix.realisation import parse_at
from narseal.nix.store_path import StorePath
from narseal.signer.rules import Approved, Peer, SigningRules, ToHash
from tests.tools.cache import Entry, addressed, entry, key, store_path
from tests.tools.narseal import OPERATOR, UPSTREAM

STORE = "/nix/store"
PEER = Peer(uid=1000, pid=1)
STRANGER = key("stranger-1")


@contextmanager
def rules(folder: Path, **more: Any) -> Iterator[SigningRules]:
    write_private(folder / "operator.secret", OPERATOR.render())
    write_private(folder / "audit.secret", key("audit-1").render())
    tree: dict[str, Any] = {
        "trusted_keys": [str(UPSTREAM.public)],
        "key": [{"url": f"file:{folder}/operator.secret"}],
        "audit": {"log": f"{folder}/audit.log", "key": f"file:{folder}/audit.secret"},
        "storage": f"file://{folder}",
    }
    found = SigningRules(SignerConfig(**tree | more))
    try:
        yield found
    finally:
        found.close()


def decide(found: SigningRules, item: Entry, *, stored: Path | None = None) -> Approved:
    """What a proxy gets that asks for a path, with its file where it has stored one."""
    file = None
    if stored:
        file = item.info.url.removeprefix("nar/")
        (stored / "nar").mkdir(exist_ok=True)
        (stored / "nar" / file).write_bytes(item.file)
    request = PathRequest(item.info, file)
    considered = found.consider({"id": 1, "key": OPERATOR.name, **request.render()}, PEER)
    return found.hash(considered) if isinstance(considered, ToHash) else considered


def at(ca: ContentAddress, item: Entry) -> Entry:
    """The same NAR at the path that a CA gives it."""
    path = ca.store_path("forged", (), self_hash="", store_dir=STORE)
    assert path
    return item.but(store_path=path, ca=ca)


def test_the_audit_key_signs_nothing_else(tmp_path: Path) -> None:
    audit = {"log": f"{tmp_path}/audit.log", "key": f"file:{tmp_path}/operator.secret"}
    with pytest.raises(ConfigError, match=r"audit\.key is one of the substituter keys"):
        with rules(tmp_path, audit=audit):
            pass


def test_a_path_is_signed_on_a_trusted_signature(tmp_path: Path) -> None:
    item = entry("app", b"1")
    with rules(tmp_path) as found:
        agreed = decide(found, item.signed(UPSTREAM))
        assert agreed.record["evidence"] == "signature upstream-1"
        assert agreed.message == item.info.fingerprint()
        own = decide(found, item.signed(OPERATOR))
        assert own.record["evidence"] == "signature operator-1"
        for wrong in (item, item.signed(STRANGER)):
            with pytest.raises(Refused, match="no signature by a trusted key"):
                decide(found, wrong)


@pytest.mark.parametrize("named", [False, True])
def test_a_git_address_is_no_evidence(tmp_path: Path, *, named: bool) -> None:
    """Its hash is not recomputed: anybody's bytes could be put under anybody's git tree."""
    ca = ContentAddress(Method.GIT, Hash("sha1", bytes(20)))
    item = at(ca, entry("forged", b"not that tree", compression="none"))
    with rules(tmp_path, content=["forged"] if named else []) as found:
        if named:  # the operator takes these paths on their content
            assert decide(found, item, stored=tmp_path).record["evidence"] == "content"
        else:
            with pytest.raises(Refused, match="no signature by a trusted key"):
                decide(found, item, stored=tmp_path)


@pytest.mark.parametrize(
    ("method", "hashed"),
    [(Method.TEXT, b"other"), (Method.FLAT, b"other"), (Method.NAR, b"other")],
)
def test_foreign_bytes_under_an_address_are_not_signed(
    tmp_path: Path, method: Method, hashed: bytes
) -> None:
    algorithms = ["sha256"] if method is Method.TEXT else ["sha256", "sha512", "sha1", "md5"]
    with rules(tmp_path) as found:
        for algorithm in algorithms:
            size = {"md5": 16, "sha1": 20, "sha256": 32, "sha512": 64}[algorithm]
            ca = ContentAddress(method, Hash(algorithm, (hashed * 20)[:size]))
            with pytest.raises(Refused):
                decide(
                    found, at(ca, entry("forged", b"bytes", compression="none")), stored=tmp_path
                )


def test_an_address_is_measured(tmp_path: Path) -> None:
    item = addressed("source", b"contents")
    with rules(tmp_path) as found:
        agreed = decide(found, item, stored=tmp_path)
        assert agreed.record["evidence"] == "content-address"
        for wrong in (
            item.but(nar_size=item.info.nar_size + 1),
            item.but(nar_size=item.info.nar_size - 1),
            item.but(nar_hash=Hash.sha256(b"x")),
            item.but(store_path=store_path("source")),
            item.but(store_path=replace(item.info.store_path, name="source2")),
            item.but(references=(store_path("more"),)),
        ):
            with pytest.raises(NarsealError):
                decide(found, wrong, stored=tmp_path)


def test_content_is_for_names_of_the_scope_whole_and_references_are_looked_for(
    tmp_path: Path,
) -> None:
    there = store_path("there")
    text = there.full(STORE).encode()
    good = entry("mine-1", text, references=(there,))
    with rules(tmp_path, content=["mine-?"]) as found:
        assert decide(found, good, stored=tmp_path).record["evidence"] == "content"
        for name in ("mine-10", "my-mine-1", "mine-", "other"):
            with pytest.raises(Refused, match="not among those"):
                decide(found, entry(name, text), stored=tmp_path)
        for wrong in (
            good.but(references=(there, store_path("absent"))),
            good.but(references=(store_path("absent"),)),
            good.but(nar_size=good.info.nar_size + 8),
        ):
            with pytest.raises(NarsealError):
                decide(found, wrong, stored=tmp_path)
        with pytest.raises(Refused, match="no file to hash"):
            decide(found, good)


def test_a_nar_beyond_any_is_refused_though_signed(tmp_path: Path) -> None:
    with rules(tmp_path) as found:
        decide(found, entry("app").but(nar_size=1 << 40).signed(UPSTREAM))
        with pytest.raises(Refused, match="a NAR of"):
            decide(found, entry("app").but(nar_size=(1 << 40) + 1).signed(UPSTREAM))


OLD = f"realisations/sha256:{'a' * 64}!out.doi"
OUT = store_path("mine-1")


def trace(derivation: str) -> str:
    return f"build-trace-v2/{store_path(derivation)}/out.doi"


def realise(
    found: SigningRules, name: str, out: StorePath, *, by: Any = None, over: StorePath | None = None
) -> Approved | ToHash:
    """Ask for a realisation; signed by `by`, over the output `over` if that is another."""

    def made(path: StorePath) -> Any:
        body: dict[str, Any] = {"outPath": str(path), "signatures": []}
        if name.startswith("realisations/"):
            body["id"] = name.removeprefix("realisations/").removesuffix(".doi")
        return parse_at(name, json.dumps(body).encode())

    value = made(out)
    if by is not None:
        value = value.with_signatures((by.sign(made(over or out).fingerprint()),))
    request = RealisationRequest(name, value)
    return found.consider({"id": 1, "key": OPERATOR.name, **request.render()}, PEER)


@pytest.mark.parametrize("name", [OLD, trace("openssl.drv")])
def test_a_realisation_needs_a_signature_over_itself(tmp_path: Path, name: str) -> None:
    with rules(tmp_path, content=["mine-*"]) as found:
        agreed = realise(found, name, OUT, by=UPSTREAM)
        assert isinstance(agreed, Approved)
        assert agreed.record["evidence"] == "signature upstream-1"
        for by, over in ((STRANGER, None), (UPSTREAM, store_path("mine-2")), (None, None)):
            with pytest.raises(Refused, match="not among the"):
                realise(found, name, OUT, by=by, over=over)


def test_a_realisation_by_name_needs_both_names_in_the_scope(tmp_path: Path) -> None:
    with rules(tmp_path, content=["mine-*"]) as found:
        agreed = realise(found, trace("mine-1.drv"), OUT)
        assert isinstance(agreed, Approved) and agreed.record["evidence"] == "name"
        for name, out in (
            (trace("openssl.drv"), OUT),
            (trace("mine-1.drv"), store_path("openssl")),
            (trace("openssl.drv"), store_path("openssl")),
            (OLD, OUT),  # its derivation has no name
        ):
            with pytest.raises(Refused, match="not among the"):
                realise(found, name, out)
    (tmp_path / "all").mkdir()
    with rules(tmp_path / "all", content=["*"]) as found:
        assert isinstance(realise(found, OLD, OUT), Approved)


def test_own_statements_are_signed_up_to_their_bound(tmp_path: Path) -> None:
    """Three quarters of it in base-64 are as long as the bound itself."""
    import base64

    from narseal.cosign import statement
    from narseal.cosign.keys import CosignKey
    from narseal.cosign.statement import MAX_BYTES, AttestedPath

    references = tuple(store_path(f"{'r' * 200}{n}") for n in range(18_500))
    items = [entry(f"app-{n}", references=references) for n in range(3)]
    data = statement.render(
        [AttestedPath(i.info, i.info.url.removeprefix("nar/"), i.info.nar_hash) for i in items]
    )
    assert MAX_BYTES * 3 // 4 < len(data) < MAX_BYTES
    write_private(tmp_path / "cosign.key", CosignKey.generate().render(b""))
    keys = [{"url": f"file:{tmp_path}/cosign.key", "name": "release"}]
    with rules(tmp_path, cosign_key=keys) as found:
        tree = {"id": 1, "kind": "statement", "key": "release"}
        good = tree | {"statement": base64.b64encode(data).decode()}
        assert isinstance(found.consider(good, PEER), Approved)
        with pytest.raises(NarsealError, match="more than"):
            found.consider(tree | {"statement": "A" * (MAX_BYTES * 4 // 3 + 5)}, PEER)


def test_a_request_has_its_fields_and_no_others(tmp_path: Path) -> None:
    tree = {"id": 1, "key": OPERATOR.name}
    tree |= PathRequest(entry("app").signed(UPSTREAM).info, None).render()
    with rules(tmp_path) as found:
        assert isinstance(found.consider(tree, PEER), Approved)
        for wrong in (tree | {"message": "x"}, tree | {"key": "operator"}, tree | {"kind": "pat"}):
            with pytest.raises(NarsealError):
                found.consider(wrong, PEER)
        without = {name: value for name, value in tree.items() if name != "file"}
        with pytest.raises(NarsealError):
            found.consider(without, PEER)


def test_without_a_cosign_key_nothing_else_is_signed(tmp_path: Path) -> None:
    with rules(tmp_path) as found:
        for tree in (
            {"id": 1, "kind": "digest", "key": OPERATOR.name, "digest": "0" * 64},
            {"id": 1, "kind": "statement", "key": OPERATOR.name, "statement": ""},
        ):
            with pytest.raises(Refused, match="no cosign key"):
                found.consider(tree, PEER)


def test_the_cosign_key_signs_own_statements_and_digests_if_it_may(tmp_path: Path) -> None:
    import base64

    from narseal.cosign import statement
    from narseal.cosign.keys import CosignKey
    from narseal.cosign.statement import AttestedPath, AuditHead

    item = entry("app")
    assert item.info.file_hash
    path = AttestedPath(item.info, item.info.url.removeprefix("nar/"), item.info.file_hash)

    def anchoring(*heads: AuditHead) -> dict[str, Any]:
        text = base64.b64encode(statement.render([path], heads)).decode()
        return {"id": 1, "kind": "statement", "key": "release", "statement": text}

    digest = {"id": 1, "kind": "digest", "key": "release", "digest": "0" * 64}
    for name, statements, blobs in (("a", True, False), ("b", False, True)):
        folder = tmp_path / name
        folder.mkdir()
        write_private(folder / "cosign.key", CosignKey.generate().render(b""))
        key_of = [{"url": f"file:{folder}/cosign.key", "name": "release"}]
        with rules(folder, cosign_key=key_of, statements=statements, blobs=blobs) as found:
            for tree, allowed in ((anchoring(), statements), (digest, blobs)):
                if allowed:
                    assert isinstance(found.consider(tree, PEER), Approved)
                else:
                    with pytest.raises(Refused, match="not signed here"):
                        found.consider(tree, PEER)
            with pytest.raises(NarsealError, match="no others"):
                found.consider((anchoring() if statements else digest) | {"more": "x"}, PEER)
            if not statements:
                continue
            with pytest.raises(NarsealError, match="never had"):
                found.consider(anchoring(AuditHead(7, bytes(32))), PEER)
            agreed = decide(found, item.signed(UPSTREAM))
            found.sign([agreed])
            head = found.audit.head()
            assert head
            assert isinstance(found.consider(anchoring(head), PEER), Approved)
            with pytest.raises(NarsealError, match="never had"):
                found.consider(anchoring(head, AuditHead(head.lines, bytes(32))), PEER)


def test_nothing_is_signed_on_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    """Nor is it refused: what the disk says now is no word about the path."""
    (tmp_path / "nar").touch()  # ENOTDIR
    with rules(tmp_path, content=["*"]) as found:
        item = entry("mine", b"1", compression="zstd")
        request = PathRequest(item.info, item.info.url.removeprefix("nar/"))
        considered = found.consider({"id": 1, "key": OPERATOR.name, **request.render()}, PEER)
        assert isinstance(considered, ToHash)
        with pytest.raises(NotADirectoryError):
            found.hash(considered)
