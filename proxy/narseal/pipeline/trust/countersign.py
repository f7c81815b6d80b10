"""Adding the operator's signatures to what was verified."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from narseal.cosign.statement import AuditHead
from narseal.custody.agent import AgentKey
from narseal.custody.operator import OperatorKey
from narseal.custody.requests import Request
from narseal.errors import Refused, Unavailable
from narseal.nix.keyring import KeyRing
from narseal.nix.keys import Signature
from narseal.runtime.threads import by_size
from narseal.storage import Revocations
from narseal.telemetry import metrics

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Countersigned:
    """What a signer's work came to."""

    #: Everybody's, the operator's among them, in order.
    signatures: tuple[Signature, ...]
    #: Names of the operator's keys whose are among them, made or verified just now.
    ours: frozenset[str]
    #: Those that bore one of our names, or a revoked one, and were not good.
    dropped: tuple[Signature, ...]


class Countersigner:
    """The operator's active keys."""

    def __init__(self, keys: Sequence[OperatorKey], revocations: Revocations) -> None:
        #: All of them, retired ones too.
        self.keys = tuple(keys)
        self._revocations = revocations
        #: Public halves of all of them.
        self.ring = KeyRing.of(key.public for key in keys)

    async def countersign(
        self, request: Request, signatures: tuple[Signature, ...]
    ) -> Countersigned:
        """`signatures` and one by each active key that has no good one among them, less revoked ones.

        The request is for what there is evidence for. What bears one of our names is ours only if
        it verifies. Refused if no signer signs it; Unavailable if one cannot now, or no key is
        active.
        """
        revoked = (await self._revocations.now()).keys
        message, ring = request.message, self.ring.without(revoked)
        good = await by_size(len(message), ring.verified, message, signatures)
        kept = [s for s in signatures if s.key_name not in self.ring and s.key_name not in revoked]
        ours = {signature.key_name for signature in good}
        made: list[Signature] = []
        refusal: Refused | None = None
        for key in await self.active():
            if key.public.name in ours:
                continue
            try:
                with metrics.signing("nix"):
                    made.append(await key.custodian.sign(request))
            except Refused as error:
                refusal = error
        if not made and not ours:
            raise refusal or Unavailable(
                "no key of the operator's is active: add a [[signing.key]]"
            )
        if refusal:
            _log.warning("%s", refusal)
        found = tuple(sorted({*kept, *good, *made}))
        names = frozenset(ours | {signature.key_name for signature in made})
        return Countersigned(found, names, tuple(set(signatures) - set(found)))

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
