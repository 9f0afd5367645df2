"""Keywords of the reference that have moved."""

from __future__ import annotations

import warnings
from typing import Any


def moved(old: str, value: Any, new: str, current: Any = None, stacklevel: int = 3) -> Any:
    """Take a keyword under its old name (None: not given), with a warning, at the caller's line, of the new one."""
    if value is None:
        return current
    warnings.warn(f"{old} has moved: use {new}", DeprecationWarning, stacklevel=stacklevel)
    return value
