"""Every error that narseal raises: one tree, each with an HTTP status, a metric label and a sentence.

NarsealError
├── ConfigError                 the operator's configuration or key files are wrong
├── Malformed                   text or bytes that break a format
│   ├── MalformedHash, MalformedStorePath, MalformedKey, MalformedContentAddress
│   ├── MalformedNarInfo        (line, field)
│   ├── MalformedNar            (offset)
│   ├── MalformedRealisation
│   ├── MalformedAttestation    (bundles, statements)
│   └── MalformedCacheInfo
├── Refused                     understood, and not to be served
│   └── ContentMismatch         the bytes are not what the narinfo says
├── Denied                      verified, and the operator's policy keeps it back
├── NotFound                    confirmed absence
│   └── NotYet                  it will be there
├── BadUpload                   an upload that is not taken
│   └── UploadTooLarge, UploadConflict, Forbidden
├── Unauthorised                no good token
└── Trouble                     not known: the outside world failed
    ├── UpstreamTrouble, UpstreamTimeout
    └── Unavailable             narseal itself cannot now
        ├── StorageFull
        ├── StorageBroken       a stored file cannot be read, or is not what was verified
        ├── TokensUnusable      the tokens file cannot be read, or is none
        ├── IndexGone           the index is not the file any more that was opened
        └── StorageGone         the storage folder is not the one that the index is of
"""

from __future__ import annotations

import json
from typing import ClassVar


class NarsealError(Exception):
    """Root of the tree. `str(error)` is a sentence for the operator."""

    #: HTTP status that the server answers with.
    status: ClassVar[int] = 500
    #: Exit code of a command that ends with this error.
    exit_code: ClassVar[int] = 1
    #: Value of the `reason` label of `narseal_rejected_total` and of the reason header.
    reason: str = "internal"


class ConfigError(NarsealError):
    """The configuration, a key file or a credential cannot be used as it is."""

    exit_code = 2
    reason = "config"


def cannot_make(file: object, error: OSError) -> ConfigError:
    """Why a file cannot be made or written, for the operator: mostly its folder is not there."""
    if isinstance(error, FileNotFoundError):
        return ConfigError(
            f"{file}: there is no folder {str(file).rpartition('/')[0]}; make it first"
        )
    return ConfigError(f"{file}: cannot be written: {error.strerror}")


class NoIndex(NarsealError):
    """A command is about what is in the index, and there is none."""

    reason = "no-index"


class Malformed(NarsealError, ValueError):
    """Input that does not follow its format; nothing of it was used."""

    status = 404
    reason = "malformed"


class MalformedHash(Malformed):
    """A hash in none of Nix's spellings."""


class MalformedStorePath(Malformed):
    """A store path whose hash part or name Nix would not accept."""


class MalformedKey(Malformed):
    """A key or signature that is not `name:base64`."""


class MalformedContentAddress(Malformed):
    """A `CA` field that Nix would not accept."""


class MalformedCacheInfo(Malformed):
    """A nix-cache-info that Nix would not accept."""


class MalformedRealisation(Malformed):
    """A realisation (`.doi`) in neither of the two spellings."""


class MalformedAttestation(Malformed):
    """A Sigstore bundle or in-toto statement that cannot be read."""


class MalformedNarInfo(Malformed):
    """A narinfo that breaks the grammar; knows the line (from 1) and the field."""

    def __init__(self, message: str, *, line: int = 0, field: str = "") -> None:
        where = f"line {line}" + (f", {field}" if field else "") if line else field
        super().__init__(f"narinfo {where}: {message}" if where else f"narinfo: {message}")
        self.line = line
        self.field = field


class MalformedNar(Malformed):
    """A NAR that breaks the grammar at a byte offset."""

    reason = "malformed-nar"

    def __init__(self, message: str, *, offset: int) -> None:
        super().__init__(f"NAR, byte {offset}: {message}")
        self.offset = offset


class Refused(NarsealError):
    """Verified and found wanting. Nix sees 404 and goes on to its next substituter."""

    status = 404

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ContentMismatch(Refused):
    """A NAR whose bytes are not what its narinfo says."""


class Denied(NarsealError):
    """A path that does not have what the operator's policy asks of it. Nix goes on as with 404."""

    status = 403
    reason = "policy"


class NotFound(NarsealError):
    """Nobody has it, and everybody could be asked."""

    status = 404
    reason = "absent"


class NotYet(NotFound):
    """It is not there now, and will be."""

    reason = "waiting"

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        #: Seconds.
        self.retry_after = retry_after


class BadUpload(NarsealError):
    """An upload that is not what it says, or comes too early; nothing of it is served."""

    status = 422
    reason = "bad-upload"


class UploadTooLarge(BadUpload):
    """A body beyond its bound."""

    status = 413


class UploadTooSlow(BadUpload):
    """A body that stalls, or only drips."""

    status = 408
    reason = "upload-too-slow"


class UploadConflict(BadUpload):
    """Something else is there under the same name, and nothing is overwritten."""

    status = 409


class Forbidden(BadUpload):
    """A good token that does not cover it."""

    status = 403


class Unauthorised(NarsealError):
    """No good token."""

    status = 401
    reason = "unauthorised"


class Trouble(NarsealError):
    """It is not known whether the thing exists: never answered as 404."""

    status = 503
    exit_code = 3
    reason = "unavailable"


class UpstreamTrouble(Trouble):
    """An upstream refused the connection, broke it, or answered 5xx or an auth failure."""

    status = 502
    reason = "upstream"


class UpstreamTimeout(UpstreamTrouble):
    """An upstream did not answer in time."""

    status = 504
    reason = "upstream-timeout"


class UpstreamTooSlow(UpstreamTimeout):
    """An upstream drips: it holds a connection and brings less than `limits.least_rate`."""

    reason = "upstream-too-slow"


class Unavailable(Trouble):
    """narseal itself cannot do it now: index, disk or a limit; a later try can succeed."""


class StorageFull(Unavailable):
    """No room for a new file; what is stored is served on."""

    status = 507
    reason = "storage-full"


class StorageBroken(Unavailable):
    """A stored file cannot be read, or is not what was verified when it was stored."""

    reason = "storage"

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        #: `unreadable` or `wrong-content`, of `narseal_storage_errors_total`.
        self.kind = kind


class TokensUnusable(Unavailable):
    """The tokens file cannot be read, or is none: whose token is good is not known."""

    reason = "tokens-file"


class IndexGone(Unavailable):
    """The index was deleted or replaced while it was in use: pins and revocations are not known."""

    reason = "index-gone"


class StorageGone(Unavailable):
    """The storage folder is not there, or not the index's: what it holds is not known."""

    reason = "storage-gone"


#: Those that one worker may tell another: what is known of the outside world, and nothing of the worker itself.
_TOLD: dict[str, type[NarsealError]] = {
    kind.__name__: kind
    for kind in (
        NotFound,
        Refused,
        ContentMismatch,
        Malformed,
        Denied,
        UpstreamTrouble,
        UpstreamTimeout,
        UpstreamTooSlow,
    )
}


def told(error: NarsealError, *, most: int) -> bytes | None:
    """An error for `heard`, in at most so many bytes; None if it is nobody else's."""
    kind = Malformed if isinstance(error, Malformed) else type(error)
    if kind.__name__ not in _TOLD:
        return None
    text = str(error)
    while True:
        said = json.dumps([kind.__name__, error.reason, text]).encode()
        if len(said) <= most:
            return said
        text = text[: len(text) * 3 // 4 - 1] + "…"


def heard(said: bytes) -> NarsealError | None:
    """The error that was told."""
    try:
        name, reason, text = json.loads(said)
    except ValueError:
        return None
    kind = _TOLD[name]
    error = kind(reason, text) if issubclass(kind, Refused) else kind(text)
    error.reason = reason
    return error
