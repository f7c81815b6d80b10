"""Adding the operator's signatures to what was verified."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from narseal.custody import FileKey
from narseal.nix.keys import PublicKey, Signature
from narseal.telemetry import metrics


class Countersigner:
    """The operator's active keys."""

    def __init__(self, keys: Sequence[FileKey]) -> None:
        self._keys = keys
        #: Public halves of all of them, retired ones too, by name.
        self.public_keys: dict[str, PublicKey] = {key.public.name: key.public for key in keys}

    async def countersign(
        self, message: bytes, signatures: tuple[Signature, ...]
    ) -> tuple[Signature, ...]:
        """`signatures` and one by each active key that has none among them yet.

        `message` is a fingerprint for which there is evidence; those of `signatures` that carry
        our names were verified. Returns the same tuple if nothing had to be made.
        """
        present = {signature.key_name for signature in signatures}
        now = datetime.now(UTC)
        missing = [
            key
            for key in self._keys
            if key.public.name not in present and (key.not_after is None or now < key.not_after)
        ]
        if not missing:
            return signatures
        return tuple(sorted([*signatures, *[await _sign(key, message) for key in missing]]))


async def _sign(key: FileKey, message: bytes) -> Signature:
    with metrics.signing("nix"):
        return await key.sign(message)
