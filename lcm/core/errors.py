"""What a user did that the program cannot work with, said in one sentence."""


class UserError(Exception):
    """Its message is one sentence that says what is wrong and what to do; programs print it and exit with code 1."""

    def __init__(self, message: str) -> None:
        # A DataLoader raises a worker's error again with the worker's traceback in the message: keep the sentence.
        kind = type(self).__name__
        if message.startswith(f"Caught {kind} in DataLoader worker"):
            message = message.rpartition(f"\nlcm.core.errors.{kind}: ")[2]
        super().__init__(message.strip())


class NonFiniteError(UserError):
    """Images, latents or features hold NaN or infinite values."""
