"""The documentation names every setting, command, metric and threat, and only tests that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from click import Group
from prometheus_client import REGISTRY
from pydantic import BaseModel

from narseal.cli import narseal
from narseal.config import Config
from narseal.config.signer import SignerConfig
from narseal.telemetry import metrics

PROJECT = Path(__file__).parent.parent.parent
OPERATING = (PROJECT / "docs/operating.md").read_text()
METRICS = (PROJECT / "docs/metrics.md").read_text()
SECURITY = (PROJECT / "docs/security.md").read_text()
#: Rows of the threat model that are built; each must have a test.
ROWS = [*(f"U{n}" for n in range(1, 13)), "C1", "C2", "C3", "C4", "C5", "C6", "C6d", "C6e", "C6f", "C7", "C8", "I1", "I2", "I3",
        "I4", "I5", "I6", "K1", "K2", "K3", "K4", "K5", "K6"]  # fmt: skip


def keys(model: type[BaseModel], within: tuple[type[BaseModel], ...] = ()) -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        inner = re.findall(r"narseal\.config(?:\.\w+)*\.(\w+)", repr(field.annotation))
        sections = [c for c in _models() if c.__name__ in inner and c not in within]
        if sections:
            found += [key for section in sections for key in keys(section, (*within, model))]
        else:
            found.append(name)
    return found


def _models() -> list[type[BaseModel]]:
    import narseal.config as module
    from narseal.config import signer

    return [
        value for value in (*vars(module).values(), *vars(signer).values())
        if isinstance(value, type) and issubclass(value, BaseModel)
    ]  # fmt: skip


def test_every_setting_is_documented() -> None:
    assert len(keys(Config)) > 35
    missing = [k for k in keys(Config) if f"`{k}`" not in OPERATING and f".{k}`" not in OPERATING]
    assert missing == []


def test_every_setting_of_the_signer_is_documented() -> None:
    text = (PROJECT / "docs/custody.md").read_text()
    assert [k for k in keys(SignerConfig) if f"`{k}`" not in text and f".{k}`" not in text] == []
    [block] = re.findall(r"^```toml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    SignerConfig.parse(block)


def commands(group: Group, prefix: str) -> list[str]:
    found = []
    for name, command in group.commands.items():
        if isinstance(command, Group):
            found += commands(command, f"{prefix} {name}")
        else:
            found.append(f"{prefix} {name}")
    return found


def test_every_command_is_documented() -> None:
    for command in commands(narseal, "narseal"):
        assert f"`{command}" in OPERATING, command


def test_every_metric_and_reason_is_documented() -> None:
    names = {
        metric.name + ("_total" if metric.type == "counter" else "")
        for metric in REGISTRY.collect()
        if metric.name.startswith(("narseal_", "sigstore_"))
    }
    assert len(names) > 12
    for name in [*names, *metrics.REASONS]:
        assert f"`{name}`" in METRICS, name


def test_every_reason_in_the_code_is_known_to_the_metrics() -> None:
    code = "\n".join(p.read_text() for p in (PROJECT / "proxy").rglob("*.py"))
    used = set(re.findall(r'(?:Refused|ContentMismatch)\(\s*"([a-z-]+)"', code))
    assert used <= set(metrics.REASONS)


@pytest.mark.parametrize("row", ROWS)
def test_every_threat_has_a_row_with_a_test(row: str) -> None:
    line = next((text for text in SECURITY.splitlines() if text.startswith(f"| {row} |")), "")
    assert "::test_" in line, f"docs/security.md has no row {row} with a test"


def test_every_test_that_the_documentation_names_exists() -> None:
    named = re.findall(r"`?(tests/[\w/]+\.py)::(test_\w+)", SECURITY)
    assert len(named) > 40
    for file, function in named:
        assert f"def {function}(" in (PROJECT / file).read_text(), f"{file}::{function}"


def test_every_module_that_the_architecture_names_exists() -> None:
    text = (PROJECT / "docs/architecture.md").read_text()
    named = set(re.findall(r"`((?:[a-z_]+/)+[a-z_0-9]+\.py)`", text))
    assert len(named) > 40
    for file in named:
        places = [PROJECT / file, *(PROJECT / "proxy/narseal").rglob(file)]
        assert any(place.exists() for place in places), file


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in [PROJECT / "README.md", *(PROJECT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}.md" for name in (
    "operating", "policy", "sigstore"))])  # fmt: skip
def test_every_configuration_in_the_documentation_is_one(page: str) -> None:
    blocks = re.findall(
        r"^```toml\n(.*?)^```", (PROJECT / page).read_text(), re.DOTALL | re.MULTILINE
    )
    assert blocks
    for block in blocks:
        whole = "[signing]\n" + block if block.startswith("[") else block
        Config.parse(whole, environ={}, source=page)


def test_examples_for_pipelines_are_yaml_and_their_rules_a_configuration() -> None:
    for name in ("github-actions.yml", "gitlab-ci.yml", "prometheus-rules.yml"):
        text = (PROJECT / "examples" / name).read_text()
        assert yaml.safe_load(text)
    text = (PROJECT / "examples/github-actions.yml").read_text()
    lines = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   ")]
    config = Config.parse("\n".join(lines), environ={})
    assert len(config.policy) == len(config.upload.oidc) == 1


def test_pipelines_install_narseal_and_give_nobody_more_than_he_needs() -> None:
    """F37: they never installed it, let the whole workflow be it, and named actions by tags."""
    tree = yaml.safe_load((PROJECT / "examples/github-actions.yml").read_text())
    assert tree["permissions"] == {}
    steps = [step for job in tree["jobs"].values() for step in job["steps"]]
    for step in steps:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step.get("uses", f"a/b@{'0' * 40}"))
    runs = [step.get("run", "") for step in steps]
    script = yaml.safe_load((PROJECT / "examples/gitlab-ci.yml").read_text())["cache"]["script"]
    for commands in (runs, script):
        [installs] = [n for n, text in enumerate(commands) if "$NARSEAL" in text]
        assert installs < min(n for n, text in enumerate(commands) if "narseal attest" in text)


def test_dashboard_asks_for_metrics_that_exist() -> None:
    board = json.loads((PROJECT / "examples/grafana-dashboard.json").read_text())
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\b(?:narseal|sigstore)_[a-z_]+", target["expr"])
    }
    known = {s.name for m in REGISTRY.collect() for s in m.samples} | {
        m.name + suffix
        for m in REGISTRY.collect()
        for suffix in ("", "_total", "_bucket", "_count", "_sum")
    }
    assert len(asked) > 10
    assert asked <= known
