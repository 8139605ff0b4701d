"""The one exception whose message is meant for a person: it names a file or a setting and says what to do."""


class UserError(ValueError):
    """Bad input. The command line prints the message alone and exits with code 2."""


class RunInterrupted(KeyboardInterrupt):
    """A run was asked to stop and saved itself; the message says where.

    Attributes:
        exit_code: what the command line exits with: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
