"""What an operator mistypes: it is refused aloud, before anything rests on it."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from narseal.custody import tokens
from tests.tools.command import narseal_command
from tests.tools.narseal import narseal, render_toml, settings
from tests.tools.upstream import FakeCache

UPSTREAM = {"url": "http://127.0.0.1:9"}


def configuration(folder: Path, *upstreams: dict[str, Any], **more: Any) -> Path:
    file = folder / "narseal.toml"
    file.write_text(render_toml(settings(folder, *(upstreams or (UPSTREAM,)), **more)))
    return file


def refused(sentence: str, *words: str | Path, **environment: Any) -> None:
    done = narseal_command(*words, **environment)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


MATCH_NOTHING = [
    ("/nix/store/*-app-1.0", "names have no slash"),
    ("0c5b8vw40dy178xlpddw65q9gf1h2186-app", "leave it out"),
    ("????????????????????????????????-app", "leave it out"),
    ("", "matches no name"),
    ("app-*,lib-*", "give several globs"),
    ("app lib", "give several globs"),
    ("äpp", "matches no name"),
    ("app-[0-9", "matches no name"),
    ("app:*", "matches no name"),
]


@pytest.mark.parametrize(("glob", "sentence"), MATCH_NOTHING)
def test_a_glob_that_no_name_matches_is_refused_wherever_one_is_given(
    glob: str, sentence: str, tmp_path: Path
) -> None:
    file = configuration(tmp_path)
    rule = {"match": ["app", glob], "action": "deny"}
    oidc = {"issuer": "https://ci.example", "audience": "a", "identity": "b", "allow": [glob]}
    for variable, value in (("NARSEAL_POLICY", [rule]), ("NARSEAL_UPLOAD", {"oidc": [oidc]})):
        refused(sentence, "check-config", "--config", file, **{variable: json.dumps(value)})
    there = tmp_path / "tokens"
    refused(sentence, "token", "add", "ci", "--allow", glob, "--tokens-file", there)
    assert not there.exists()
    signer = tmp_path / "signer.toml"
    signer.write_text(
        f"content = [{json.dumps(glob, ensure_ascii=False)}]\n[audit]\nlog = '/x'\nkey = 'file:/x'"
    )
    refused(sentence, "signer", "--check", "--config", signer)


@pytest.mark.parametrize(
    ("before", "behind", "decides"),
    [
        (["*"], ["app-*"], False),
        (["a*", "app-1"], ["app-1"], False),
        (["*-app-*"], ["my-app-*", "x-app-?"], False),
        (["*-app-*"], ["my-app-*", "other"], True),
        (["*"], ["[ab]-*"], False),
        (["*-app-*"], ["my-app-[0-9]*"], True),  # not plain, either
        (["a?"], ["a*"], True),
        (["a?"], ["a?"], False),
        (["[ab]"], ["a"], True),  # not plain: said to decide, though it does not
        (["app-*"], ["*"], True),
        (["app-*"], ["App-1"], True),
    ],
)
def test_a_rule_behind_one_that_matches_all_of_it_is_refused(
    before: list[str], behind: list[str], decides: bool, tmp_path: Path
) -> None:
    file = configuration(tmp_path)
    rules = [{"match": before, "action": "allow"}, {"match": behind, "action": "deny"}]
    words = ("check-config", "--config", file)
    if decides:
        done = narseal_command(*words, NARSEAL_POLICY=json.dumps(rules))
        assert done.returncode == 0, done.stderr
    else:
        refused("policy[1]", *words, NARSEAL_POLICY=json.dumps(rules))
        refused("put the narrower rule first", *words, NARSEAL_POLICY=json.dumps(rules))


def test_an_empty_list_of_predicate_types_is_refused(tmp_path: Path) -> None:
    file = configuration(tmp_path)
    who = {"identity": "x", "issuer": "https://y", "predicate_types": []}
    rule = {"match": "*", "require": "attestation"} | who
    for variable, value in (
        ("NARSEAL_POLICY", [rule]),
        ("NARSEAL_POLICY", [{"match": "*", "require": "any", "of": [{"require": "attestation"} | who]}]),
        ("NARSEAL_ATTESTATIONS", {"accept": [who]}),
    ):  # fmt: skip
        sentence = "leave it out for any type"
        refused(sentence, "check-config", "--config", file, **{variable: json.dumps(value)})


@pytest.mark.parametrize(
    ("begins", "ends", "sentence"),
    [
        ("2028-01-01T00:00:00Z", "2027-01-01T00:00:00Z", "it never signs"),
        ("2028-01-01T00:00:00Z", "2028-01-01T01:00:00+01:00", "it never signs"),
        ("2028-01-01T00:00:00", "2029-01-01T00:00:00Z", "timezone"),
    ],
)
def test_a_key_that_ends_before_it_begins_is_refused(
    begins: str, ends: str, sentence: str, tmp_path: Path
) -> None:
    file = configuration(tmp_path)
    signing = {"key": [{"url": "file:/x", "not_before": begins, "not_after": ends}]}
    refused(sentence, "check-config", "--config", file, NARSEAL_SIGNING=json.dumps(signing))


@pytest.mark.parametrize("name", ["netrc_file", "headers_file", "tls"])
def test_a_secret_that_everybody_can_read_is_refused(name: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("machine 127.0.0.1 login x password y\n")
    secret.chmod(0o644)
    if name == "tls":
        file = configuration(tmp_path, tls={"certificate": str(secret), "key": str(secret)})
    else:
        file = configuration(tmp_path, UPSTREAM | {name: str(secret)})
    refused("lets everybody read it; chmod o=", "check-config", "--config", file)
    refused("lets everybody read it; chmod o=", "serve", "--config", file)
    secret.chmod(0o640)
    done = narseal_command("check-config", "--config", file)
    assert "read it" not in done.stderr


def test_a_wrong_variable_is_named_and_not_the_file(tmp_path: Path) -> None:
    file = configuration(tmp_path, limits={"nar_size": "5G"})
    words = ("check-config", "--config", file)
    refused("NARSEAL_LIMITS__NAR_SIZE: limits.nar_size: not a size", *words,
            NARSEAL_LIMITS__NAR_SIZE="7Q")  # fmt: skip
    refused("NARSEAL_POLICY: policy[0]", *words, NARSEAL_POLICY='[{"match": "*"}]')


def test_check_config_says_that_uploads_are_off(tmp_path: Path) -> None:
    oidc = {"issuer": "https://ci.example", "audience": "a", "identity": "b", "allow": ["*"]}
    file = configuration(tmp_path, upload={"oidc": [oidc]})
    done = narseal_command("check-config", "--config", file)
    assert done.returncode == 0
    assert "uploads      off" in done.stdout and "upload.enabled" in done.stdout


@pytest.mark.parametrize("name", ["", " ", "a b", "a\tb", "ä", "x" * 101])
def test_a_token_needs_a_name_that_a_netrc_can_have(name: str, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    refused("NAME is", "token", "add", name, "--allow", "*", "--tokens-file", file)
    assert not file.exists()


def test_a_token_that_has_ended_already_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    refused("at least a day", "token", "add", "ci", "--allow", "*", "--expires", "0d",
            "--tokens-file", file)  # fmt: skip
    assert not file.exists()


def test_two_tokens_of_one_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    words = ("token", "add", "ci", "--allow", "*", "--tokens-file", file)
    done = narseal_command(*words)
    assert done.returncode == 0
    secret = done.stdout.strip()
    assert secret not in done.stderr  # it stands in one place
    refused("token revoke ci", *words)
    [there] = tokens.listed(file)
    assert tokens.Tokens(file).check(secret, now=time.time()) == there


async def test_a_name_that_no_key_here_has_is_not_revoked(
    tmp_path: Path, upstream: FakeCache
) -> None:
    there = {"url": upstream.url}
    async with narseal(tmp_path, there):
        pass  # makes the index
    file = configuration(tmp_path, there)
    words = ("--reason", "stolen", "--config", file)
    done = narseal_command("revoke", "operator-l", *words)
    assert done.returncode == 2
    assert "no key is called operator-l; there are: operator-1, upstream-1" in done.stderr
    assert "--unknown" in done.stderr
    for name in ("operator-l", "upstream-1", "operator-1"):
        done = narseal_command("revoke", name, "--unknown", *words)
        assert done.returncode == 0, done.stderr
    for name in ("operator-l", "upstream-1", "operator-1"):  # again: they are known now
        done = narseal_command("revoke", name, *words)
        assert done.returncode == 0, done.stderr


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    sentence = f"there is no folder {gone}; make it first"
    refused(sentence, "key", "generate", "cache-1", "-o", gone / "key")
    refused(sentence, "token", "add", "ci", "--allow", "*", "--tokens-file", gone / "tokens")
    file = configuration(tmp_path)
    refused("is there already, and stays: name another", "key", "generate", "cache-1", "-o", file)


def test_check_config_warns_of_what_is_hardly_meant(tmp_path: Path) -> None:
    upload = {"enabled": True, "tokens_file": str(tmp_path / "tokens")}
    cosign = {"mode": "keyless", "identity_token_env": "NO_SUCH_TOKEN"}
    file = configuration(tmp_path, upload=upload, cosign=cosign, policy_default="deny")
    done = narseal_command("check-config", "--config", file)
    assert done.returncode == 0, done.stderr
    assert f"narseal token add NAME --allow '*' --tokens-file {tmp_path}/tokens" in done.stdout
    assert "cosign.identity_token_env: NO_SUCH_TOKEN is not set here" in done.stdout
    assert "nothing is served" in done.stdout
    key = {"url": f"file:{tmp_path}/operator.secret", "not_after": datetime(2020, 1, 1, tzinfo=UTC)}
    file = configuration(tmp_path, signing={"key": [key]})
    done = narseal_command("check-config", "--config", file)
    assert done.returncode == 0
    assert "no [[signing.key]] is active now" in done.stdout
    tokens.add(tmp_path / "tokens", "ci", allow=("*",), expires=None)
    policy = [{"match": "*", "action": "allow"}]
    file = configuration(tmp_path, upload=upload, policy=policy, policy_default="deny")
    assert "warning" not in narseal_command("check-config", "--config", file).stdout


def test_a_variable_that_is_no_json_says_what_it_may_be(tmp_path: Path) -> None:
    words = ("check-config", "--config", configuration(tmp_path))
    sentence = """NARSEAL_UPSTREAM: not JSON. A list or section of the environment is, as"""
    refused(sentence, *words, NARSEAL_UPSTREAM="https://cache.nixos.org")


def test_an_address_where_nobody_listens_is_named(tmp_path: Path) -> None:
    done = narseal_command("status", "--from", "http://127.0.0.1:9")
    assert done.returncode == 3
    assert (
        done.stderr
        == "narseal: http://127.0.0.1:9/status: nobody answers there: Connection refused\n"
    )
