"""nix-cache-info: what a binary cache says of itself."""

from __future__ import annotations

import re
from dataclasses import dataclass

from narseal.errors import MalformedCacheInfo

#: Of one that somebody brings.
MAX_BYTES = 64 << 10
_NUMBER = re.compile(r"-?[0-9]{1,9}", re.ASCII)


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """StoreDir, WantMassQuery and Priority (lower is asked first)."""

    store_dir: str
    want_mass_query: bool = False
    priority: int = 0

    @classmethod
    def parse(cls, text: str) -> CacheInfo:
        """Nix's reading: values trimmed, CRLF tolerated, unknown keys and other lines passed over."""
        fields: dict[str, str] = {}
        for line in text.split("\n"):
            key, colon, value = line.partition(":")
            if colon:
                fields[key] = value.strip(" \t\r")
        priority = fields.get("Priority", "0")
        if not _NUMBER.fullmatch(priority):
            raise MalformedCacheInfo(f"nix-cache-info: Priority is no integer: {priority[:40]!r}")
        return cls(
            fields.get("StoreDir", "/nix/store"), fields.get("WantMassQuery") == "1", int(priority)
        )

    def render(self) -> str:
        """The file's text."""
        mass_query = int(self.want_mass_query)
        return (
            f"StoreDir: {self.store_dir}\nWantMassQuery: {mass_query}\nPriority: {self.priority}\n"
        )
