"""Handing out Sigstore signatures: of a file, of a digest, and the keys to verify them with."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_der_x509_certificate

from narseal.cosign.bundle import Bundle
from narseal.errors import NotFound, NotYet
from narseal.nix.hashes import Hash
from narseal.nix.store_path import StorePath
from narseal.pipeline.services import Services
from narseal.pipeline.trust.policy import content_digests
from narseal.runtime.files import OpenFile
from narseal.storage import Admitted, Attestation, bundle_name

#: Paths with the same content that one question may have policy judge.
_MOST_JUDGED = 500


class Signatures:
    """What is known of files and digests. NotFound, or NotYet while a path waits; Denied by policy."""

    def __init__(self, services: Services) -> None:
        self._sigstore = services.sigstore
        self._countersigner = services.countersigner
        self._policy = services.policy
        self._epoch = services.epoch
        self._index = services.index
        self._attestations = services.index.attestations
        self._folder = services.folder
        self._threads = services.threads

    async def bundle_of(self, file: str) -> bytes | OpenFile:
        """A file's own signature if it has one, else the batch that covers it, which may be large."""
        absence = await self._absence(file, f"nar/{file}")
        single, batch = await self._epoch.unless_withdrawn(lambda: self._of_file(file))
        if single is not None:
            return single
        if batch is not None and (found := await self._open(batch)) is not None:
            return found
        raise absence

    async def signature_of(self, file: str) -> bytes:
        """A file's own signature in base64, as older cosign takes it."""
        bundle = await self._single(file)
        return signature_text(bundle)

    async def certificate_of(self, file: str) -> bytes:
        """The PEM certificate of a file's own keyless signature."""
        bundle = await self._single(file)
        if bundle.certificate is None:
            raise NotFound(f"nar/{file} is signed with a key: verify with /cosign.pub")
        return certificate_pem(bundle.certificate)

    async def attestations_of(self, digest: Hash) -> list[bytes]:
        """The names, for `bundles`, of all whose statements cover a file's or a NAR's SHA-256.

        What others say of it goes where its NAR goes; what we said of a path, only while the path
        is admitted and policy lets it through. Where more paths share it than anybody is to have
        judged by one question, what we said of the others is found by their paths.
        """
        absence = await self._absence(f"{digest.nix32}.nar", f"sha256:{digest.digest.hex()}")
        subjects = frozenset((digest.digest,))

        async def find() -> list[bytes]:
            if not self._policy.active:  # as many paths as may share an empty file
                ours = await self._attestations.ours_of(subjects)
                return await self._names(ours, subjects)
            found = await self._attestations.sharing(subjects, most=_MOST_JUDGED)
            ours = await self._ours(found)
            return await self._names(ours, subjects)

        if not (names := await self._epoch.unless_withdrawn(find)):
            raise absence
        return names

    async def attestations_of_path(self, store_path: StorePath) -> list[bytes]:
        """The names of all that others say of a path's NAR or file, and we of the path."""

        async def find() -> list[bytes]:
            found = await self._index.path(store_path.hash_part)
            if found is None or found[0].info.store_path != store_path:
                return []
            return await self._names(
                await self._ours([found]), content_digests(found[0].info, found[1])
            )

        if not (names := await self._epoch.unless_withdrawn(find)):
            raise NotFound(f"there is no attestation of {store_path}")
        return names

    async def bundles(self, names: Iterable[bytes]) -> AsyncIterator[OpenFile]:
        """The bundles of these names, one after another."""
        for name in names:
            if (file := await self._open(name)) is not None:
                yield file

    def public_key(self) -> str:
        """The cosign.pub; NotFound if signatures are not by key."""
        if self._sigstore.key is None:
            raise NotFound("files are not signed with a cosign key here")
        return self._sigstore.key.public.render()

    def trusted_root(self) -> bytes:
        """The trusted root of a private Sigstore instance."""
        if (root := self._sigstore.trusted_root) is None:
            raise NotFound("no private Sigstore instance is used here; cosign knows the public one")
        return root

    async def keys(self) -> dict[str, Any]:
        """Every public key, for people and programs; revoked ones by name, with the reason."""
        revoked = await self._index.revocations.now()
        substituter = self._countersigner.ring.without(revoked.keys).keys
        key = self._sigstore.key
        if key and key.public.hint in revoked.cosign_keys:
            key = None
        return {
            "substituter": [str(key) for key in substituter],
            "revoked": [
                {"kind": r.kind, "name": r.name, "issuer": r.issuer, "reason": r.reason}
                for r in revoked.all
            ],
            "cosign": {
                "mode": self._sigstore.config.mode,
                "publicKey": key.public.render() if key else None,
                "hint": key.public.hint if key else None,
                "trustedRoot": json.loads(self._sigstore.trusted_root or b"null"),
            },
        }

    async def paths(self, *, after: str, limit: int) -> list[str]:
        """Hash parts of the paths that are served, in order."""
        return await self._attestations.paths(after=after, limit=limit)

    async def _single(self, file: str) -> Bundle:
        absence = await self._absence(file, f"nar/{file}")
        single, batch = await self._epoch.unless_withdrawn(lambda: self._of_file(file))
        if single is not None:
            return Bundle.parse(single)
        if batch is not None:
            raise NotFound(f"nar/{file} has no signature of its own, but one of its batch")
        raise absence

    async def _of_file(self, file: str) -> tuple[bytes | None, bytes | None]:
        """A file's own signature, and the name of the newest batch over a path of it.

        Neither, if no path of it is admitted that policy lets through.
        """
        if not self._policy.active:
            ours = await self._attestations.ours_of_file(file)
        elif served := await self._served(await self._index.paths_of(file)):
            ours = await self._attestations.ours(served)
        else:
            return None, None
        return await self._attestations.single(file), ours[-1].digest if ours else None

    async def _served(self, found: Iterable[Admitted]) -> list[str]:
        """The hash parts of those that are admitted, and that policy lets through."""
        return [
            path.info.store_path.hash_part
            for path, nar in found
            if not path.withdrawn
            and await self._policy.passes(path.info, content_digests(path.info, nar))
        ]

    async def _ours(self, found: list[Admitted]) -> list[Attestation]:
        """What we said of those of some paths that are served; Denied if policy keeps back all."""
        await self._policy.check_any(found)
        return await self._attestations.ours(await self._served(found))

    async def _names(self, ours: list[Attestation], digests: frozenset[bytes]) -> list[bytes]:
        """The names of what we said, and of all that others say of some digests."""
        said = [*await self._attestations.covering(*digests), *ours]
        said.sort(key=lambda attestation: (attestation.made_at, attestation.digest))
        names = dict.fromkeys(attestation.digest for attestation in said)
        return await self._threads.run(self._present, list(names))

    def _present(self, names: list[bytes]) -> list[bytes]:
        """In a thread."""
        return [name for name in names if not self._folder.local.lacks(bundle_name(name))]

    async def _open(self, name: bytes) -> OpenFile | None:
        return await self._folder.file(bundle_name(name))

    async def _absence(self, name: str, thing: str) -> NotFound:
        """What to say if nothing is found; made before one looks, for it may be signed meanwhile."""
        if await self._attestations.is_withdrawn(name):
            return NotFound(
                f"the path of {thing} was withdrawn: what was signed of it is given out when it is"
                " admitted anew, which asking for its narinfo tries"
            )
        config = self._sigstore.config
        seconds = max(1, round(config.batch_max_age))
        nar = await self._index.nar(name)  # first: a path waits from the moment its NAR is stored
        if await self._attestations.is_waiting(name):
            return NotYet(f"{thing} waits for its signature", retry_after=seconds)
        if nar is not None and not nar.stored and config.mode != "off":
            return NotYet(
                f"{thing} was not fetched and verified yet: ask for it first", retry_after=seconds
            )
        return NotFound(f"there is no signature of {thing}")


def signature_text(bundle: Bundle) -> bytes:
    """A signature in base64, as `cosign verify-blob --signature` takes it."""
    return base64.b64encode(bundle.content.signature) + b"\n"


def certificate_pem(certificate: bytes) -> bytes:
    """A DER certificate as PEM, as `cosign verify-blob --certificate` takes it."""
    return load_der_x509_certificate(certificate).public_bytes(Encoding.PEM)
