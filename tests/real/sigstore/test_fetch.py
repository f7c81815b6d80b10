"""Release files for those who do not use Nix: `narseal fetch`, and install.sh with cosign alone."""

from __future__ import annotations

import functools
import io
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.real.sigstore.conftest import IDENTITY, Signed
from tests.tools import debian
from tests.tools.command import narseal_command
from tests.tools.cosign import Cosign
from tests.tools.sigstore import Sigstore

pytestmark = pytest.mark.real


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def released(instance: Sigstore, cosign: Cosign) -> Iterator[tuple[str, Path]]:
    """A web server with a signed archive; its URL and its folder."""
    folder = cosign.folder / "release"
    folder.mkdir()
    with tarfile.open(folder / "app.tar.gz", "w:gz") as archive:
        script = b"#!/bin/sh\necho it runs\n"
        member = tarfile.TarInfo("bin/app")
        member.size, member.mode = len(script), 0o755
        archive.addfile(member, io.BytesIO(script))
    made = narseal_command(
        "sign", folder / "app.tar.gz", "--keyless", "--trust-config", instance.trust_config_file,
        "--identity-token-env", "TOKEN", TOKEN=instance.issuer.token(IDENTITY),
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    handler = functools.partial(_Quiet, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder
    server.shutdown()
    server.server_close()


def test_fetch_names_only_what_verifies(
    released: tuple[str, Path], instance: Sigstore, signed: Signed, tmp_path: Path
) -> None:
    url, folder = released

    def fetch(*more: str | Path, who: str = IDENTITY) -> subprocess.CompletedProcess[str]:
        return narseal_command(
            "fetch", f"{url}/app.tar.gz", "--identity", who, "--issuer", instance.issuer.url,
            "--trusted-root", instance.trusted_root_file, *more, cwd=tmp_path,
        )  # fmt: skip

    assert fetch().returncode == 0
    assert (tmp_path / "app.tar.gz").read_bytes() == (folder / "app.tar.gz").read_bytes()
    assert fetch().returncode == 2  # it is there
    assert fetch("--force").returncode == 0
    (tmp_path / "app.tar.gz").unlink()
    # another identity, another digest, too large, no bundle, no file
    assert fetch(who="eve@example.org").returncode == 1
    assert fetch("--max-size", "10").returncode == 1
    assert fetch("--bundle-url", f"{url}/none").returncode == 1
    good = (folder / "app.tar.gz").read_bytes()
    (folder / "app.tar.gz").write_bytes(good + b"x")
    assert fetch().returncode == 1
    shutil.rmtree(folder)
    assert fetch().returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_install_script_runs_nothing_before_it_is_verified(
    released: tuple[str, Path], instance: Sigstore, cosign: Cosign
) -> None:
    url, folder = released
    script = cosign.folder / "install.sh"
    shutil.copy("examples/install.sh", script)

    def install(who: str, prefix: str) -> subprocess.CompletedProcess[str]:
        environment = [
            f"BASE={url}", "FILE=app.tar.gz", f"IDENTITY={who}", f"ISSUER={instance.issuer.url}",
            f"TRUSTED_ROOT={cosign.path(instance.trusted_root_file)}",
            f"PREFIX={cosign.path(cosign.folder / prefix)}", f"HOME={cosign.path(cosign.folder)}",
        ]  # fmt: skip
        if not debian.has_nix_on_path():
            environment.append("PATH=/usr/local/bin:/usr/bin:/bin")
        words = ["/usr/bin/env", *environment, "sh", cosign.path(script)]
        return subprocess.run(debian.command(words), capture_output=True, text=True, timeout=60)

    assert install("eve@example.org", "evil").returncode != 0
    assert not (cosign.folder / "evil").exists()
    result = install(IDENTITY, "good")
    assert result.returncode == 0, result.stderr
    assert (
        subprocess.run([cosign.folder / "good/bin/app"], capture_output=True).stdout == b"it runs\n"
    )
    (folder / "app.tar.gz").write_bytes((folder / "app.tar.gz").read_bytes() + b"x")
    assert install(IDENTITY, "changed").returncode != 0
    assert not (cosign.folder / "changed").exists()
