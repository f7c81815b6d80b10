"""Errors of ours as answers."""

from __future__ import annotations

import logging

from aiohttp import web

from narseal.errors import NarsealError, NotYet, Unauthorised

_log = logging.getLogger(__name__)


def fault(what: str) -> web.Response:
    """The exception that is being handled is a fault of ours: the client gets a 500, the log the rest."""
    _log.exception("%s failed", what)
    return web.Response(status=500, text="narseal failed; its log says how\n")


def failure(error: NarsealError) -> web.Response:
    """An error as Nix shows it: status, one sentence, the reason in a header."""
    headers = {"Cache-Control": "no-store", "X-Narseal-Reason": error.reason}
    if isinstance(error, Unauthorised):
        headers["WWW-Authenticate"] = 'Basic realm="narseal"'
    if isinstance(error, NotYet):
        headers["Retry-After"] = str(error.retry_after)
    elif error.status in (502, 503, 504, 507):
        headers["Retry-After"] = "5"
    # it may quote a header field, whose bytes need not be text
    sentence = " ".join(str(error).split())[:900].encode("ascii", "backslashreplace").decode()
    return web.Response(status=error.status, text=sentence + "\n", headers=headers)
