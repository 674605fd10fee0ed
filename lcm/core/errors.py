"""Errors whose message a user can act on."""


class UserError(Exception):
    """Wrong input. The message says what is wrong and what to do. Programs print it and exit with code 1."""

    def __init__(self, message: str) -> None:
        # A DataLoader re-raises a worker's error with the traceback in its message. Only the sentence is wanted.
        kind = type(self).__name__
        if message.startswith(f"Caught {kind} in DataLoader worker"):
            message = message.rpartition(f"\nlcm.core.errors.{kind}: ")[2]
        super().__init__(message.strip())


class NonFiniteError(UserError):
    """Images, latents or features hold NaN or infinite values."""
