"""Optional dependencies, imported where they are used."""

from importlib import import_module
from types import ModuleType


def require(module_name: str, extra: str) -> ModuleType:
    """Import an optional module, or raise ImportError naming the extra that brings it."""
    try:
        return import_module(module_name)
    except ImportError as error:
        raise ImportError(
            f"this needs {module_name}, which could not be imported ({error}): "
            f'run pip install "palm-rlhf-pytorch[{extra}]".'
        ) from error
