"""Who gets certificates: the tokens of the world's issuers, and how Fulcio is told of each.

Claims as the issuers' own documentation shows them; the types and templates are those of the public
instance (`config/identity/config.yaml` and `docs/oidc.md` of sigstore/fulcio).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_SHA = "9f3182061f1e2cca4702c368cbc039b7dc9d4485"
_WORKFLOW = "octo-org/octo-repo/.github/workflows/release.yml@refs/heads/main"
_EMAIL = "builder@example.org"


@dataclass(frozen=True)
class Kind:
    """One kind of issuer."""

    #: What its tokens say besides iss, aud, iat and exp.
    claims: dict[str, Any]
    #: What Fulcio's configuration says of it besides its URL and client.
    fulcio: dict[str, Any]
    #: The certificate's name, given the issuer's URL.
    name: Callable[[str], str]
    #: The certificate's issuer, where it is not the token's.
    federated: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


_GITHUB: dict[str, Any] = {
    "jti": "example-id", "sub": "repo:octo-org/octo-repo:ref:refs/heads/main", "ref": "refs/heads/main",
    "sha": _SHA, "repository": "octo-org/octo-repo", "repository_owner": "octo-org",
    "repository_owner_id": "65", "repository_id": "74", "repository_visibility": "private",
    "run_id": "577902165", "run_number": "10", "run_attempt": "2", "actor": "octocat", "actor_id": "12",
    "workflow": "release", "workflow_ref": _WORKFLOW, "workflow_sha": _SHA, "head_ref": "",
    "base_ref": "", "event_name": "push", "ref_type": "branch", "ref_protected": "true",
    "runner_environment": "github-hosted", "job_workflow_ref": _WORKFLOW, "job_workflow_sha": _SHA,
}  # fmt: skip
_GITLAB: dict[str, Any] = {
    "namespace_id": "72", "namespace_path": "my-group", "project_id": "20",
    "project_path": "my-group/my-project", "user_id": "1", "user_login": "sample-user",
    "user_email": "sample-user@example.com", "pipeline_id": "574", "pipeline_source": "push",
    "job_id": "302", "ref": "main", "ref_type": "branch", "ref_path": "refs/heads/main",
    "ref_protected": "true", "runner_id": 1, "runner_environment": "self-hosted", "sha": _SHA,
    "project_visibility": "public", "ci_config_sha": _SHA,
    "ci_config_ref_uri": "gitlab.example.com/my-group/my-project//.gitlab-ci.yml@refs/heads/main",
    "sub": "project_path:my-group/my-project:ref_type:branch:ref:main",
}  # fmt: skip
_KUBERNETES: dict[str, Any] = {
    "aud": ["sigstore"],
    "sub": "system:serviceaccount:ci:builder",
    "kubernetes.io": {
        "namespace": "ci",
        "pod": {"name": "builder-0", "uid": "49ad3572-b3dd-43a6-8d77-5858d3660275"},
        "serviceaccount": {"name": "builder", "uid": "f5720c1d-e152-4356-a897-11b07aff165d"},
    },
}
_BUILDKITE: dict[str, Any] = {
    "sub": f"organization:acme-inc:pipeline:super-duper-app:ref:refs/heads/main:commit:{_SHA}:step:build",
    "organization_slug": "acme-inc", "pipeline_slug": "super-duper-app", "build_number": 9,
    "build_branch": "main", "build_commit": _SHA, "step_key": "build", "build_source": "webhook",
    "job_id": "0184990a-477b-4fa8-9968-496074483cee", "agent_id": "0184990a-4782-42b5-afc1-16715b10b8ff",
    "runner_environment": "self-hosted",
}  # fmt: skip
_CODEFRESH: dict[str, Any] = {
    "sub": "account:628a80b693a15c0f9c13ab75:pipeline:65e5a53e52853dc51a5b0cc1",
    "account_id": "628a80b693a15c0f9c13ab75", "account_name": "codefresh-inc",
    "pipeline_id": "65e5a53e52853dc51a5b0cc1", "pipeline_name": "tests/build", "workflow_id": "65e6d5551e47e5bc243ca93f",
}  # fmt: skip
_CIRCLECI: dict[str, Any] = {
    "sub": "org/org-1/project/proj-1/user/user-1",
    "oidc.circleci.com/project-id": "proj-1",
    "oidc.circleci.com/pipeline-definition-id": "def-1",
}


def _email(subject: str, **more: Any) -> dict[str, Any]:
    return {"sub": subject, "email": _EMAIL, "email_verified": True} | more


def _ci(
    provider: str, template: str, defaults: dict[str, str], **extensions: str
) -> dict[str, Any]:
    """`CIIssuerMetadata` of one provider."""
    return {
        provider: {
            "DefaultTemplateValues": defaults,
            "ExtensionTemplates": extensions,
            "SubjectAlternativeNameTemplate": template,
        }
    }


KINDS: dict[str, Kind] = {
    "email": Kind(_email(_EMAIL), {"Type": "email"}, lambda _: _EMAIL),
    "google": Kind(_email("110169484474386276334", hd="example.org"), {"Type": "email"}, lambda _: _EMAIL),
    "keycloak": Kind(
        _email("f81d4fae-7dec-11d0-a765-00a0c91e6bf6", preferred_username="builder", azp="sigstore"),
        {"Type": "email"},
        lambda _: _EMAIL,
    ),
    "dex": Kind(
        _email(
            "CgY0ODE1MTYSJmh0dHBzOiUyRiUyRmdpdGh1Yi5jb20lMkZsb2dpbiUyRm9hdXRo",
            federated_claims={
                "connector_id": "https://github.com/login/oauth", "user_id": "481516"
            },
        ),
        {"Type": "email", "IssuerClaim": "$.federated_claims.connector_id"},
        lambda _: _EMAIL,
        federated="https://github.com/login/oauth",
    ),
    # an instance whose Fulcio was not told to look behind Dex
    "dex-opaque": Kind(
        _email("CgY0ODE1MTYSBmdpdGh1Yg", federated_claims={"connector_id": "github"}),
        {"Type": "email"},
        lambda _: _EMAIL,
    ),
    "github": Kind(
        _GITHUB, {"Type": "github-workflow"}, lambda _: f"https://github.com/{_WORKFLOW}"
    ),
    "github-ci": Kind(
        _GITHUB, {"Type": "ci-provider", "CIProvider": "github-workflow"},
        lambda _: f"https://github.com/{_WORKFLOW}",
        metadata=_ci(
            "github-workflow", "{{ .url }}/{{ .job_workflow_ref }}",
            {"url": "https://github.com", "environment": ""},
            BuildSignerURI="{{ .url }}/{{ .job_workflow_ref }}", RunnerEnvironment="runner_environment",
            SourceRepositoryURI="{{ .url }}/{{ .repository }}", SourceRepositoryRef="ref",
        ),
    ),
    # a name that Go writes otherwise than the claim has it
    "github-odd": Kind(
        _GITHUB | {"job_workflow_ref": "octo-org/octo-repo/.github/workflows/my build.yml@refs/heads/ü"},
        {"Type": "github-workflow"},
        lambda _: "https://github.com/octo-org/octo-repo/.github/workflows/my%20build.yml@refs/heads/%C3%BC",
    ),
    "gitlab": Kind(
        _GITLAB, {"Type": "gitlab-pipeline"}, lambda _: f"https://{_GITLAB['ci_config_ref_uri']}"
    ),
    "gitlab-ci": Kind(
        _GITLAB, {"Type": "ci-provider", "CIProvider": "gitlab-pipeline"},
        lambda _: f"https://{_GITLAB['ci_config_ref_uri']}",
        metadata=_ci(
            "gitlab-pipeline", "https://{{ .ci_config_ref_uri }}",
            {"url": "https://gitlab.com", "environment": ""},
            BuildSignerURI="https://{{ .ci_config_ref_uri }}", SourceRepositoryDigest="sha",
        ),
    ),
    "kubernetes": Kind(
        _KUBERNETES, {"Type": "kubernetes"},
        lambda _: "https://kubernetes.io/namespaces/ci/serviceaccounts/builder",
    ),
    "spiffe": Kind(
        {"sub": "spiffe://example.org/ns/ci/sa/builder"},
        {"Type": "spiffe", "SPIFFETrustDomain": "example.org"},
        lambda _: "spiffe://example.org/ns/ci/sa/builder",
    ),
    "uri": Kind(
        {"sub": "http://127.0.0.1/users/1"}, {"Type": "uri", "SubjectDomain": "http://127.0.0.1"},
        lambda _: "http://127.0.0.1/users/1",
    ),
    "buildkite": Kind(
        _BUILDKITE, {"Type": "buildkite-job"}, lambda _: "https://buildkite.com/acme-inc/super-duper-app"
    ),
    "codefresh": Kind(
        _CODEFRESH, {"Type": "codefresh-workflow"},
        lambda _: "https://g.codefresh.io/codefresh-inc/tests/build:628a80b693a15c0f9c13ab75"
        "/65e5a53e52853dc51a5b0cc1",
    ),
    "circleci": Kind(
        _CIRCLECI, {"Type": "ci-provider", "CIProvider": "circleci-job"},
        lambda _: "https://circleci.com/api/v2/projects/proj-1/pipeline-definitions/def-1",
        metadata=_ci(
            "circleci-job",
            '{{.api_url}}/projects/{{(index . "oidc.circleci.com/project-id")}}/pipeline-definitions'
            '/{{(index . "oidc.circleci.com/pipeline-definition-id")}}',
            {"api_url": "https://circleci.com/api/v2", "platform_url": "https://app.circleci.com/"},
        ),
    ),
    "chainguard": Kind(
        {"sub": "f7a3c0d2b1/8e9f", "act": {}}, {"Type": "chainguard-identity"},
        lambda url: f"{url}/f7a3c0d2b1/8e9f",
    ),
    # an issuer whose DER string needs a longer length
    "long" + "-long" * 40: Kind(_email(_EMAIL), {"Type": "email"}, lambda _: _EMAIL),
    # a CI system of somebody's own, whose name no program outside can know
    "own-ci": Kind(
        {"sub": "job:17", "pipeline": "release"}, {"Type": "ci-provider", "CIProvider": "own-ci"},
        lambda _: "https://ci.example.org/pipelines/release",
        metadata=_ci("own-ci", "https://ci.example.org/pipelines/{{ .pipeline }}", {}),
    ),
}  # fmt: skip

LONG = next(name for name in KINDS if name.startswith("long"))
#: Those whose certificates' names follow from their tokens.
KNOWN = [name for name in KINDS if name != "own-ci"]


def fulcio_config(urls: dict[str, str]) -> dict[str, Any]:
    """Fulcio's configuration of issuers, by each one's URL."""
    metadata: dict[str, Any] = {}
    issuers = {}
    for name, url in urls.items():
        kind = KINDS[name]
        issuers[url] = {"IssuerURL": url, "ClientID": "sigstore"} | kind.fulcio
        metadata |= kind.metadata
    assert all(urlsplit(url).hostname == "127.0.0.1" for url in urls.values())  # as `uri` has it
    return {"OIDCIssuers": issuers, "CIIssuerMetadata": metadata}
