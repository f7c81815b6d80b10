"""Adding the operator's signatures to what was verified."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime

from narseal.cosign.statement import AuditHead
from narseal.custody.agent import AgentKey
from narseal.custody.operator import OperatorKey
from narseal.custody.requests import Request
from narseal.errors import Refused, Unavailable
from narseal.nix.keys import PublicKey, Signature
from narseal.storage import Revocations
from narseal.telemetry import metrics

_log = logging.getLogger(__name__)


class Countersigner:
    """The operator's active keys."""

    def __init__(self, keys: Sequence[OperatorKey], revocations: Revocations) -> None:
        #: All of them, retired ones too.
        self.keys = tuple(keys)
        self._revocations = revocations
        #: Public halves of all of them, retired ones too, by name.
        self.public_keys: dict[str, PublicKey] = {key.public.name: key.public for key in keys}

    async def countersign(
        self, request: Request, signatures: tuple[Signature, ...]
    ) -> tuple[Signature, ...]:
        """`signatures` and one by each active key that has none among them yet, less revoked ones.

        The request is for what there is evidence for; those of `signatures` that carry our names
        were verified. Returns the same tuple if nothing had to be made. Refused if no signer
        signs it; Unavailable if one cannot now, or no key is active.
        """
        revoked = (await self._revocations.now()).keys
        kept = signatures
        if revoked and any(s.key_name in revoked for s in signatures):
            kept = tuple(s for s in signatures if s.key_name not in revoked)
        present = {signature.key_name for signature in kept}
        active = await self.active()
        made: list[Signature] = []
        refusal: Refused | None = None
        for key in active:
            if key.public.name in present:
                continue
            try:
                with metrics.signing("nix"):
                    made.append(await key.custodian.sign(request))
            except Refused as error:
                refusal = error
        if not made and not present & self.public_keys.keys():
            raise refusal or Unavailable(
                "no key of the operator's is active: add a [[signing.key]]"
            )
        if refusal:
            _log.warning("%s", refusal)
        return tuple(sorted([*kept, *made])) if made else kept

    async def heads(self) -> list[AuditHead]:
        """Where the audit logs of the signers stand."""
        agents = [k.custodian for k in self.keys if isinstance(k.custodian, AgentKey)]
        found = [await agent.head() for agent in agents]
        return list(dict.fromkeys(head for head in found if head))

    async def note(self, kind: str, name: str, reason: str) -> None:
        """Have a revocation written into the audit logs of the signers."""
        for key in self.keys:
            await key.custodian.note(kind, name, reason)

    async def active(self) -> list[OperatorKey]:
        """The keys that sign now: neither retired nor revoked."""
        revoked = (await self._revocations.now()).keys
        now = datetime.now(UTC)
        return [k for k in self.keys if k.is_active(now) and k.public.name not in revoked]
