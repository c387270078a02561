"""Where the scripts begin: a signal ends them with one line and exit code 3, even while they still import.

Not here: what they do (`cli.py`, which takes seconds to import), and signals during training (`signals.py`).
"""

import ctypes
import importlib
import os
import signal
import sys

from bitsperdim import signals

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
# What is left of a script that a signal ends.
LEFT = {
    "train": "the same command goes on from what is saved",
    "evaluate": "nothing was written; the same command begins again",
    "sample": "with --compare_samplers the same command goes on behind the rows that are saved, else it begins again",
    "convert": "nothing is left of it; the same command begins again",
}


def train() -> None:
    """See `cli.train`."""
    _run("train")


def evaluate() -> None:
    """See `cli.evaluate`."""
    _run("evaluate")


def sample() -> None:
    """See `cli.sample`."""
    _run("sample")


def convert() -> None:
    """See `cli.convert`."""
    _run("convert")


def keep_freed_memory() -> None:
    """Tells glibc to keep what XLA frees after each step on a CPU and asks for again in the next.

    Given back to the system it costs a page fault for every 4 KiB, a seventh of the time of small models and up to a
    fifth of a step at 256 pixels; kept, the process is some 7 % larger. Too late once there are threads. Nothing where
    the user has settings of his own, or malloc is another one.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(parameter, value)


def _run(name: str) -> None:
    keep_freed_memory()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signals.raise_interrupt)
    try:
        getattr(importlib.import_module("bitsperdim.cli"), name)()
    except KeyboardInterrupt as stop:
        by = f" by {stop}" if str(stop) else ""
        print(f"stopped{by}; {LEFT[name]}", file=sys.stderr)
        sys.exit(3)
