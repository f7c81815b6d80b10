"""Which names a certificate for an OIDC token may have.

Fulcio writes another claim, or several, into the certificate for each type of issuer, and a client
does not know of which type it takes an issuer to be. So the name must be one that some type makes of
the token's claims. Sources: `docs/oidc.md`, `pkg/identity` and the templates of
`config/identity/config.yaml` in sigstore/fulcio.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from narseal.cosign.certificate import CertificateNames
from narseal.errors import Refused

Claims = Mapping[str, Any]

_KUBERNETES = (
    "https://kubernetes.io/namespaces/{kubernetes.io/namespace}"
    "/serviceaccounts/{kubernetes.io/serviceaccount/name}"
)
_CIRCLECI = (
    "https://circleci.com/api/v2/projects/{oidc.circleci.com/project-id}"
    "/pipeline-definitions/{oidc.circleci.com/pipeline-definition-id}"
)
#: A name for each type of issuer.
_TEMPLATES = (
    "{email}",
    "{uri}",  # SPIFFE, and URIs of an issuer's own
    "https://github.com/{job_workflow_ref}",
    "https://{host}/{job_workflow_ref}",  # GitHub Enterprise Server
    "https://{ci_config_ref_uri}",  # GitLab
    "https://buildkite.com/{organization_slug}/{pipeline_slug}",
    _KUBERNETES,
    "{platform_url}/{account_name}/{pipeline_name}:{account_id}/{pipeline_id}",  # Codefresh
    _CIRCLECI,
    "{iss}/{sub}",  # Chainguard
)
_WANTED = re.compile(r"\{([^}]+)\}")
#: Characters that Go's net/url leaves as they are, if the text has no others.
_PLAIN = re.compile(r"[A-Za-z0-9$&+,/:;=@~._!'()*\[\]%?#-]*", re.ASCII)


def check(found: CertificateNames, claims: Claims, *, expected: str | None) -> tuple[str, str]:
    """The identity and issuer of a certificate that Fulcio gave for a token with these claims.

    `expected` is who the operator says it must be; without it, the name must follow from the
    claims. Refused("bad-identity") if the certificate is for anybody else.
    """
    if len(found.identities) != 1 or len(found.issuers) != 1:
        raise _refused("it does not name one identity of one issuer")
    name, issuer = found.identities[0], found.issuers[0]
    if issuer not in issuers(claims):
        raise _refused(f"its issuer is {issuer}, the token's {' or '.join(issuers(claims))}")
    if found.subject not in (None, claims.get("sub")):
        raise _refused(f"it is for {found.subject}, the token for {claims.get('sub')}")
    if expected is not None and name != expected:
        raise _refused(f"it is for {name}, and cosign.identity is {expected}")
    if expected is None and name not in names(claims):
        raise _refused(
            f"it is for {name}, which does not follow from the token's claims; if that is who"
            " signs here, say so by cosign.identity"
        )
    return name, issuer


def issuers(claims: Claims) -> list[str]:
    """The token's issuer, and the one that it was federated from (Dex: `connector_id`)."""
    federated = claims.get("federated_claims")
    behind = federated.get("connector_id") if isinstance(federated, Mapping) else None
    return [text for text in (claims.get("iss"), behind) if isinstance(text, str)]


def names(claims: Claims) -> frozenset[str]:
    """Every name that Fulcio makes of these claims for one of its types of issuers."""
    facts = _facts(claims)
    found: set[str] = set()
    for template in _TEMPLATES:
        if all(wanted in facts for wanted in _WANTED.findall(template)):
            name = _WANTED.sub(lambda match: facts[match[1]], template)
            found |= {name, _as_go_writes(name)}
    return frozenset(found)


def _facts(claims: Claims) -> dict[str, str]:
    """What the templates ask for: the claims that are text, nested ones as `outer/inner`."""
    found: dict[str, str] = {"platform_url": "https://g.codefresh.io"}

    def add(prefix: str, tree: Mapping[str, Any], depth: int) -> None:
        for name, value in tree.items():
            if isinstance(value, str) and value:
                found[prefix + name] = value
            elif isinstance(value, Mapping) and depth:
                add(f"{prefix}{name}/", value, depth - 1)

    add("", claims, 2)
    found["host"] = urlsplit(found.get("iss", "")).netloc
    if "://" in found.get("sub", ""):
        found["uri"] = found["sub"]
    return found


def _as_go_writes(name: str) -> str:
    """A URI as Go's net/url gives it back, which escapes all where one character needs it."""
    if "://" not in name or _PLAIN.fullmatch(name):
        return name
    return quote(unquote(name), safe="$&+,/:;=@~._-")


def _refused(message: str) -> Refused:
    return Refused("bad-identity", f"the certificate is not used: {message}")
