"""The one exception whose message is meant for a person: it names a file or a setting and says what to do."""


class UserError(ValueError):
    """Bad input. The command line prints the message alone and exits with code 2."""
