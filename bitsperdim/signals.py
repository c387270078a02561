"""SIGTERM and SIGINT: at once where nothing is lost by it, else as a question that long work asks between two steps.

Of several processes all stop when one of them is told to, at the same step.

Not here: what the scripts say then, and signals while they import (`scripts.py`).
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn

from bitsperdim.errors import Interrupted


class Signals:
    """While entered, a signal raises `KeyboardInterrupt`; while `deferred`, it is remembered until `check` is called.

    A second SIGINT is not deferred. Handlers can be set in the main thread alone; elsewhere (a notebook's worker) no
    signal is ever seen. `any_of` asks all processes of the run.
    """

    def __init__(self, any_of: Callable[[bool], bool] = lambda seen: seen) -> None:
        self._any_of = any_of
        self.received: int | None = None
        self._is_deferred = False
        self._is_seen = False  # by all processes
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

    def is_seen(self, any_of: Callable[[bool], bool] | None = None) -> bool:
        """Whether a signal has come, to any process. `any_of`: another way to ask them all, such as `hosts.Vote`."""
        self._is_seen = self._is_seen or (any_of or self._any_of)(self.received is not None)
        return self._is_seen

    def check(self) -> None:
        """Raises `Interrupted` when a signal has come, to any process. Collective."""
        if self.is_seen():
            name = "another process" if self.received is None else signal.Signals(self.received).name
            error = Interrupted(f"stopped by {name}; the same command goes on from here")
            error.is_of_all = True
            raise error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._is_deferred or self.received == number == signal.SIGINT:
            raise_interrupt(number, frame)
        self.received = number


def raise_interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """A handler. `KeyboardInterrupt`, since no library takes it for an error of its own."""
    raise KeyboardInterrupt(signal.Signals(number).name)
