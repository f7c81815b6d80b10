"""What the operator asks of a path before it is served: `[[policy]]`, first match wins.

A verdict is found anew whenever an answer is not in memory; what a bundle says of whom is
remembered, because neither changes.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from narseal.config import SIGNATURE, Config, PolicyConfig, RequirementConfig, Who
from narseal.cosign.statement import Statement
from narseal.errors import (
    ConfigError,
    Denied,
    MalformedAttestation,
    MalformedStorePath,
    Refused,
)
from narseal.nix.keyring import KeyRing
from narseal.nix.keys import PublicKey
from narseal.nix.narinfo import NarInfo
from narseal.nix.store_path import StorePath
from narseal.pipeline.trust.sigstore import ExpectedSigners, check_not_revoked, verified
from narseal.runtime.threads import ThreadPools, by_size
from narseal.storage import (
    Admitted,
    Attestation,
    Attestations,
    Folder,
    NarRecord,
    Revocations,
    Revoked,
    bundle_name,
)
from narseal.telemetry import metrics

if TYPE_CHECKING:
    from narseal.cosign.verify import Verified

_log = logging.getLogger(__name__)
_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a path may be served, and why."""

    allowed: bool
    #: As the configuration has it: `policy[2]` (from 0), or `policy_default`.
    rule: str
    why: str


@dataclass(frozen=True, slots=True)
class _Said:
    """What a verified bundle says of a digest."""

    predicate_type: str
    #: Names that its statement gives the digest.
    names: tuple[str, ...]
    #: Why it does not meet the expression that was asked of it; None if it does.
    failure: str | None = None


class Policy:
    """The rules. ConfigError if one names a key that is not known, or a file that cannot be used."""

    def __init__(
        self,
        config: Config,
        *,
        own_names: Collection[str],
        attestations: Attestations,
        revocations: Revocations,
        folder: Folder,
        threads: ThreadPools,
    ) -> None:
        self._rules = config.policy
        self._default = config.policy_default
        #: Whether any path could be kept back.
        self.active = bool(config.policy) or config.policy_default == "deny"
        self._keys = known_keys(config, own_names)
        #: Those that rules name.
        self.keys = frozenset(self._keys.values())
        self._signers = attesting_signers(config)
        self._attestations = attestations
        self._revocations = revocations
        self._folder = folder
        self._threads = threads
        self._said: OrderedDict[tuple[Who, bytes, bytes, str | None], _Said | str] = OrderedDict()
        self._revoked: Revoked | None = None
        self._told: OrderedDict[tuple[str, str], None] = OrderedDict()

    async def check(self, info: NarInfo, digests: frozenset[bytes]) -> None:
        """Denied, with one line that says why, unless the rules let the path through."""
        if not self.active:
            return
        self._enforce(info.store_path, await self.verdict(info, digests))

    async def check_any(self, found: Sequence[Admitted]) -> None:
        """Denied if the rules keep back every one of some paths, and there is one."""
        denied: Denied | None = None
        for path, nar in found:
            try:
                await self.check(path.info, content_digests(path.info, nar))
            except Denied as error:
                denied = error
            else:
                return
        if denied:
            raise denied

    async def passes(self, info: NarInfo, digests: frozenset[bytes]) -> bool:
        """Whether the rules let the path through."""
        return not self.active or (await self.verdict(info, digests)).allowed

    async def verdict(self, info: NarInfo, digests: frozenset[bytes]) -> Verdict:
        """What the rules say of an admitted path; `digests` are those of its verified content.

        Trouble if it cannot be found out.
        """
        label, rule = self._rule(info.store_path)
        if (settled := self._settled(label, rule)) is not None:
            return settled
        assert rule is not None  # without a rule it is settled
        allowed, why = await self._meets(rule, info, digests)
        return Verdict(allowed, label, why)

    def check_name(self, path: StorePath) -> None:
        """Denied if no content and no signature could make the rules let the path through."""
        if (settled := self._settled(*self._rule(path))) is not None:
            self._enforce(path, settled)

    def signers(self, path: StorePath) -> KeyRing:
        """The keys by which the rule about a path asks for signatures; none if it asks for none."""
        _, rule = self._rule(path)
        return KeyRing.of(self._keys[text] for text in (_key_texts(rule) if rule else ()))

    def _rule(self, path: StorePath) -> tuple[str, PolicyConfig | None]:
        """The first rule that is about a path, and what to call it."""
        for number, rule in enumerate(self._rules):
            if rule.matches(path.name):
                return f"policy[{number}] ({', '.join(rule.match)})", rule
        return "policy_default", None

    def _settled(self, label: str, rule: PolicyConfig | None) -> Verdict | None:
        """The verdict of a rule that asks for nothing."""
        if rule is None:
            why = f'"{self._default}": no rule is about it'
            return Verdict(self._default == "allow", label, why)
        if rule.action is not None:
            return Verdict(rule.action == "allow", label, f'action is "{rule.action}"')
        return None

    def _enforce(self, path: StorePath, verdict: Verdict) -> None:
        if not verdict.allowed:
            self._tell(path, verdict)
            raise Denied(f"{path}: {verdict.rule}: {verdict.why}")

    async def _meets(
        self, wanted: RequirementConfig, info: NarInfo, digests: frozenset[bytes]
    ) -> tuple[bool, str]:
        if wanted.require == "signature":
            return await self._is_signed(wanted, info, (await self._revocations.now()).keys)
        if wanted.require in ("attestation", "cosign-signature"):
            return await self._is_attested(wanted, info, digests)
        reasons = []
        for part in wanted.of:
            met, why = await self._meets(part, info, digests)
            if met == (wanted.require == "any"):
                return met, why
            reasons.append(why)
        return wanted.require == "all", "; ".join(reasons)

    async def _is_signed(
        self, wanted: RequirementConfig, info: NarInfo, revoked: frozenset[str]
    ) -> tuple[bool, str]:
        message = info.fingerprint()
        keys = [self._keys[text] for text in wanted.keys]
        ring = KeyRing.of(keys).without(revoked)
        good = await by_size(len(message), ring.each_verified, message, info.signatures)
        signers = {signature.key_name for signature in good}
        for key in keys:
            if key.name in signers:
                return True, f"signed by {key.name}"
        names = [f"{k.name} (revoked)" if k.name in revoked else k.name for k in keys]
        return False, f"it has no signature by {' or '.join(names)}"

    async def _is_attested(
        self, wanted: RequirementConfig, info: NarInfo, digests: frozenset[bytes]
    ) -> tuple[bool, str]:
        who = wanted.who
        kinds = " or ".join(wanted.kinds) or "any type"
        last = ""
        for found in reversed(await self._attestations.covering(*digests)):
            if not _is_of(wanted, found.predicate_type):
                continue
            said = await self._say(who, found, wanted.where)
            if isinstance(said, str):
                last = said
            elif not _is_of(wanted, said.predicate_type):
                last = f"one says it is {found.predicate_type} and is {said.predicate_type}"
            elif said.failure:
                last = said.failure
            elif (others := _other_paths(said.names, info)) is not None:
                last = f"one is of {others}"
            else:
                return True, f"attested ({said.predicate_type}) by {who}"
        sentence = f"it has no attestation ({kinds}) by {who}"
        return False, f"{sentence}; {last}" if last else sentence

    async def _say(self, who: Who, found: Attestation, where: str | None) -> _Said | str:
        """What a bundle says of its subject, if it is by `who`; else why not."""
        key = (who, found.digest, found.subject, where)
        revoked = await self._revocations.now()
        if revoked is not self._revoked:
            self._said.clear()
            self._revoked = revoked
        known = self._said.get(key)
        if known is None:
            data = await self._folder.read(bundle_name(found.digest))
            try:
                if data is None:
                    raise Refused("bad-bundle", "the bundle is not in storage any more")
                result = await self.verify(who, data, found.subject)
                known = await self._threads.run(_of_subject, result.statement, found.subject, where)
            except (Refused, MalformedAttestation) as error:
                known = str(error)
            self._said[key] = known
            while len(self._said) > _REMEMBERED:
                self._said.popitem(last=False)
        return known

    async def verify(self, who: Who, data: bytes, digest: bytes) -> Verified:
        """What a bundle by `who` says of a digest; Refused or Malformed if it is not by them.

        Nor may its key, or its identity at the time, be revoked.
        """
        verifier = await self._threads.run(self._signers.verifier, who)
        found = await self._threads.run(verified, verifier, data, digest)
        check_not_revoked(found, who, await self._revocations.now())
        return found

    def _tell(self, path: StorePath, verdict: Verdict) -> None:
        """Count; say it once for each path and rule."""
        metrics.rejected.labels("policy").inc()
        key = (path.hash_part, verdict.rule)
        if key not in self._told:
            _log.warning("kept back %s: %s: %s", path, verdict.rule, verdict.why)
            self._told[key] = None
            while len(self._told) > _REMEMBERED:
                self._told.popitem(last=False)


def content_digests(info: NarInfo, nar: NarRecord) -> frozenset[bytes]:
    """The digests of a path's content that were verified: its NAR's, and its stored file's."""
    if nar.stored and nar.file_hash:
        return frozenset((info.nar_hash.digest, nar.file_hash.digest))
    return frozenset((info.nar_hash.digest,))


def attesters(config: Config) -> Iterator[tuple[Who, tuple[str, ...]]]:
    """Everybody whose attestations are of use, and their predicate types (none: any)."""
    for rule in config.policy:
        for part in rule.attesters():
            yield part.who, part.kinds
    for accepted in config.attestations.accept:
        yield accepted.who, accepted.predicate_types


def attesting_signers(config: Config) -> ExpectedSigners:
    """Verifiers of attestations; ConfigError if a key or trust file cannot be used. Blocks."""
    who = [who for who, _ in attesters(config)]
    return ExpectedSigners(who, trust_config=config.cosign.trust_config)


def _is_of(wanted: RequirementConfig, predicate_type: str) -> bool:
    """Whether a statement of a type could meet a requirement; a signature is no attestation."""
    return predicate_type in wanted.kinds if wanted.kinds else predicate_type != SIGNATURE


def _of_subject(statement: Statement | None, digest: bytes, where: str | None) -> _Said:
    """In a thread: what a statement says of a digest; none: it is a plain signature."""
    if statement is None:
        return _Said(SIGNATURE, ())
    names = tuple(s.name for s in statement.subjects if s.digest == digest)
    failure = None
    if where:
        from narseal.config.expression import Expression  # 6 MB, where none is asked for

        failure = Expression(where).failure(statement.predicate)
    return _Said(statement.predicate_type, names, failure)


def _other_paths(names: tuple[str, ...], info: NarInfo) -> str | None:
    """The store path that the names of a subject say, unless this one is among them.

    A digest is of content only: an attestation that names its store path is for no other.
    """
    found = []
    for name in names:
        text = name.removeprefix(f"{info.store_dir}/")
        try:
            found.append(StorePath.parse(text))
        except MalformedStorePath:
            return None  # names a file, or nothing
    if not found or info.store_path in found:
        return None
    return str(found[0])


def known_keys(config: Config, own_names: Collection[str]) -> dict[str, PublicKey]:
    """The keys that rules name, by their text; ConfigError if one is not known, or is our own."""
    pinned: dict[str, set[PublicKey]] = {}
    for key in (k for u in config.upstream for k in u.public_keys):
        pinned.setdefault(key.name, set()).add(key)
    for key in config.upload.trusted_keys:
        pinned.setdefault(key.name, set()).add(key)
    found = {}
    for number, rule in enumerate(config.policy):
        for text in _key_texts(rule):
            name = text.partition(":")[0]
            if name in own_names:
                raise ConfigError(
                    f"policy[{number}]: {name} is the operator's own key, which signs what the"
                    " rules let through; name the key of whoever must have signed before"
                )
            keys = {PublicKey.parse(text)} if ":" in text else pinned.get(text, set())
            if len(keys) != 1:
                known = ", ".join(sorted(pinned)) or "none"
                raise ConfigError(
                    f"policy[{number}]: no key is called {text}; there are: {known}. Give it whole"
                    if not keys
                    else f"policy[{number}]: two keys are called {text}; give the one whole"
                )
            found[text] = keys.pop()
    return found


def _key_texts(wanted: RequirementConfig) -> Iterator[str]:
    yield from wanted.keys
    for part in wanted.of:
        yield from _key_texts(part)
