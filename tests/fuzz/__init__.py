"""Fuzzing: `make fuzz MINUTES=n`.

Every parser of what comes from outside (targets.py) is driven by atheris, guided by coverage; the
sockets of narseal and of its signer (sockets.py) and real Nix beside ours (differential.py) by
mutations of good input. What breaks a rule is kept below tests/vectors/fuzz, and `make test` runs
it for ever after (tests/unit/test_fuzz_corpus.py, tests/faults/test_fuzzed_sockets.py).
"""
