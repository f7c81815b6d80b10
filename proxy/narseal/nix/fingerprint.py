"""The text under a Nix path signature (Nix manual, `ValidPathInfo::fingerprint`)."""

from __future__ import annotations

from collections.abc import Iterable

from narseal.nix.hashes import Hash
from narseal.nix.store_path import References, StorePath


def fingerprint(
    store_dir: str,
    store_path: StorePath,
    nar_hash: Hash,
    nar_size: int,
    references: Iterable[StorePath],
) -> bytes:
    """`1;<path>;<sha256:nix32>;<size>;<references>`: full paths, sorted bytewise, each once."""
    if not isinstance(references, References):
        references = References(set(references))
    return of_texts(store_dir, str(store_path), nar_hash, nar_size, references.text)


def of_texts(
    store_dir: str, base_name: str, nar_hash: object, nar_size: int, references: str
) -> bytes:
    """The same of texts: base names, those of the references in order with a space between two."""
    # below one folder, full paths have the order of their base names
    folder = f"{store_dir}/"
    refs = folder + references.replace(" ", f",{folder}") if references else ""
    return f"1;{folder}{base_name};{nar_hash};{nar_size};{refs}".encode()
