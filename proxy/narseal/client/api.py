"""Asking a running narseal, as its commands do: leaving attestations, reading the status of paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import requests

from narseal import __version__
from narseal.custody import expand, read_private
from narseal.errors import BadUpload, NotFound, UpstreamTrouble

_TIMEOUT = 60.0


def leave(url: str, digest: bytes, bundle: bytes, *, token_file: Path | None) -> bool:
    """PUT an attestation; whether it is new there. Without a token file, the netrc is asked.

    BadUpload, with the sentence of the other side, if it is not taken; UpstreamTrouble if it
    cannot be brought. Blocks.
    """
    headers = {"User-Agent": f"narseal/{__version__}"}
    if token_file:
        headers["Authorization"] = f"Bearer {read_private(Path(expand(str(token_file)))).strip()}"
    address = f"{url.rstrip('/')}/attestations/sha256:{digest.hex()}"
    answer = _ask("PUT", address, data=bundle, headers=headers)
    return answer.status_code == requests.codes.created


def status(url: str, path: str | None) -> dict[str, Any]:
    """What a narseal knows of a store path, or of itself; NotFound, BadUpload or UpstreamTrouble. Blocks."""
    tree = _ask("GET", f"{url.rstrip('/')}/status{f'/{path}' if path else ''}").json()
    if not isinstance(tree, dict):
        raise UpstreamTrouble(f"{url} is no narseal: its status of {path} is no object")
    return tree


def _ask(method: str, address: str, **options: Any) -> requests.Response:
    try:
        answer = requests.request(method, address, timeout=_TIMEOUT, **options)
    except (requests.RequestException, ValueError) as error:
        raise UpstreamTrouble(f"{address}: {_reason(error)}") from error
    sentence = " ".join(answer.text[:500].split())
    if answer.status_code == requests.codes.not_found:
        raise NotFound(f"{address}: 404: {sentence}")
    if method == "PUT" and answer.status_code == requests.codes.method_not_allowed:
        raise BadUpload(
            f"{address}: 405: that narseal takes no attestations; its operator says in a [[policy]] that"
            " asks for some, or in [[attestations.accept]], who may leave them"
        )
    if 400 <= answer.status_code < 500:
        raise BadUpload(f"{address}: {answer.status_code}: {sentence}")
    if not answer.ok:
        raise UpstreamTrouble(f"{address}: {answer.status_code}: {sentence}")
    return answer


def _reason(error: BaseException) -> str:
    """Why there was no answer: requests says it in a sentence of several libraries."""
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, OSError) and cause.strerror:
            return f"nobody answers there: {cause.strerror}"
        cause = cause.__cause__ or cause.__context__
    return str(error)
