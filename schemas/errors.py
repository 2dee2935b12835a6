"""The error a user can mend."""


class CapfiltError(Exception):
    """Report a mistake in the user's input: what is wrong, where, and the key or command that mends it.

    Raised before any work starts wherever that is possible. The command line prints the message alone
    and exits with 2. Takes one string, so that it survives the pickling that Ray does.
    """


class NotFiniteError(CapfiltError):
    """Report that a model computed NaN or infinity from weights and inputs that are finite.

    It computes the same at every try: a stage quarantines the shard, and an evaluation ends.
    """


class CorruptShardError(CapfiltError):
    """Report bytes on storage that differ from the record that committed them."""
