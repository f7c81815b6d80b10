"""Other projects' caches, as they come, where NCPS and HARMONIA name their binaries."""

from __future__ import annotations

import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from narseal.custody import write_private
from tests.bench.closures import copy
from tests.bench.servers import ALL_CORES, HARMONIA, HOST, HOST_KEY, NCPS, served
from tests.tools.cache import key
from tests.tools.nix import nix
from tests.tools.ports import free_ports

_KEY = key("harmonia-1")


@dataclass(frozen=True)
class Peer:
    """One that runs: where, by what key it signs, as which process."""

    url: str
    public_key: str
    pid: int


@contextmanager
def ncps(folder: Path, known: str, cores: set[int] = ALL_CORES) -> Iterator[Peer | None]:
    """ncps in front of HOST, which has a path of this hash; it verifies and signs. None without NCPS.

    That path is in it when this begins, and nothing else is.
    """
    if not NCPS:
        yield None
        return
    (folder / "storage").mkdir(parents=True)
    [port] = free_ports(1)
    database = f"--cache-database-url=sqlite:{folder}/db.sqlite"
    subprocess.run([NCPS, "migrate", "up", database], check=True, capture_output=True)
    command = [
        NCPS, "--analytics-reporting-enabled=false", "serve", database,
        "--cache-hostname=ncps", f"--cache-storage-local={folder}/storage",
        f"--cache-temp-path={folder}", f"--server-addr=127.0.0.1:{port}",
        f"--cache-upstream-url=http://{HOST}", f"--cache-upstream-public-key={HOST_KEY.public}",
    ]  # fmt: skip
    with served(command, port, cores, folder / "log") as pid:
        url = f"http://127.0.0.1:{port}"
        for _ in range(100):  # 404 until it found, behind its start, that its upstream is well
            with suppress(urllib.error.HTTPError):
                urllib.request.urlopen(f"{url}/{known}.narinfo").read()
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"ncps finds no upstream: {(folder / 'log').read_text()[-4000:]}")
        yield Peer(url, urllib.request.urlopen(f"{url}/pubkey").read().decode().strip(), pid)


@contextmanager
def harmonia(url: str, path: str, cores: set[int] = ALL_CORES) -> Iterator[Peer | None]:
    """harmonia on a store that has a path's closure, from an address; it signs. None without HARMONIA."""
    if not HARMONIA:
        yield None
        return
    with nix() as owner:
        owner.config["trusted-public-keys"] = str(HOST_KEY.public)
        copy(owner, url, path)
        write_private(owner.folder / "secret", _KEY.render())
        [port] = free_ports(1)
        config = owner.folder / "harmonia.toml"
        config.write_text(
            f'bind = "127.0.0.1:{port}"\nreal_nix_store = "{owner.folder}/store/nix/store"\n'
            f'sign_key_paths = ["{owner.folder}/secret"]\n'
        )
        with served([HARMONIA], port, cores, owner.folder / "log", CONFIG_FILE=str(config)) as pid:
            yield Peer(f"http://127.0.0.1:{port}", str(_KEY.public), pid)
