"""Two runs of these tests beside each other take nothing from one another."""

from __future__ import annotations

import subprocess
import sys
from urllib.request import urlopen

import pytest

from tests.tools.ports import free_ports
from tests.tools.sigstore import sigstore

pytestmark = pytest.mark.real


def test_two_sigstores_run_beside_each_other() -> None:
    with sigstore() as one, sigstore() as other:
        for instance in (one, other):
            with urlopen(f"{instance.tsa.url}/ping") as response:
                assert response.status == 200


def test_a_port_that_one_run_took_is_not_given_to_another() -> None:
    mine = set(free_ports(200))
    code = "from tests.tools.ports import free_ports; print(*free_ports(2000))"
    theirs = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not mine & set(map(int, theirs))
