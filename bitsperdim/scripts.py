"""Where the scripts begin: a signal ends them with one line and exit code 3, even while they still import.

Not here: what they do (`cli.py`, which takes seconds to import), and signals during training (`signals.py`).
"""

import importlib
import signal
import sys

from bitsperdim import signals


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
        print(f"stopped{by}; the same command goes on from what is saved", file=sys.stderr)
        sys.exit(3)
