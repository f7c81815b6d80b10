"""ClusterImagePolicies as rules: what asks for the same, and what is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from narseal.client.cluster_image_policy import translate
from narseal.config import Config
from narseal.cosign.keys import CosignKey
from narseal.errors import ConfigError
from tests.tools.command import narseal_command

PEM = CosignKey.generate().public.render()
HEAD = "apiVersion: policy.sigstore.dev/v1beta1\nkind: ClusterImagePolicy\nmetadata: {name: x}\n"


def policy(*authorities: object, **more: object) -> bytes:
    spec = {"images": [{"glob": "**"}], "authorities": list(authorities), **more}
    return (HEAD + yaml.safe_dump({"spec": spec})).encode()


def keyless(**more: object) -> dict[str, object]:
    identities = [{"issuer": "https://issuer", "subject": "ci@example.org"}]
    return {"keyless": {"identities": identities} | more}


def rule(text: str) -> dict[str, Any]:
    """The one rule of a configuration that is one."""
    [found] = Config.parse(text, environ={}).policy
    return found.model_dump(exclude_defaults=True)


def test_keyless_identity_with_attestations() -> None:
    kinds = [{"name": "a", "predicateType": "slsaprovenance1"},
             {"name": "b", "predicateType": "https://example.org/x"}]  # fmt: skip
    text = translate(policy({"name": "a", **keyless(), "attestations": kinds}), globs=["a-*", "b"])
    assert text.startswith("# from the ClusterImagePolicy x\n[[policy]]\n")
    who = {"require": "attestation", "issuer": "https://issuer", "identity": "ci@example.org"}
    assert rule(text) == {
        "match": ("a-*", "b"), "require": "all",
        "of": ({**who, "predicate_types": ("https://slsa.dev/provenance/v1",)},
               {**who, "predicate_types": ("https://example.org/x",)}),
    }  # fmt: skip


def test_authorities_and_identities_are_alternatives_and_policies_are_not() -> None:
    two = keyless(identities=[
        {"issuer": "https://issuer", "subjectRegExp": "https://x/.*"},
        {"issuer": "https://other", "subject": "b"},
    ])  # fmt: skip
    first = policy({"key": {"data": PEM}}, two)
    text = translate(first + b"---\n" + policy(keyless()), globs=["*"])
    found = rule(text)
    assert "identity_regex must match the whole name" in text
    assert found["require"] == "all"
    any_of, one = found["of"]
    assert (any_of["require"], len(any_of["of"])) == ("any", 2)
    assert any_of["of"][0]["cosign_key"] == PEM
    assert [p["issuer"] for p in any_of["of"][1]["of"]] == ["https://issuer", "https://other"]
    assert one["identity"] == "ci@example.org"


def test_a_policy_without_attestations_asks_for_a_signature() -> None:
    """F35: "signed by X" became any attestation of any type by X."""
    for item in (keyless(), {"key": {"data": PEM}}):
        text = translate(policy(item, mode="enforce"), globs=["*"])
        assert rule(text)["require"] == "cosign-signature"


def test_private_instance_is_named() -> None:
    item = keyless(url="https://fulcio.internal")
    text = translate(policy(item), globs=["*"], trust_config="/etc/root.json")
    assert rule(text)["trust_config"] == "/etc/root.json"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "0 documents"),
        (b"\xff\xfe\x00", "not YAML"),
        (b"a: [", "not YAML"),
        (b"x", "is no mapping"),
        (b"kind: Pod", "its kind is 'Pod'"),
        (HEAD.encode(), "spec is no mapping"),
        (policy(), "is no list"),
        (policy(keyless(), policy={"type": "cue"}), "spec.policy cannot be said"),
        (policy({"static": {"action": "pass"}}), "static cannot be said"),
        (policy({"key": {"kms": "gcpkms://x"}}), "kms cannot be said"),
        (policy({"key": {"data": "x"}}), "key.data"),
        (policy({"key": {"data": PEM, "hashAlgorithm": "sha512"}}), "only sha256"),
        (policy({"key": {"data": PEM}, **keyless()}), "exactly one of key and keyless"),
        (policy({"key": {"data": PEM}, "ctlog": {"url": "https://rekor"}}), "--trust-config"),
        (policy(keyless(url="https://fulcio.internal")), "--trust-config"),
        (policy({**keyless(), "ctlog": {"url": "https://rekor.internal"}}), "--trust-config"),
        (policy(keyless(), mode="warn"), "is enforced"),
        (policy(keyless(identities=[{"issuerRegExp": ".*", "subject": "x"}])),
         "issuerRegExp cannot be said"),
        (policy(keyless(identities=[{"issuer": "x"}])), "exactly one of subject"),
        (policy(keyless(identities=[{"issuer": "x", "subjectRegExp": "("}])), "subjectRegExp"),
        (policy(keyless(identities=[])), "is no list"),
        (policy({**keyless(), "attestations": [{"predicateType": "x"}]}), "neither a URI"),
        (policy({**keyless(), "attestations": [
            {"predicateType": "vuln", "policy": {"type": "cue", "data": "x"}}]}),
         "policy cannot be said"),
        (b"a: &a [*a]\n", "its kind"),
    ],
)  # fmt: skip
def test_what_cannot_be_said_is_an_error(data: bytes, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        translate(data, globs=["*"])
    assert sentence in str(caught.value)


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_bytes(policy(keyless()))
    done = narseal_command("policy", "import", file, "--match", "*-app-*")
    assert done.returncode == 0, done.stderr
    assert rule(done.stdout)["match"] == ("*-app-*",)
    file.write_bytes(b"kind: Pod")
    done = narseal_command("policy", "import", file, "--match", "*")
    assert (done.returncode, done.stdout) == (2, "")
    assert narseal_command("policy", "import", file).returncode == 2
