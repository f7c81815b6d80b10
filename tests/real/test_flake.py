"""The flake under real Nix: files parse, package and module evaluate, the module's file is ours."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import narseal
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
        python3Packages = lib.genAttrs (lib.splitString " " "@packages@") (name: name)
          // { buildPythonApplication = args: make "${args.pname}-${args.version}" { inherit (args) pname version; } // { meta = { }; }; };
      } // lib.genAttrs (lib.splitString " " "python3 uv cosign nginx wrk prometheus strace") (name: name);
    in pkgs;
  in { inherit lib; legacyPackages = lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] packages; };
}
"""


def dependencies() -> set[str]:
    """Those of pyproject.toml, as nixpkgs names them."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[>\[;]", line)[0].strip() for line in project["dependencies"]}
    return {name.replace(".", "-") for name in names}


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
        " fileset = { toSource = a: a; unions = a: a; }; }; python3Packages = {"
        " buildPythonApplication = a: a; "
        + " ".join(f'{name} = "{name}";' for name in ["hatchling", *dependencies()])
        + " }; }; in { inherit (p) version dependencies; }"
    )
    text = flake.script(f"nix-instantiate --eval --strict --json -E '{stub}'")
    found = json.loads(text)
    assert found["version"] == narseal.__version__
    assert set(found["dependencies"]) == dependencies()


@pytest.mark.nixpkgs
def test_flake_check_and_the_modules_configuration(flake: Nix, tmp_path: Path) -> None:
    stub = flake.folder / "nixpkgs"
    shutil.copytree(Path(os.environ["NIXPKGS_LIB"]), stub / "lib")
    packages = " ".join(["hatchling", *sorted(dependencies())])
    (stub / "flake.nix").write_text(_STUB.replace("@packages@", packages))
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
