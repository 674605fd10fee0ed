"""What a user did that the program cannot work with, said in one sentence."""


class UserError(Exception):
    """Its message is one sentence that says what is wrong and what to do; programs print it and exit with code 1."""
