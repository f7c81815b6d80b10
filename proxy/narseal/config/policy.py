"""`[[policy]]` and `[attestations]`: who must have signed or attested what is served."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from narseal.config.sections import Section, SignerSection
from narseal.config.values import NameGlob, Size
from narseal.errors import MalformedKey
from narseal.nix.keys import PublicKey
from narseal.nix.name_globs import matches

#: cosign's short names of predicate types.
PREDICATE_TYPES = {
    "custom": "https://cosign.sigstore.dev/attestation/v1",
    "cyclonedx": "https://cyclonedx.org/bom",
    "link": "https://in-toto.io/Link/v1",
    "openvex": "https://openvex.dev/ns",
    "slsaprovenance": "https://slsa.dev/provenance/v0.2",
    "slsaprovenance02": "https://slsa.dev/provenance/v0.2",
    "slsaprovenance1": "https://slsa.dev/provenance/v1",
    "spdx": "https://spdx.dev/Document",
    "spdxjson": "https://spdx.dev/Document",
    "vuln": "https://cosign.sigstore.dev/attestation/vuln/v1",
}


#: What cosign calls the statement that is a signature and says no more; plain ones count as it.
SIGNATURE = "https://sigstore.dev/cosign/sign/v1"


def predicate_type(text: str) -> str:
    """The URI of a predicate type, which may be given by cosign's short name; ValueError else."""
    uri = PREDICATE_TYPES.get(text, text)
    if ":" not in uri or not uri.isascii() or not uri.isprintable() or len(uri) > 250:
        raise ValueError(
            f"{text!r} is neither a URI nor one of {', '.join(PREDICATE_TYPES)}, as cosign has them"
        )
    return uri


def _expression(text: str) -> str:
    from narseal.config.expression import Expression

    Expression(text)
    return text


def _key(text: str) -> str:
    if ":" in text:
        try:
            PublicKey.parse(text)
        except MalformedKey as error:
            raise ValueError(str(error)) from error
    return text


def _several(value: object) -> object:
    return (value,) if isinstance(value, str) else value


PredicateTypes = tuple[Annotated[str, AfterValidator(predicate_type)], ...]
Globs = Annotated[tuple[NameGlob, ...], BeforeValidator(_several), Field(min_length=1)]


def _check_kinds(section: AcceptConfig | RequirementConfig) -> None:
    if "predicate_types" in section.model_fields_set and not section.predicate_types:
        raise ValueError("predicate_types is empty, which nothing meets: leave it out for any type")


class AcceptConfig(SignerSection):
    """`[[attestations.accept]]`: one who may leave attestations though no rule asks for them."""

    #: None: any.
    predicate_types: PredicateTypes = ()

    @model_validator(mode="after")
    def _names_somebody(self) -> Self:
        if not self.names_signer:
            raise ValueError("say who may attest: identity and issuer, or cosign_key")
        _check_kinds(self)
        return self


class RequirementConfig(SignerSection):
    """What a rule asks for."""

    require: Literal["signature", "cosign-signature", "attestation", "any", "all"] | None = None
    #: With "signature": names of keys that are pinned above, or whole keys; one is enough.
    keys: tuple[Annotated[str, AfterValidator(_key)], ...] = ()
    #: With "attestation": one of these; none: any.
    predicate_types: PredicateTypes = ()
    #: With "attestation": a CEL expression over `predicate` that must be true.
    where: Annotated[str, AfterValidator(_expression)] | None = None
    #: With "any" and "all".
    of: tuple[RequirementConfig, ...] = ()

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        wanted = {"signature": "keys", "any": "of", "all": "of"}.get(self.require or "")
        for name in ("keys", "of"):
            if bool(getattr(self, name)) != (name == wanted):
                raise ValueError(
                    f'require = "{self.require}" needs {name}'
                    if name == wanted
                    else f"{name} does not belong to require = {self.require!r}"
                )
        by_sigstore = self.require in ("attestation", "cosign-signature")
        if by_sigstore and not self.names_signer:
            raise ValueError(
                f'require = "{self.require}" needs to know who signs: identity and issuer, or'
                " cosign_key"
            )
        belongs = {"predicate_types", "where"} if self.require != "attestation" else set()
        if not by_sigstore:
            belongs |= {*SignerSection.model_fields}
        if stray := self.model_fields_set & belongs:
            raise ValueError(f'{min(stray)} belongs to require = "attestation"')
        _check_kinds(self)
        if any(part.require is None for part in self.of):
            raise ValueError("each part of `of` has a require")
        return self

    @property
    def kinds(self) -> tuple[str, ...]:
        """The predicate types that meet it; none: any attestation."""
        return (SIGNATURE,) if self.require == "cosign-signature" else self.predicate_types

    def attesters(self) -> Iterator[RequirementConfig]:
        """Every requirement of an attestation, or of a signature by cosign, in it."""
        if self.require in ("attestation", "cosign-signature"):
            yield self
        for part in self.of:
            yield from part.attesters()


class PolicyConfig(RequirementConfig):
    """`[[policy]]`: a rule; the first whose glob matches a path's name decides."""

    match: Globs
    action: Literal["allow", "deny"] | None = None

    @model_validator(mode="after")
    def _decides(self) -> Self:
        if (self.require is None) == (self.action is None):
            raise ValueError('a rule has either require, or action = "allow" or "deny"')
        return self

    def matches(self, name: str) -> bool:
        """Whether the rule is about store paths of this name."""
        return matches(name, self.match)


class AttestationsConfig(Section):
    """`[attestations]`: bounds on what pipelines leave."""

    accept: tuple[AcceptConfig, ...] = ()
    #: Of one bundle.
    size: Size = 8 << 20
    #: Attestations of one digest.
    per_digest: Annotated[int, Field(ge=1, le=1024)] = 64
