"""The cryptography of masks, all of it from the `cryptography` package.

X25519 agrees on a secret, HKDF-SHA256 makes a key of it for each purpose, ChaCha20-Poly1305 seals shares from one client
to another through the server, AES-256 in counter mode stretches a key into a mask. Keys live for one attempt at one round.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from atoll.privacy.ring import Ring, Words

KEY_BYTES = 32


@dataclass(frozen=True)
class KeyPair:
    """A key of one attempt at a round."""

    private: bytes

    @cached_property
    def public(self) -> bytes:
        """32 bytes."""
        return self._key.public_key().public_bytes_raw()

    @cached_property
    def _key(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self.private)

    def agree(self, public: bytes, purpose: str) -> bytes:
        """The key that both ends share for a purpose. Raises ValueError for a public key that is none."""
        if public not in self._agreed:
            self._agreed[public] = self._key.exchange(X25519PublicKey.from_public_bytes(public))
        return derive(self._agreed[public], purpose)

    @cached_property
    def _agreed(self) -> dict[bytes, bytes]:
        """Secrets by the other end's public key: an agreement takes a tenth of a millisecond."""
        return {}


def new_key() -> KeyPair:
    """From the operating system."""
    return KeyPair(X25519PrivateKey.generate().private_bytes_raw())


def derive(secret: bytes, purpose: str) -> bytes:
    """A key of its own for each purpose."""
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=b"atoll/" + purpose.encode()).derive(secret)


def seal(key: bytes, text: bytes, about: str) -> bytes:
    """Encrypts and authenticates. The nonce is zero: a key seals one text and no more."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), text, about.encode())


def unseal(key: bytes, sealed: bytes, about: str) -> bytes:
    """Back from `seal`. Raises ValueError for what was sealed by another key, for something else, or was changed."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, about.encode())
    except InvalidTag as error:
        raise ValueError(f"sealed shares cannot be opened: {about}") from error


def mask(seed: bytes, count: int, ring: Ring) -> Words:
    """`count` words that nobody can tell from uniform without the seed of 32 bytes; all of its bits are used."""
    stream = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor()
    words: Words = np.frombuffer(stream.update(bytes(count * ring.word.itemsize)), ring.word)
    return words
