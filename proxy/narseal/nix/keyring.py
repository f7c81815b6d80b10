"""Who signed this message: the one place where signatures are held to public keys."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from narseal.nix.keys import PublicKey, Signature

#: Bad signatures after which no more are tried for a message.
MAX_FAILURES = 8


@dataclass(frozen=True, slots=True, eq=False)
class KeyRing:
    """Public keys by name; several may have the same name. A ring is equal to itself alone."""

    _keys: Mapping[str, tuple[PublicKey, ...]]

    @classmethod
    def of(cls, *groups: Iterable[PublicKey]) -> KeyRing:
        """A ring of all keys of some groups."""
        keys: dict[str, tuple[PublicKey, ...]] = {}
        for key in (key for group in groups for key in group):
            if key not in keys.get(key.name, ()):
                keys[key.name] = (*keys.get(key.name, ()), key)
        return cls(keys)

    def without(self, revoked: Collection[str]) -> KeyRing:
        """The same ring less the keys of some names."""
        if not revoked or not any(name in revoked for name in self._keys):
            return self
        return KeyRing({name: keys for name, keys in self._keys.items() if name not in revoked})

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def __bool__(self) -> bool:
        return bool(self._keys)

    @property
    def keys(self) -> Iterable[PublicKey]:
        """All of them."""
        return (key for keys in self._keys.values() for key in keys)

    @property
    def names(self) -> Collection[str]:
        """Of all keys."""
        return self._keys.keys()

    def verified(self, message: bytes, signatures: Iterable[Signature]) -> tuple[Signature, ...]:
        """Those of the signatures that are by a key of this ring, in their order.

        None are tried beyond MAX_FAILURES that bear a name of the ring and are not good.
        """
        return tuple(self._good(message, signatures))

    def each_verified(
        self, message: bytes, signatures: Iterable[Signature]
    ) -> frozenset[Signature]:
        """The same, however many bad ones are among them: of those that a row has, which are few."""
        return frozenset(s for s in signatures if self.verified(message, [s]))

    def signer(self, message: bytes, signatures: Iterable[Signature]) -> str | None:
        """The name of the first key of this ring that signed the message, None if none did."""
        return next((s.key_name for s in self._good(message, signatures)), None)

    def kept(
        self,
        message: bytes,
        signatures: Iterable[Signature],
        *,
        most: int,
        good: Collection[Signature] = (),
    ) -> tuple[Signature, ...]:
        """The signatures that are worth keeping, at most `most`, in order.

        What bears a name of this ring is kept only if it verifies, or is among the `good` ones that did;
        of the others nobody here can tell, and they are kept as they came.
        """
        found = tuple(dict.fromkeys(signatures))
        more = self.verified(message, [s for s in found if s not in good])
        good = [s for s in found if s in good or s in more]
        strangers = [signature for signature in found if signature.key_name not in self]
        return tuple(sorted([*good, *strangers[: max(0, most - len(good))]]))

    def _good(self, message: bytes, signatures: Iterable[Signature]) -> Iterator[Signature]:
        failures = 0
        for signature in signatures:
            for key in self._keys.get(signature.key_name, ()):
                if failures == MAX_FAILURES:
                    return
                if key.verifies(message, signature):
                    yield signature
                    break
                failures += 1
