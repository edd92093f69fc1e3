"""Who may call the server."""

import hashlib
import hmac
from collections.abc import Sequence


class Tokens:
    """Bearer tokens, kept as their digests; without any, everybody may."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(token.encode()).digest() for token in tokens]

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
