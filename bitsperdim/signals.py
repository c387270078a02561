"""SIGTERM and SIGINT as a question that long work asks between two steps."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from bitsperdim.errors import Interrupted


class Signals:
    """While entered, remembers a signal instead of ending the process; a second SIGINT ends it at once.

    Handlers can be set in the main thread alone; elsewhere (a notebook's worker) no signal is ever seen.
    """

    def __init__(self) -> None:
        self.received: int | None = None
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

    def check(self) -> None:
        """Raises `Interrupted` when a signal has come; for work that keeps no state of its own to save."""
        if self.received is not None:
            raise Interrupted(f"stopped by {signal.Signals(self.received).name}; the same command goes on from here")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
