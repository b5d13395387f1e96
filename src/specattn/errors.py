"""The few errors that specattn raises on purpose.

Every message names the value that was refused, the limit, and what to do about it.
"""


class SpecAttnError(Exception):
    """A run that could not be completed. The command line exits with status 1."""

    exit_code = 1


class UsageError(SpecAttnError, ValueError):
    """Input that cannot be right: refused before any work. The command line exits with status 2."""

    exit_code = 2


class CacheFullError(SpecAttnError):
    """A request whose KV cache does not fit in the pool or in the memory that is left."""
