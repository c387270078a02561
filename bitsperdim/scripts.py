"""Where the scripts begin: a signal ends them with one line and exit code 3, even while they still import.

Not here: what they do (`cli.py`, which takes seconds to import), and signals during training (`signals.py`).
"""

import importlib
import signal
import sys

from bitsperdim import signals

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


def _run(name: str) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signals.raise_interrupt)
    try:
        getattr(importlib.import_module("bitsperdim.cli"), name)()
    except KeyboardInterrupt as stop:
        by = f" by {stop}" if str(stop) else ""
        print(f"stopped{by}; {LEFT[name]}", file=sys.stderr)
        sys.exit(3)
