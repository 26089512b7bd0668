"""The one error of this package."""


class TinyCheckpointError(RuntimeError):
    """A tiny checkpoint cannot be written. The message is one sentence a user can act on."""
