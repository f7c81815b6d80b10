"""Listening sockets: shared by the workers of one narseal, and by nobody else."""

from __future__ import annotations

import pytest

from narseal.errors import ConfigError
from narseal.runtime.sockets import listen


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_an_address_is_of_one_narseal(host: str) -> None:
    sockets = listen(f"{host}:0", 2)
    port = sockets[0][0].getsockname()[1]
    try:
        assert [found.getsockname()[1] for [found] in sockets] == [port, port]
        with pytest.raises(ConfigError, match=r"in use"):
            listen(f"{host}:{port}", 1)
    finally:
        for [found] in sockets:
            found.close()
    for [found] in listen(f"{host}:{port}", 1):
        found.close()
