"""What a benchmark says: a JSON line a case, a table at the end; and two files of such lines side by side.

    {"benchmark": "train_step", "case": "step", "of": {"config": ..., "batch": 4}, "figures": {"seconds": 0.61},
     "on": {"bitsperdim": "0.1.0", "jax": "0.10.2", "devices": "1 x cpu", "cpus": 2}}

`of` tells a case from others, `figures` are what was measured. Not here: how time is taken of a compiled function
(`untrained.py`).
"""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bitsperdim import config, metrics
from bitsperdim.errors import InputError


class Record:
    """The cases of one benchmark, printed as they come, and added to the file `out` where there is one."""

    def __init__(self, benchmark: str, out: str | None = None):
        self.benchmark = benchmark
        self.cases: list[dict[str, Any]] = []
        self.out = pathlib.Path(out) if out else None
        self.before = _cases(self.out) if self.out and self.out.exists() else []

    def say(self, case: str, of: Mapping[str, Any] = {}, **figures: Any) -> dict[str, Any]:
        """Prints one case; numbers are cut to six digits."""
        line = {"benchmark": self.benchmark, "case": case, "of": dict(of), "figures": short(figures), "on": machine()}
        self.cases.append(line)
        print(text := json.dumps(line), flush=True)
        if self.out:
            with self.out.open("a") as stream:
                print(text, file=stream)
        return line

    def known(self, case: str, of: Mapping[str, Any]) -> dict[str, Any] | None:
        """What `say` has written to `out` in an earlier start."""
        return next((line for line in self.before if line["case"] == case and line["of"] == of), None)

    def end(self) -> None:
        """The table of all cases."""
        if self.cases:
            print("\n" + aligned(self.cases))


def short(value: Any) -> Any:
    """Numbers with six digits at most, in lists and tables too."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: short(item) for key, item in value.items()}
    return [short(item) for item in value] if isinstance(value, list | tuple) else value


def machine() -> dict[str, Any]:
    """What a figure was measured on: versions, devices, and how many processors this process may use."""
    import jax  # the benchmarks set up their processes before it is imported

    from bitsperdim import run

    return run.machine() | {"platform": jax.default_backend()}


def aligned(cases: Sequence[Mapping[str, Any]]) -> str:
    """For the console: like cases in a table, with a column for whatever any of them has, lists and tables left out."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        tables.setdefault(case["case"], []).append({"case": case["case"]} | case["of"] | case["figures"])
    plain = lambda value: not isinstance(value, list | tuple | Mapping)
    shown = []
    for rows in tables.values():
        names = list(dict.fromkeys(name for row in rows for name, value in row.items() if plain(value)))
        shown.append(metrics.table([[row.get(name) for name in names] for row in rows], names))
    return "\n\n".join(shown)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table; None is an empty cell, thousands are grouped."""
    cell = lambda value: "" if value is None else f"{value:,}" if isinstance(value, int | float) else str(value)
    texts = [list(heads), ["---"] * len(heads), *([cell(value) for value in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in texts]


def read(path: str) -> list[dict[str, Any]]:
    """The cases in what a benchmark has printed; other lines are passed over. InputError where there are none."""
    if cases := _cases(pathlib.Path(path)):
        return cases
    raise InputError(f"{path} has no line of a benchmark")


def _cases(path: pathlib.Path) -> list[dict[str, Any]]:
    try:
        lines = [line for line in path.read_text().splitlines() if line.startswith("{")]
        found = [json.loads(line) for line in lines]
    except OSError as error:
        raise InputError(str(error)) from error
    except ValueError as error:  # no text, or a line that is cut off
        raise InputError(f"{path} is no file of JSON lines ({error})") from error
    return [case for case in found if {"benchmark", "case", "of", "figures"} <= case.keys()]


def compare(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """[case, figure, before, after, after / before] of every number that both have, the last of like cases counts.

    Figures in tables are called table.figure.
    """
    key = lambda case: json.dumps([case["benchmark"], case["case"], case["of"]], sort_keys=True)
    old = {key(case): case for case in before}
    rows: list[list[Any]] = []
    for name, case in {key(case): case for case in after}.items():
        is_number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
        figures = dict(config.flatten(old[name]["figures"])) if name in old else {}
        label = " ".join([case["benchmark"], case["case"], *(f"{k}={v}" for k, v in case["of"].items())])
        for figure, value in config.flatten(case["figures"]):
            if is_number(value) and is_number(figures.get(figure)):
                ratio = value / figures[figure] if figures[figure] else None
                rows.append([label, figure, figures[figure], value, None if ratio is None else round(ratio, 3)])
    return rows


def show_comparison(one: str, other: str) -> None:
    """Prints two files side by side, and what they were measured on where that differs."""
    before, after = read(one), read(other)
    rows = compare(before, after)
    if not rows:
        raise InputError(f"{one} and {other} have no case in common")
    print(metrics.table(rows, ("case", "figure", one, other, "ratio")))
    machines = [sorted({json.dumps(case.get("on"), sort_keys=True) for case in cases}) for cases in (before, after)]
    if machines[0] != machines[1]:
        print(f"\nnote: measured on different machines or versions\n  {one}: {machines[0]}\n  {other}: {machines[1]}")
