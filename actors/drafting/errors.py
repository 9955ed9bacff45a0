"""What a drafter raises when it cannot serve one session. Never reaches a client: drafts are advice."""

from __future__ import annotations

from actors.drafting.interface import DraftErrorCode


class DrafterError(Exception):
    """`code` is what the wire carries. Concerns one session; the others of the call are not affected."""

    def __init__(self, code: DraftErrorCode, message: str) -> None:
        super().__init__(message)
        self.code: DraftErrorCode = code
        self.message = message

    def __reduce__(self) -> tuple[type[DrafterError], tuple[DraftErrorCode, str]]:
        return type(self), (self.code, self.message)
