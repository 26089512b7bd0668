"""The one error of this package."""

from msa_backend.config import MSAError


class InspectError(MSAError):
    """A checkpoint or a prompt cannot be inspected. The message is one sentence to act on."""
