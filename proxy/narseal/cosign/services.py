"""A Sigstore instance's services, as narseal uses them: each answer in time, or an error.

They block. What they answer is held to the trusted root by `narseal.cosign.sign`, not here.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import requests
from requests import PreparedRequest, Response
from requests.adapters import HTTPAdapter
from sigstore._internal.fulcio.client import FulcioClientError
from sigstore._internal.rekor.checkpoint import LogCheckpoint, SignedNote
from sigstore._internal.timestamp import TimestampError
from sigstore.errors import Error as SigstoreError
from sigstore.models import SigningConfig

from narseal.cosign import tiles
from narseal.cosign.trust import Trust
from narseal.errors import ConfigError, NarsealError, Refused, UpstreamTrouble

_HEADERS = {"Accept": "application/json"}
#: The header in which Rekor v2 says where the log has an entry already.
_INDEX = "X-Log-Index"


class Log:
    """Rekor v2 and the timestamp authorities."""

    def __init__(self, trust: Trust, timeout: float) -> None:
        """ConfigError if the instance names no log of version 2."""
        services = services_of(trust)
        urls = [service.url for service in services._tlogs if service.major_api_version == 2]  # noqa: SLF001
        if not urls:
            raise ConfigError("the Sigstore instance names no transparency log of version 2")
        self._url = urls[0].rstrip("/")
        self._trust = trust
        self._authorities = services.get_tsas()
        self._session = requests.Session()
        self._session.headers.update(_HEADERS)
        bound(self._session, timeout)

    def timestamps(self, signature: bytes) -> tuple[bytes, ...]:
        """A timestamp by each authority; UpstreamTrouble if one gives none."""
        with translated():
            return tuple(a.request_timestamp(signature).as_bytes() for a in self._authorities)

    def enter(self, digest: bytes, signature: bytes, verifier: dict[str, Any]) -> dict[str, Any]:
        """The log's entry of a signature, as a bundle has it; made only if it is not there yet.

        `verifier` names the key or the certificate. Refused if the log will never take
        it, UpstreamTrouble if it may later.
        """
        request: dict[str, Any] = {
            "hashedRekordRequestV002": {
                "digest": _base64(digest),
                "signature": {"content": _base64(signature), "verifier": verifier},
            }
        }
        with translated():
            answer = self._session.post(f"{self._url}/api/v2/log/entries", json=request)
            if answer.status_code == requests.codes.conflict and _INDEX in answer.headers:
                return self._look_up(int(answer.headers[_INDEX]))
            if answer.status_code in (requests.codes.bad_request, requests.codes.unprocessable):
                raise Refused("bad-bundle", f"the log refuses the entry: {answer.text[:300]}")
            answer.raise_for_status()
            found = answer.json()
            if not isinstance(found, dict):
                raise TypeError("the log's answer is no entry")
            return found

    def _look_up(self, index: int) -> dict[str, Any]:
        """An entry whose first answer did not arrive, with its proof from the log's tiles."""
        note = self._read("checkpoint").decode()
        checkpoint = LogCheckpoint.from_text(SignedNote.from_text(note).note)
        size = checkpoint.log_size
        return {
            "logIndex": str(index),
            "logId": {"keyId": _base64(self._log_id())},
            "kindVersion": {"kind": "hashedrekord", "version": "0.0.2"},
            "inclusionProof": {
                "logIndex": str(index),
                "rootHash": _base64(bytes.fromhex(checkpoint.log_hash)),
                "treeSize": str(size),
                "hashes": [_base64(h) for h in tiles.inclusion_proof(self._read, index, size)],
                "checkpoint": {"envelope": note},
            },
            "canonicalizedBody": _base64(tiles.entry(self._read, index, size)),
        }

    def _log_id(self) -> bytes:
        """The log's id in the trusted root."""
        for log in self._trust.root._inner.tlogs:  # noqa: SLF001
            if log.base_url.rstrip("/") == self._url:
                return log.log_id.key_id
        raise ValueError(f"the trusted root has no log at {self._url}")

    def _read(self, name: str) -> bytes:
        answer = self._session.get(f"{self._url}/api/v2/{name}")
        answer.raise_for_status()
        return answer.content


class _Bounded(HTTPAdapter):
    def __init__(self, timeout: float) -> None:
        super().__init__()
        self._timeout = timeout

    def send(
        self,
        request: PreparedRequest,
        stream: bool = False,  # noqa: FBT001, FBT002 (as the supertype has it)
        timeout: Any = None,
        verify: Any = True,  # noqa: FBT002
        cert: Any = None,
        proxies: Any = None,
    ) -> Response:
        """With our timeout where the caller gave none."""
        timeout = timeout or self._timeout
        return super().send(request, stream, timeout, verify, cert, proxies)


def bound(session: requests.Session, timeout: float) -> None:
    """Let no request of a session, which sigstore-python or we make, wait for ever."""
    session.mount("http://", _Bounded(timeout))
    session.mount("https://", _Bounded(timeout))


def services_of(trust: Trust) -> SigningConfig:
    """The services of an instance; ConfigError if only its roots are known."""
    if trust.services is None:
        raise ConfigError(
            "the file is a trusted root, which is enough to verify; to sign into a log, give a"
            " client trust config, which also names the services"
        )
    return trust.services


@contextmanager
def translated() -> Iterator[None]:
    """What may go wrong with services, as UpstreamTrouble."""
    try:
        yield
    except NarsealError:
        raise
    except (
        requests.RequestException,
        FulcioClientError,
        TimestampError,
        SigstoreError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        text = str(error) or str(error.__cause__ or "") or type(error).__name__
        raise UpstreamTrouble(f"a Sigstore service fails: {text[:500]}") from error


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
