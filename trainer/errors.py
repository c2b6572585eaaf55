"""The two ways in which this program refuses to go on."""


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do about it."""


class DataError(UserError):
    """Damaged or inconsistent activation shards, manifests or checkpoints."""
