"""Sources of paths."""

from narseal.config import UpstreamConfig
from narseal.upstream.file import FileUpstream
from narseal.upstream.http import HttpUpstream
from narseal.upstream.source import Body, Upstream

__all__ = ["Body", "FileUpstream", "HttpUpstream", "Upstream", "connect"]


def connect(config: UpstreamConfig, *, lookups: int = 256) -> Upstream:
    """The upstream of a configuration; inside a running loop."""
    if config.url.startswith("file:"):
        return FileUpstream(config)
    return HttpUpstream(config, lookups=lookups)
