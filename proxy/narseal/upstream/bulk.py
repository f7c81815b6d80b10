"""NARs over HTTP, read by a thread of their own.

The thread that reads also hashes and writes, while the bytes are still in its core's cache: that
is worth a third of a relay's time against chunks that are handed from the loop to a thread.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import Timeout
from urllib3.util.connection import create_connection
from yarl import URL

from narseal import __version__
from narseal.config import UpstreamConfig
from narseal.errors import NotFound, UpstreamTimeout, UpstreamTrouble
from narseal.upstream.addresses import public_addresses
from narseal.upstream.redirects import ABSENT, HOPS, REDIRECTS, Reach, next_hop
from narseal.upstream.source import Body

_CONNECTIONS = 64


class Bulk:
    """Large bodies from one upstream. Its methods block; any thread may call them."""

    def __init__(self, config: UpstreamConfig, reach: Reach) -> None:
        self._reach = reach
        self._own = _pools(config)
        self._foreign = _pools(config)
        self._foreign.pool_classes_by_scheme = {"http": _PublicPool, "https": _PublicTlsPool}

    @contextmanager
    def open(self, url: str, offset: int) -> Iterator[Body]:
        """The body behind `url` and its redirects, from a byte on.

        Raises NotFound, UpstreamTrouble or UpstreamTimeout, also while it is read.
        """
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        with _translated(url):
            response = self._follow(URL(url, encoded=True), headers)
            try:
                if response.status in ABSENT:
                    raise NotFound(f"{url}: {response.status}")
                if offset and response.status == 200:
                    # it knows no Range: what is here already comes again, and is passed over
                    yield Body(_length(response), _beyond(offset, response.read1, url))
                    return
                if response.status != (206 if offset else 200):
                    raise UpstreamTrouble(f"{url}: {response.status} {response.reason or ''}")
                yield Body(_whole_size(response, offset, url), response.read1)
            finally:
                if response.length_remaining:
                    response.close()  # what is left is not worth reading
                response.release_conn()

    def close(self) -> None:
        """Let go of idle connections."""
        self._own.clear()
        self._foreign.clear()

    def _follow(self, url: URL, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        for _ in range(HOPS + 1):
            pools = self._own if self._reach.is_trusted(url) else self._foreign
            response = pools.request(
                "GET",
                str(url),
                headers=headers | self._reach.credentials(url) | _HEADERS,
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=False,
            )
            if response.status not in REDIRECTS:
                return response
            location = response.headers.get("Location", "")
            response.drain_conn()
            response.release_conn()
            url = next_hop(url, location)
        raise UpstreamTrouble(f"{url}: more than {HOPS} redirects")


_HEADERS = {"Accept-Encoding": "identity", "User-Agent": f"narseal/{__version__}"}


def _pools(config: UpstreamConfig) -> urllib3.PoolManager:
    return urllib3.PoolManager(
        num_pools=8,
        maxsize=_CONNECTIONS,
        timeout=Timeout(connect=config.connect_timeout, read=config.stall_timeout),
    )


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """urllib3's errors as ours."""
    try:
        yield
    except urllib3.exceptions.NewConnectionError as error:  # a ConnectTimeoutError to urllib3
        raise UpstreamTrouble(f"{url}: {error}") from error
    except (urllib3.exceptions.ReadTimeoutError, urllib3.exceptions.ConnectTimeoutError) as error:
        raise UpstreamTimeout(f"{url}: the upstream stalls") from error
    except (urllib3.exceptions.HTTPError, UnicodeError) as error:
        raise UpstreamTrouble(f"{url}: {type(error).__name__}: {error}") from error


class _Public(HTTPConnection):
    """A connection to a public address: the host is resolved once, and only what was checked is asked.

    `host` stays the name, for the certificate and the Host header.
    """

    def _new_conn(self) -> socket.socket:
        failure: OSError = OSError("it has no address")
        try:
            for address in public_addresses(self.host, self.port or self.default_port):
                try:
                    return create_connection(
                        address, self.timeout, socket_options=self.socket_options
                    )
                except OSError as error:
                    failure = error
        except OSError as error:
            raise urllib3.exceptions.NewConnectionError(self, str(error)) from error
        if isinstance(failure, TimeoutError):
            raise urllib3.exceptions.ConnectTimeoutError(self, str(failure)) from failure
        raise urllib3.exceptions.NewConnectionError(self, str(failure)) from failure


class _PublicTls(_Public, HTTPSConnection):
    pass


class _PublicPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Public


class _PublicTlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _PublicTls


def _length(response: urllib3.BaseHTTPResponse) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isascii() and length.isdigit() else None


def _beyond(offset: int, read: Callable[[int], bytes], url: str) -> Callable[[int], bytes]:
    """`read`, once the first `offset` bytes were read and dropped."""
    left = offset

    def read_beyond(size: int) -> bytes:
        nonlocal left
        while left:
            passed = read(min(left, size))
            if not passed:
                raise UpstreamTrouble(
                    f"{url}: ended before byte {offset}, where it broke off before"
                )
            left -= len(passed)
        return read(size)

    return read_beyond


def _whole_size(response: urllib3.BaseHTTPResponse, offset: int, url: str) -> int | None:
    if not offset:
        return _length(response)
    content_range = response.headers.get("Content-Range", "")
    unit, _, rest = content_range.partition(" ")
    span, _, size = rest.partition("/")
    if unit != "bytes" or span.partition("-")[0] != str(offset):
        raise UpstreamTrouble(f"{url}: asked from byte {offset}, got {content_range[:80]!r}")
    return int(size) if size.isascii() and size.isdigit() else None
