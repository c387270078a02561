"""SIGTERM and SIGINT: at once where nothing is lost by it, else as a question that long work asks between two steps.

Not here: what the scripts say then, and signals while they import (`scripts.py`).
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn

from bitsperdim.errors import Interrupted


class Signals:
    """While entered, a signal raises `KeyboardInterrupt`; while `deferred`, it is remembered until `check` is called.

    A second SIGINT is not deferred. Handlers can be set in the main thread alone; elsewhere (a notebook's worker) no
    signal is ever seen.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._is_deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """For work that has something to save first."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def check(self) -> None:
        """Raises `Interrupted` when a signal has come."""
        if self.received is not None:
            raise Interrupted(f"stopped by {signal.Signals(self.received).name}; the same command goes on from here")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._is_deferred or self.received == number == signal.SIGINT:
            raise_interrupt(number, frame)
        self.received = number


def raise_interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """A handler. `KeyboardInterrupt`, since no library takes it for an error of its own."""
    raise KeyboardInterrupt(signal.Signals(number).name)
