"""What a key is asked to sign: typed values that carry their evidence, never bare bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from narseal.errors import Malformed
from narseal.nix import realisation
from narseal.nix.narinfo import NarInfo
from narseal.nix.realisation import BuildTraceEntry, Realisation


@dataclass(frozen=True, slots=True)
class PathRequest:
    """A store path that was verified; its narinfo's signatures and CA are the evidence."""

    info: NarInfo
    #: Its file below nar/, of the narinfo's compression, if that is in storage: evidence, too.
    file: str | None

    @property
    def message(self) -> bytes:
        """What the signature is over: the fingerprint."""
        return self.info.fingerprint()

    def render(self) -> dict[str, Any]:
        """As it goes to a signer, which wants what it signs and its evidence, and nothing else."""
        text = self.info.render(whole=False).decode("ascii")
        return {"kind": "path", "narinfo": text, "file": self.file}


@dataclass(frozen=True, slots=True)
class RealisationRequest:
    """A realisation of either spelling, by its address."""

    name: str
    entry: Realisation | BuildTraceEntry

    @property
    def message(self) -> bytes:
        """What the signature is over."""
        return self.entry.fingerprint()

    def render(self) -> dict[str, Any]:
        """As it goes to a signer."""
        body = self.entry.render().decode()
        return {"kind": "realisation", "name": self.name, "body": body}


Request = PathRequest | RealisationRequest


def parse(tree: dict[str, Any], *, store_dir: str) -> Request:
    """A request as a signer takes it; Malformed if it is none, or says anything else besides."""
    kind = tree.get("kind")
    if kind == "path":
        _only(tree, "narinfo", "file")
        text, file = tree["narinfo"], tree["file"]
        if not isinstance(text, str) or not isinstance(file, str | None):
            raise Malformed("narinfo and file are texts")
        return PathRequest(NarInfo.parse(_ascii(text), store_dir=store_dir), file)
    if kind == "realisation":
        _only(tree, "name", "body")
        name, body = tree["name"], tree["body"]
        if not isinstance(name, str) or not isinstance(body, str):
            raise Malformed("name and body are texts")
        if len(body) > realisation.MAX_BYTES:
            raise Malformed(f"a realisation of more than {realisation.MAX_BYTES} bytes")
        return RealisationRequest(name, realisation.parse_at(name, body.encode()))
    raise Malformed(f"nothing of this kind is signed: {str(kind)[:60]!r}")


def _only(tree: dict[str, Any], *names: str) -> None:
    if set(tree) - {"kind", "key", "id"} != set(names):
        raise Malformed(f"a request of this kind has the fields {', '.join(names)}, and no others")


def _ascii(text: str) -> bytes:
    try:
        return text.encode("ascii")
    except UnicodeEncodeError as error:
        raise Malformed("a narinfo is ASCII") from error
