"""What a user is told when something is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from msa_backend.config import MSAError


def sentence(call: Callable[..., Any], *args: Any, error: type[MSAError] = MSAError, **options: Any) -> str:
    """The one sentence with which ``call(*args, **options)`` is refused."""
    with pytest.raises(error) as refused:
        call(*args, **options)
    message = str(refused.value)
    assert "\n" not in message
    return message
