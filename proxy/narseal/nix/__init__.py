"""Pure: formats and signatures of Nix. No I/O, no clock, no async."""
