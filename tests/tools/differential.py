"""What real Nix reads out of a narinfo."""

from __future__ import annotations

import json

from tests.tools.cache import entry, store_path
from tests.tools.narseal import UPSTREAM
from tests.tools.nix import Nix

ITEM = entry("item", references=(store_path("dep"),)).signed(UPSTREAM)


def read_by_nix(client: Nix, texts: list[bytes]) -> list[dict[str, object] | None]:
    """What `nix path-info` makes of each, None where it gives up; one cache folder for each."""
    hash_part = ITEM.hash
    for number, text in enumerate(texts):
        cache = client.folder / f"c{number}"
        cache.mkdir(exist_ok=True)
        (cache / "nix-cache-info").write_text("StoreDir: /nix/store\n")
        (cache / f"{hash_part}.narinfo").write_bytes(text)
    client.forget()
    path = ITEM.info.store_path.full("/nix/store")
    script = (
        f"for n in $(seq 0 {len(texts) - 1}); do printf '='; timeout 120 nix path-info --json --json-format 1"
        f" --store file://{client.path('.')}/c$n {path} 2>/dev/null | head -c 100000 | tr -d '\\n';"
        " echo; done"
    )
    answers = client.script(script.replace("set -e;", "") + "; true").split("\n")
    assert len(answers) == len(texts)
    found: list[dict[str, object] | None] = []
    for answer in answers:
        tree = json.loads(answer[1:]) if answer[1:] else {}
        value = next(iter(tree.values()), None)
        if value:
            value = {k: v for k, v in value.items() if k not in ("url", "registrationTime")}
        found.append(value)
    return found
