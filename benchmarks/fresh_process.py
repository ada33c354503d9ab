"""Running a measurement in a process of its own, so that it leaves no memory, threads or settings behind."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def wait_passively() -> None:
    """Let OpenMP threads of processes started from now on sleep at barriers, as robopolicy's command line does.

    It holds for every side of a comparison: on a busy machine spinning threads slow all of them, and at random.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def run_fresh(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a fresh process; what it returns or raises comes back."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()
