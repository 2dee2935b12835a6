"""The error a user can mend."""


class CapfiltError(Exception):
    """Report a mistake in the user's input: what is wrong, where, and the key or command that mends it.

    Raised before any work starts wherever that is possible. The command line prints the message alone
    and exits with 2. Takes one string, so that it survives the pickling that Ray does.
    """


class CorruptShardError(CapfiltError):
    """Report bytes on storage that differ from the record that committed them."""
