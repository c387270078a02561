"""Figures of a run: JSON lines on disk (TensorBoard if asked for), a line or a bar on the console, speed, tables.

Every key carries its unit (`bits_per_dim`, `mse`, `images_per_second`). One process of a run writes; the others make no
`Writer` and no `Console`. Not here: what is measured, and when (`trainer.py`).
"""

import dataclasses
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from etils import epath

from bitsperdim import atomic
from bitsperdim.errors import InputError

FILE = "metrics.jsonl"
SHORTEST = 0.05  # seconds in which a speed can be measured


class Writer:
    """Appends to `metrics.jsonl`: {"step": 400, "kind": "train", "mse": 0.0123, ...}, a line a call.

    `step` is the step that the run goes on from: lines beyond it, written by a run that was killed before its next
    checkpoint, are removed, so that a resumed run has every step once. So write the figures of a step before its
    checkpoint. With `tensorboard` the same figures go to event files in the folder too; raises InputError where
    tensorboardX is not installed. Usable as a context manager.
    """

    def __init__(self, folder: epath.PathLike, step: int = 0, tensorboard: bool = False):
        self._path = epath.Path(folder) / FILE
        self._board = _summary_writer(self._path.parent, step) if tensorboard else None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        truncate(self._path, step)
        # An object store cannot append: there the whole file, which is small, is written again.
        self._file = None if atomic.is_remote(self._path) else self._path.open("a")
        self._text = self._path.read_text() if self._file is None and self._path.exists() else ""

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """One line, handed to the system at once. Values that are not finite become null: JSON has no NaN."""
        numbers = {key: float(value) for key, value in values.items()}
        finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        line = json.dumps({"step": step, "kind": kind, **finite}, allow_nan=False) + "\n"
        if self._file is None:
            self._text += line
            self._path.write_text(self._text)
        else:
            self._file.write(line)
            self._file.flush()
        if self._board is not None:
            for key, value in finite.items():
                if value is None:
                    continue
                self._board.add_scalar(f"{kind}/{key}", value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read(path: epath.PathLike) -> list[dict]:
    """The lines of a metrics file; [] where there is none.

    A last line that a killed run left half-written is passed over. Raises InputError for any other that is no record.
    """
    path = epath.Path(path)
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("no step")
            if any(not isinstance(value, int | float | None) for key, value in record.items() if key != "kind"):
                raise ValueError("a figure that is no number")
            records.append(record)
        except ValueError as error:
            if number < len(lines):
                raise InputError(f"{path}, line {number}, is no record ({error}); repair or remove it") from error
    return records


def truncate(path: epath.Path, step: int) -> None:
    """Removes the lines beyond `step`, and a half-written one, in one atomic replacement."""
    if path.exists():
        kept = (json.dumps(record) + "\n" for record in read(path) if record["step"] <= step)
        atomic.write_bytes(path, "".join(kept).encode())


@dataclasses.dataclass(frozen=True)
class Rate:
    """Speed over a window; not-a-number where it is unknown."""

    images_per_second: float
    seconds_per_step: float


class Throughput:
    """Speed since the last reading.

    What lies before the first `restart` is not counted: call it once the first step, which compiles, is finished, and
    after every pause (evaluation, pictures). Devices run ahead of the host: read when results are fetched.
    """

    def __init__(self, images_per_step: int, clock: Callable[[], float] = time.perf_counter):
        self._images_per_step = images_per_step
        self._clock = clock
        self._start: tuple[int, float] | None = None

    def restart(self, step: int) -> None:
        """Begins a window at the end of `step`."""
        self._start = step, self._clock()

    def read(self, step: int) -> Rate:
        """Ends the window and begins the next; unknown where it never began or had no step.

        A window too short to tell goes on instead.
        """
        start, now = self._start, self._clock()
        if start is not None and step > start[0] and now < start[1] + SHORTEST:
            return Rate(math.nan, math.nan)
        self._start = step, now
        if start is None or step <= start[0]:
            return Rate(math.nan, math.nan)
        seconds = (now - start[1]) / (step - start[0])
        return Rate(self._images_per_step / seconds, seconds)


class Console:
    """Progress for whoever watches: a bar redrawn in place on a terminal, a plain line a call elsewhere.

    Writes to `stream` (stderr by default). A stream that cannot be written to any more, such as the terminal of a
    closed connection, is let go in silence: watching must not end a training.
    """

    def __init__(self, steps: int, stream: TextIO | None = None, unit: str = "step"):
        self._steps, self._unit = steps, unit
        self._stream = sys.stderr if stream is None else stream
        self.is_terminal = _is_terminal(self._stream)
        self._last: tuple[Mapping[str, float], Rate] = {}, Rate(math.nan, math.nan)
        self._drawn = 0.0
        self._bar = ""  # what stands on the terminal's last line

    def progress(self, step: int, values: Mapping[str, float], rate: Rate) -> None:
        """Shows a step: `step 400/2000  mse 0.0123  1,234 images/s  ETA 00:03:10`."""
        self._last = values, rate
        if self.is_terminal:
            self._redraw(step)
        else:
            self._write(progress_line(step, self._steps, values, rate, self._unit) + "\n")

    def tick(self, step: int) -> None:
        """Between two `progress`: on a terminal the bar moves, twice a second at most."""
        if self.is_terminal and time.monotonic() - self._drawn > 0.5:
            self._redraw(step)

    def _redraw(self, step: int) -> None:
        self._drawn = time.monotonic()
        self._draw(f"{bar(step / self._steps)}  {progress_line(step, self._steps, *self._last, self._unit)}")

    def message(self, text: str) -> None:
        """A line that stays, above the bar."""
        below = self._bar
        self._draw("")
        self._write(text + "\n")
        self._draw(below)

    def close(self) -> None:
        """Leaves the last bar on the screen, and the cursor below it."""
        if self._bar:
            self._bar = ""
            self._write("\n")

    def _draw(self, text: str) -> None:
        """Puts `text` in the place of the bar."""
        # A line as wide as the terminal wraps in some of them and could not be redrawn.
        text = text[: _columns() - 1]
        if self._bar:
            self._write("\r" + " " * len(self._bar) + "\r")
        if text:
            self._write(text)
        self._bar = text

    def _write(self, text: str) -> None:
        try:
            encoding = getattr(self._stream, "encoding", None) or "ascii"
            self._stream.write(text.encode(encoding, "replace").decode(encoding))
            self._stream.flush()
        except (OSError, ValueError):  # a broken pipe, a closed stream
            pass


def counting(what: str, total: int, stream: TextIO | None = None) -> Callable[[int], None]:
    """Progress of work that is counted in images: call the result with the number done so far.

    A bar is redrawn every half second; elsewhere than on a terminal a line is written every ten, and at the end.
    """
    console, throughput = Console(total, stream, what), Throughput(1)
    interval = 0.5 if console.is_terminal else 10.0
    due = time.monotonic() + interval
    throughput.restart(0)

    def update(done: int) -> None:
        nonlocal due
        if done == total or time.monotonic() >= due:
            console.progress(done, {}, throughput.read(done))
            due = time.monotonic() + interval
        if done == total:
            console.close()

    return update


def progress_line(step: int, steps: int, values: Mapping[str, float], rate: Rate, unit: str = "step") -> str:
    """Step, speed and time left, where they are known, and figures to four digits: first what must not be cut off."""
    parts = [f"{unit} {step}/{steps}"]
    if math.isfinite(rate.images_per_second):
        parts.append(f"{rate.images_per_second:,.{0 if rate.images_per_second >= 10 else 2}f} images/s")
        parts.append(f"ETA {duration((steps - step) * rate.seconds_per_step)}")
    return "  ".join(parts + ([shown(values)] if values else []))


def shown(values: Mapping[str, float]) -> str:
    """`mse 0.01234  used_codes 512`: four digits, and counts in full."""
    return "  ".join(f"{key} {value if isinstance(value, int) else f'{value:.4g}'}" for key, value in values.items())


def bar(share: float, width: int = 20) -> str:
    """`[#####...............]  25%`: ASCII, which every terminal has."""
    full = round(width * min(max(share, 0.0), 1.0))
    return f"[{'#' * full}{'.' * (width - full)}] {share:4.0%}"


def duration(seconds: float) -> str:
    """`00:03:10`, or `2d 00:03:10` from a day on."""
    minutes, seconds = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours:02d}:{minutes:02d}:{seconds:02d}"


def table(rows: Sequence[Sequence[object]], head: Sequence[str] = ()) -> str:
    """Rows as aligned plain text, under a head if there is one: columns with numbers to the right, others to the left.

    Floats are written to six digits, None as '-'.
    """
    texts = [list(head)] * bool(head) + [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    numeric = [any(isinstance(value, int | float) for value in column) for column in zip(*rows, strict=True)]
    align = lambda text, width, right: text.rjust(width) if right else text.ljust(width)
    lines = ["  ".join(map(align, row, widths, numeric)).rstrip() for row in texts]
    if head:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _is_terminal(stream: TextIO) -> bool:
    """Whether a line can be redrawn: not in a file, a pipe, a notebook, or an editor's dumb terminal."""
    try:
        return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    except (AttributeError, ValueError):
        return False


def _columns() -> int:
    # Terminals over a serial line may claim to be zero columns wide.
    return max(shutil.get_terminal_size().columns, 20)


def _summary_writer(folder: epath.Path, step: int):
    try:
        import tensorboardX  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError('TensorBoard output needs tensorboardX: pip install "bitsperdim[tensorboard]"') from error
    # purge_step tells TensorBoard to forget what a killed run had written from there on.
    return tensorboardX.SummaryWriter(os.fspath(folder), purge_step=step + 1)
