"""Adding the operator's signatures to what was verified."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime

from narseal.custody.operator import OperatorKey
from narseal.custody.requests import Request
from narseal.errors import Refused
from narseal.nix.keys import PublicKey, Signature
from narseal.telemetry import metrics

_log = logging.getLogger(__name__)


class Countersigner:
    """The operator's active keys."""

    def __init__(self, keys: Sequence[OperatorKey]) -> None:
        self._keys = keys
        #: Public halves of all of them, retired ones too, by name.
        self.public_keys: dict[str, PublicKey] = {key.public.name: key.public for key in keys}

    async def countersign(
        self, request: Request, signatures: tuple[Signature, ...]
    ) -> tuple[Signature, ...]:
        """`signatures` and one by each active key that has none among them yet.

        The request is for what there is evidence for; those of `signatures` that carry our names
        were verified. Returns the same tuple if nothing had to be made. Refused if no signer
        signs it; Unavailable if one cannot now.
        """
        present = {signature.key_name for signature in signatures}
        now = datetime.now(UTC)
        made: list[Signature] = []
        refusal: Refused | None = None
        for key in self._keys:
            if key.public.name in present or not key.is_active(now):
                continue
            try:
                with metrics.signing("nix"):
                    made.append(await key.custodian.sign(request))
            except Refused as error:
                refusal = error
        if refusal and not made and not present & self.public_keys.keys():
            raise refusal
        if refusal:
            _log.warning("%s", refusal)
        return tuple(sorted([*signatures, *made])) if made else signatures
