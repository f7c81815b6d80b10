"""The flake under real Nix: files parse, package and module evaluate, the module's file is ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools.narseal import OPERATOR
from tests.tools.nix import Nix, nix

pytestmark = pytest.mark.real

PROJECT = Path(__file__).parent.parent.parent
# what the flake takes of nixpkgs, as far as evaluation goes
_STUB = """
{ outputs = { self }: let
    lib = import ./lib;
    packages = system: let
      make = name: more: derivation ({ inherit name system; builder = "/bin/sh"; args = [ "-c" "echo > $out" ]; } // more);
      pkgs = {
        inherit lib;
        stdenv.hostPlatform.system = system;
        callPackage = f: args: import f (builtins.intersectAttrs (builtins.functionArgs (import f)) pkgs // args);
        runCommand = name: env: script: make name (env // { args = [ "-c" script ]; });
        writeText = name: text: builtins.toFile name (builtins.unsafeDiscardStringContext text);
        mkShell = args: make "shell" { };
        python3Packages = lib.genAttrs (lib.splitString " " "hatchling aiofiles aiohttp aiosqlite alembic backports-zstd brotli click jinja2 prometheus-client pydantic pydantic-settings pynacl sqlalchemy urllib3 uvloop yarl") (name: name)
          // { buildPythonApplication = args: make "${args.pname}-${args.version}" { inherit (args) pname version; } // { meta = { }; }; };
      } // lib.genAttrs (lib.splitString " " "python3 uv cosign nginx wrk prometheus strace") (name: name);
    in pkgs;
  in { inherit lib; legacyPackages = lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] packages; };
}
"""


@pytest.fixture(scope="module")
def flake() -> Iterator[Nix]:
    """The project's tracked files in a scratch folder."""
    with nix() as client:
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=PROJECT, check=True,
            capture_output=True, text=True,
        ).stdout.split("\n")  # fmt: skip
        for name in filter(None, listed):
            target = client.folder / "project" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PROJECT / name, target)
        yield client


def test_every_nix_file_parses(flake: Nix) -> None:
    files = [flake.path("project/flake.nix")] + [
        flake.path(f"project/nix/{path.name}") for path in (PROJECT / "nix").glob("*.nix")
    ]
    assert len(files) == 5
    flake.run("nix-instantiate", "--parse", *files)


def test_the_package_takes_the_version_and_the_dependencies_of_the_project(flake: Nix) -> None:
    stub = (
        "let p = import ./project/nix/package.nix { lib = { licenses.asl20 = 1; platforms.linux = 1;"
        " fileset = { toSource = a: a; unions = a: a; }; }; python3Packages = rec {"
        " buildPythonApplication = a: a; " + " ".join(f'{name} = "{name}";' for name in ["hatchling", "aiofiles", "aiohttp", "aiosqlite", "alembic", "backports-zstd", "brotli", "click", "jinja2", "prometheus-client", "pydantic", "pydantic-settings", "pynacl", "rich", "sqlalchemy", "uvloop"]) + " }; }; in { inherit (p) version dependencies; }"
    )  # fmt: skip
    text = flake.script(f"nix-instantiate --eval --strict --json -E '{stub}'")
    import tomllib

    import narseal

    found = json.loads(text)
    assert found["version"] == narseal.__version__
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    wanted = {line.split(">")[0].split("[")[0] for line in project["dependencies"]}
    assert {
        name.replace("backports-zstd", "backports.zstd") for name in found["dependencies"]
    } == wanted


@pytest.mark.nixpkgs
def test_flake_check_and_the_modules_configuration(flake: Nix, tmp_path: Path) -> None:
    stub = flake.folder / "nixpkgs"
    shutil.copytree(Path(os.environ["NIXPKGS_LIB"]), stub / "lib")
    (stub / "flake.nix").write_text(_STUB)
    flake.run(
        "nix", "flake", "check", "--no-build", "--all-systems", "--offline",
        "--no-write-lock-file", "--override-input", "nixpkgs", f"path:{flake.path('nixpkgs')}",
        f"path:{flake.path('project')}",
    )  # fmt: skip
    text = json.loads(
        flake.run(
            "nix",
            "eval",
            "--json",
            "--offline",
            "--no-write-lock-file",
            "--override-input",
            "nixpkgs",
            f"path:{flake.path('nixpkgs')}",
            f"path:{flake.path('project')}#checks.x86_64-linux.module.settings",
        )
    )
    secret = tmp_path / "cache.example.org-1.secret"
    secret.write_text(OPERATOR.render())
    secret.chmod(0o600)
    file = tmp_path / "narseal.toml"
    file.write_text(text)
    checked = subprocess.run(
        [sys.executable, "-m", "narseal", "check-config", "--config", str(file)],
        env=os.environ | {"CREDENTIALS_DIRECTORY": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
