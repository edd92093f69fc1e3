"""Who may call the server."""

import hashlib
import hmac
from collections.abc import Iterable
from typing import Self


class Tokens:
    """Bearer tokens, kept as their digests; without any, everybody may."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(token.encode()).digest() for token in tokens]

    @classmethod
    def of_digests(cls, digests: Iterable[str]) -> Self:
        """Those whose ``digests`` these are: what a process is told that must not know the tokens."""
        made = cls(())
        made._digests = [bytes.fromhex(digest) for digest in digests]
        return made

    @property
    def digests(self) -> tuple[str, ...]:
        """sha256 of each, in hex."""
        return tuple(digest.hex() for digest in self._digests)

    @property
    def are_needed(self) -> bool:
        """Whether not everybody may."""
        return bool(self._digests)

    def admit(self, authorization: bytes) -> bool:
        """Whether the header ``authorization`` has one of them; the time that takes tells nothing of them."""
        kind, _, token = authorization.partition(b" ")
        digest, known = hashlib.sha256(token.strip()).digest(), not self._digests
        for one in self._digests:
            known |= hmac.compare_digest(digest, one) and kind.lower() == b"bearer"
        return known
