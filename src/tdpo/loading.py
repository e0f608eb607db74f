"""Loads what users name as ``module:name``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from tdpo.errors import UserError


def load_object(path: str, option: str) -> Any:
    """Imports a module, from the working directory too, and returns the object of that name in it.

    Args:
        path: ``module:name``.
        option: What the user gave the path to, for messages.

    Raises:
        UserError: if there is no such module or object, or the module fails to import.
    """
    module_name, _, name = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise UserError(f"{option} {path}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise UserError(f"{option} {path}: {module.__file__} has no {name}")
    return getattr(module, name)
