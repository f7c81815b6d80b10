"""Fuzz one parser until it breaks or time is over: `python -m tests.fuzz.one TARGET FOLDER SECONDS`.

libFuzzer's own exit codes: 77 after a finding, whose input is FOLDER/found-….
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["narseal"]):
    from tests.fuzz.targets import TARGETS


def main(name: str, folder: Path, seconds: str) -> None:
    """Does not return."""
    target = TARGETS[name]
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup(
        [sys.argv[0], str(corpus), f"-max_total_time={seconds}", f"-artifact_prefix={folder}/found-",
         "-max_len=65536", "-timeout=60", "-rss_limit_mb=2048", "-print_final_stats=1"],
        target.run,
    )  # fmt: skip
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
