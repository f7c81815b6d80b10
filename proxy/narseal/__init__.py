"""narseal: a proxy in front of Nix binary caches that verifies what it serves and countersigns it."""

__version__ = "0.1.0"
