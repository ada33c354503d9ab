"""Errors meant for a person: the command line prints the message and exits with code 2."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UserError(Exception):
    """Something the user can fix. The message names the file and key, what was found, what was wanted, what to do."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known word, or the list of known words."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(known)}." if known else ""


def require_extra(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Raises:
        UserError: the module is not installed; the message holds the pip command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"This needs the package '{module}', which is not usable here ({error}). "
            f"Install it with: pip install 'robopolicy[{extra}]'"
        ) from error
