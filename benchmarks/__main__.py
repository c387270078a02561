"""The benchmarks by name.

    python -m benchmarks                                  what there is
    python -m benchmarks NAME [flags]                     runs one; --help shows its flags
    python -m benchmarks NAME [flags] > before.jsonl
    python -m benchmarks --compare before.jsonl after.jsonl

Each prints a JSON line a case (`record.py`), and a table of all of them at the end, which `--compare` passes over.
"""

import ast
import difflib
import importlib
import pathlib
import sys
from collections.abc import Callable

from bitsperdim import scripts
from bitsperdim.errors import RunError

HELPERS = ("__init__", "__main__", "record", "untrained")
FOLDER = pathlib.Path(__file__).parent


def listed() -> dict[str, str]:
    """Each benchmark, and the first line of its docstring. Nothing of it is run."""
    paths = [path for path in sorted(FOLDER.glob("*.py")) if path.stem not in HELPERS]
    return {path.stem: (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0] for path in paths}


def main(argv: list[str]) -> int:
    """The exit code: 2 for what cannot be understood."""
    if not argv or argv[0] in ("--help", "-h", "--list"):
        width = max(map(len, listed()))
        print("\n".join(f"{name:{width}}  {line}" for name, line in listed().items()))
        print("\npython -m benchmarks NAME [flags]; python -m benchmarks --compare A.jsonl B.jsonl")
        return 0
    if argv[0] == "--compare":
        if len(argv) != 3:
            print("error: --compare takes two files of JSON lines", file=sys.stderr)
            return 2
        from benchmarks import record

        return ended(lambda: record.show_comparison(*argv[1:]))
    name = argv[0]
    if name not in listed():
        near = difflib.get_close_matches(name, listed(), n=1, cutoff=0.0)[0]
        print(f"error: there is no benchmark '{name}'; did you mean '{near}'?", file=sys.stderr)
        return 2
    scripts.keep_freed_memory()  # as the scripts do, before JAX has threads
    sys.argv = [f"python -m benchmarks {name}", *argv[1:]]
    return ended(lambda: importlib.import_module(f"benchmarks.{name}").main())


def ended(work: Callable[[], None]) -> int:
    """The exit code of `work`, whose bad input is told in one line."""
    try:
        work()
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
