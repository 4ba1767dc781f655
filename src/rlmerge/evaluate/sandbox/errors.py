"""What a user can get wrong about the sandbox."""

from __future__ import annotations

from ...errors import RlmergeError


class SandboxError(RlmergeError):
    """Model-written code cannot be run in isolation here."""
