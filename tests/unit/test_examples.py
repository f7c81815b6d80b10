"""`make serve` begins: what examples/serve.py makes is a cache that is signed as it says."""

from __future__ import annotations

import runpy
from pathlib import Path

from narseal.nix.keys import PublicKey
from narseal.nix.narinfo import NarInfo

SERVE = Path(__file__).parent.parent.parent / "examples" / "serve.py"


def test_the_sample_cache_is_signed_by_the_key_that_goes_with_it(tmp_path: Path) -> None:
    url, key, path = runpy.run_path(str(SERVE))["sample_cache"](tmp_path)
    assert url == f"file://{tmp_path}"
    infos = [NarInfo.parse(file.read_bytes()) for file in tmp_path.glob("*.narinfo")]
    assert path in {info.store_path for info in infos}
    assert sorted(len(info.references) for info in infos) == [0, 1]
    for info in infos:
        [signature] = info.signatures
        assert PublicKey.parse(key).verifies(info.fingerprint(), signature)
        assert (tmp_path / info.url).is_file()
