"""From a ClusterImagePolicy of Sigstore's policy-controller to `[[policy]]`.

Its authorities are alternatives, each of its attestations must be there, any of its identities
may have signed it; several policies must all hold. What has no counterpart here is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import yaml

from narseal.config import predicate_type
from narseal.cosign.keys import CosignPublicKey
from narseal.errors import ConfigError, MalformedKey

_PUBLIC_FULCIO = "https://fulcio.sigstore.dev"
_PUBLIC_LOG = "https://rekor.sigstore.dev"
_MAX_POLICIES = 64

Rule = dict[str, Any]


def translate(data: bytes, *, globs: Sequence[str], trust_config: str | None = None) -> str:
    """One rule, as TOML, for all policies of a YAML text; ConfigError names what cannot be said."""
    try:
        documents = [d for d in yaml.safe_load_all(data) if d is not None]
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}") from error
    if not 1 <= len(documents) <= _MAX_POLICIES:
        raise ConfigError(f"{len(documents)} documents; from 1 to {_MAX_POLICIES} are read")
    names = []
    parts = []
    for document in documents:
        name, part = _policy(document, trust_config)
        names.append(name)
        parts.append(part)
    rule = _joined("all", parts)
    lines = [f"# from the ClusterImagePolicy {name}" for name in names]
    if "identity_regex" in json.dumps(rule):
        lines.append("# identity_regex must match the whole name here")
    lines += ["[[policy]]", f"match = {_toml(list(globs))}"]
    lines += [f"{key} = {_toml(value)}" for key, value in rule.items()]
    return "\n".join(lines) + "\n"


def _policy(document: object, trust_config: str | None) -> tuple[str, Rule]:
    tree = _table(document, "the document")
    if tree.get("kind") != "ClusterImagePolicy":
        raise ConfigError(f"not a ClusterImagePolicy: its kind is {str(tree.get('kind'))[:60]!r}")
    name = str(_table(tree.get("metadata", {}), "metadata").get("name", "without a name"))[:100]
    if not name.isprintable():
        raise ConfigError("metadata.name is not printable")
    spec = _known(tree.get("spec"), f"{name}: spec", "images", "authorities", "mode", "match")
    if spec.get("mode", "enforce") != "enforce":
        raise ConfigError(
            f"{name}: spec.mode is {str(spec['mode'])[:40]!r}, and a narseal policy is enforced"
        )
    authorities = _list(spec.get("authorities"), f"{name}: spec.authorities")
    parts = [
        _authority(item, f"{name}: authorities[{n}]", trust_config)
        for n, item in enumerate(authorities)
    ]
    return name, _joined("any", parts)


def _authority(item: object, where: str, trust_config: str | None) -> Rule:
    tree = _known(item, where, "name", "key", "keyless", "ctlog", "attestations")
    if ("key" in tree) == ("keyless" in tree):
        raise ConfigError(f"{where}: exactly one of key and keyless is read")
    signers = (
        [_key(tree["key"], f"{where}.key")]
        if "key" in tree
        else _identities(tree["keyless"], f"{where}.keyless", trust_config)
    )
    if "ctlog" in tree:
        log = _known(tree["ctlog"], f"{where}.ctlog", "url").get("url", _PUBLIC_LOG)
        if log.rstrip("/") != _PUBLIC_LOG and not trust_config:
            raise ConfigError(
                f"{where}.ctlog.url: for another log than the public, give --trust-config"
            )
        if "key" in tree and not trust_config:
            raise ConfigError(
                f"{where}.ctlog: to ask for a log entry of a key's signature, give --trust-config"
            )
        if "key" in tree:
            signers = [signer | {"trust_config": trust_config} for signer in signers]
    wanted = _list(tree["attestations"], f"{where}.attestations") if "attestations" in tree else []
    kinds = [_kind(kind, f"{where}.attestations[{n}]") for n, kind in enumerate(wanted)]
    if not kinds:
        return _joined("any", [{"require": "cosign-signature", **signer} for signer in signers])
    return _joined(
        "all",
        [
            _joined(
                "any",
                [
                    {"require": "attestation", **signer, "predicate_types": [kind]}
                    for signer in signers
                ],
            )
            for kind in kinds
        ],
    )


def _key(item: object, where: str) -> Rule:
    tree = _known(item, where, "data", "hashAlgorithm")
    if str(tree.get("hashAlgorithm", "sha256")).lower() != "sha256":
        raise ConfigError(f"{where}.hashAlgorithm: only sha256 is verified")
    text = _text(tree.get("data"), f"{where}.data").strip() + "\n"
    try:
        CosignPublicKey.parse(text)
    except MalformedKey as error:
        raise ConfigError(f"{where}.data: {error}") from error
    return {"cosign_key": text}


def _identities(item: object, where: str, trust_config: str | None) -> list[Rule]:
    tree = _known(item, where, "url", "identities")
    private = tree.get("url", _PUBLIC_FULCIO) != _PUBLIC_FULCIO
    if private and not trust_config:
        raise ConfigError(f"{where}.url: for another Sigstore than the public, give --trust-config")
    found = []
    for number, identity in enumerate(_list(tree.get("identities"), f"{where}.identities")):
        place = f"{where}.identities[{number}]"
        one = _known(identity, place, "issuer", "subject", "subjectRegExp")
        rule: Rule = {"issuer": _text(one.get("issuer"), f"{place}.issuer")}
        if ("subject" in one) == ("subjectRegExp" in one):
            raise ConfigError(f"{place}: exactly one of subject and subjectRegExp is read")
        if "subject" in one:
            rule["identity"] = _text(one["subject"], f"{place}.subject")
        else:
            rule["identity_regex"] = _text(one["subjectRegExp"], f"{place}.subjectRegExp")
            try:
                re.compile(rule["identity_regex"])
            except re.error as error:
                raise ConfigError(f"{place}.subjectRegExp: {error}") from error
        if trust_config:
            rule["trust_config"] = trust_config
        found.append(rule)
    return found


def _kind(item: object, where: str) -> str:
    tree = _known(item, where, "name", "predicateType")
    try:
        return predicate_type(_text(tree.get("predicateType"), f"{where}.predicateType"))
    except ValueError as error:
        raise ConfigError(f"{where}.predicateType: {error}") from error


def _joined(how: str, parts: list[Rule]) -> Rule:
    """One requirement for several; one that stands alone is itself."""
    return parts[0] if len(parts) == 1 else {"require": how, "of": parts}


def _table(item: object, where: str) -> dict[str, Any]:
    if not isinstance(item, dict) or not all(isinstance(key, str) for key in item):
        raise ConfigError(f"{where} is no mapping")
    return item


def _known(item: object, where: str, *names: str) -> dict[str, Any]:
    tree = _table(item, where)
    if strange := sorted(set(tree) - set(names)):
        raise ConfigError(
            f"{where}.{strange[0]} cannot be said in a narseal policy, and without it the rule"
            " would ask for less"
        )
    return tree


def _list(item: object, where: str) -> list[Any]:
    if not isinstance(item, list) or not 1 <= len(item) <= _MAX_POLICIES:
        raise ConfigError(f"{where} is no list of 1 to {_MAX_POLICIES}")
    return item


def _text(item: object, where: str) -> str:
    if not isinstance(item, str) or not item:
        raise ConfigError(f"{where} is no text")
    return item


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + "".join(f"  {_toml(item)},\n" for item in value) + "]"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=True).replace("\x7f", "\\u007f")
