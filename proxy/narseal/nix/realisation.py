"""Realisations: which store path an output of a content-addressed derivation became.

Two spellings. Nix up to 2.34: `realisations/sha256:<hex>!<output>.doi`; from 2.35:
`build-trace-v2/<drv>/<output>.doi`, whose key is in the address. Each has its own signing text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from narseal.errors import MalformedKey, MalformedRealisation, MalformedStorePath
from narseal.nix.keys import Signature
from narseal.nix.store_path import StorePath

MAX_BYTES = 1 << 18
_MAX_SIGNATURES = 32
_MAX_DEPENDENTS = 10_000
_OUTPUT = r"[0-9a-zA-Z+\-._?=]{1,211}"
_ID = re.compile(rf"sha256:[0-9a-f]{{64}}!{_OUTPUT}", re.ASCII)
_OUTPUT_NAME = re.compile(_OUTPUT, re.ASCII)


_OLD = re.compile(r"realisations/(sha256:[0-9a-f]{64}![^/]{1,211})\.doi", re.ASCII)
_NEW = re.compile(r"build-trace-v2/([^/]{1,250})/([^/]{1,211})\.doi", re.ASCII)


@dataclass(frozen=True, slots=True)
class Realisation:
    """Nix up to 2.34: keyed by the derivation's hash modulo."""

    id: str
    out_path: StorePath
    dependents: Mapping[str, StorePath] = field(default_factory=dict)
    signatures: tuple[Signature, ...] = ()

    @classmethod
    def parse(cls, data: bytes, *, id: str) -> Realisation:  # noqa: A002 - Nix's own word
        """The value of a `.doi` file asked for as `id`; MalformedRealisation else."""
        tree = _object(
            data, required={"id", "outPath"}, optional={"signatures", "dependentRealisations"}
        )
        if not _ID.fullmatch(id) or tree["id"] != id:
            raise MalformedRealisation(f"realisation of another output: {str(tree['id'])[:120]!r}")
        dependents = tree.get("dependentRealisations", {})
        if not isinstance(dependents, dict) or len(dependents) > _MAX_DEPENDENTS:
            raise MalformedRealisation(
                "realisation: dependentRealisations is no object, or too long"
            )
        if not all(_ID.fullmatch(key) for key in dependents):
            raise MalformedRealisation("realisation: a dependent realisation's id is malformed")
        signatures = _list(tree.get("signatures", []))
        return cls(
            id,
            _path(tree["outPath"]),
            {key: _path(value) for key, value in sorted(dependents.items())},
            _signatures(text for text in signatures),
        )

    def fingerprint(self) -> bytes:
        """The text under its signatures: the JSON without them, keys sorted, no white space."""
        return _dump(self._tree())

    def render(self) -> bytes:
        """The file's text."""
        return _dump(self._tree() | {"signatures": sorted(map(str, self.signatures))})

    def with_signatures(self, signatures: tuple[Signature, ...]) -> Realisation:
        """The same realisation with these signatures instead."""
        return replace(self, signatures=signatures)

    def _tree(self) -> dict[str, object]:
        dependents = {key: str(path) for key, path in self.dependents.items()}
        return {
            "dependentRealisations": dependents,
            "id": self.id,
            "outPath": str(self.out_path),
        }


@dataclass(frozen=True, slots=True)
class BuildTraceEntry:
    """Nix from 2.35: keyed by the derivation's path and the output's name."""

    drv_path: StorePath
    output_name: str
    out_path: StorePath
    signatures: tuple[Signature, ...] = ()

    @classmethod
    def parse(cls, data: bytes, *, drv_path: StorePath, output_name: str) -> BuildTraceEntry:
        """The value of a `.doi` file at `build-trace-v2/<drv_path>/<output_name>.doi`."""
        if not _OUTPUT_NAME.fullmatch(output_name) or not drv_path.name.endswith(".drv"):
            raise MalformedRealisation("build trace: not a derivation and an output's name")
        tree = _object(data, required={"outPath"}, optional={"signatures"})
        return cls(
            drv_path,
            output_name,
            _path(tree["outPath"]),
            _signatures(_named(item) for item in _list(tree.get("signatures", []))),
        )

    def fingerprint(self) -> bytes:
        """The text under its signatures: key and value, keys sorted, no white space."""
        key = {"drvPath": str(self.drv_path), "outputName": self.output_name}
        return _dump({"key": key, "value": {"outPath": str(self.out_path)}})

    def render(self) -> bytes:
        """The file's text."""
        signatures = [
            {"keyName": key_name, "sig": text}
            for key_name, _, text in (str(s).partition(":") for s in sorted(self.signatures))
        ]
        return _dump({"outPath": str(self.out_path), "signatures": signatures})

    def with_signatures(self, signatures: tuple[Signature, ...]) -> BuildTraceEntry:
        """The same entry with these signatures instead."""
        return replace(self, signatures=signatures)


Entry = Realisation | BuildTraceEntry


def parse_at(name: str, data: bytes) -> Entry:
    """The file at an address below the store URL, of either spelling; Malformed if it is none."""
    if match := _OLD.fullmatch(name):
        return Realisation.parse(data, id=match[1])
    if match := _NEW.fullmatch(name):
        drv_path = StorePath.parse(match[1])
        return BuildTraceEntry.parse(data, drv_path=drv_path, output_name=match[2])
    raise MalformedRealisation(f"no address of a realisation: {name[:200]!r}")


def _dump(tree: object) -> bytes:
    return json.dumps(tree, sort_keys=True, separators=(",", ":")).encode("ascii")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise MalformedRealisation("realisation: a key stands there twice")
    return tree


def _object(data: bytes, *, required: set[str], optional: set[str]) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise MalformedRealisation(
            f"realisation of {len(data)} bytes, over the bound of {MAX_BYTES}"
        )
    try:
        tree = json.loads(data.decode("ascii"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise MalformedRealisation(f"realisation: not JSON: {error}") from error
    if not isinstance(tree, dict) or not required <= tree.keys() <= required | optional:
        raise MalformedRealisation("realisation: not an object with the fields of one")
    return tree


def _list(value: object) -> list[object]:
    if not isinstance(value, list) or len(value) > _MAX_SIGNATURES:
        raise MalformedRealisation(
            f"realisation: signatures is no list of at most {_MAX_SIGNATURES}"
        )
    return value


def _path(value: object) -> StorePath:
    try:
        return StorePath.parse(str(value))
    except MalformedStorePath as error:
        raise MalformedRealisation(f"realisation: {error}") from error


def _named(item: object) -> str:
    if not isinstance(item, dict) or item.keys() != {"keyName", "sig"}:
        raise MalformedRealisation("build trace: a signature is not {keyName, sig}")
    return f"{item['keyName']}:{item['sig']}"


def _signatures(texts: Any) -> tuple[Signature, ...]:
    found = set()
    for text in texts:
        try:
            found.add(Signature.parse(str(text)))
        except MalformedKey:
            continue  # as in a narinfo: dropped, so that no client trips over it
    return tuple(sorted(found))
