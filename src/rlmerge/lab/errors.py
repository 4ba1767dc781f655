"""The lab's errors."""

from rlmerge.errors import RlmergeError


class LabError(RlmergeError):
    """A training run that cannot be made as asked."""
