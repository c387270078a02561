"""How a script runs: its help, where compiled programs are kept, and the exit code of what happened.

0 done, 2 bad input, 3 stopped by a signal and saved, 4 training stayed non-finite, 5 another process of the run has
ended; 1 is a defect of ours. Not here: what the scripts do (`cli.py`).
"""

import contextlib
import errno
import inspect
import os
import sys
import traceback
from collections.abc import Callable

import jax

from bitsperdim import hosts
from bitsperdim.errors import InputError, RunError

# Of the file system, whatever was under way. Others would be defects of ours.
NO_ROOM = "make room, then the same command goes on"
NO_ACCESS = "give yourself access to it, or use another folder (--workdir, --out)"
REMEDIES = {errno.ENOSPC: NO_ROOM, errno.EDQUOT: NO_ROOM} | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS), NO_ACCESS
)


def run(main: Callable[[list[str]], None], help_text: str | None) -> None:
    """Runs a script's body; ends the process with the exit code of what happened."""
    if {"--help", "-h"} & set(sys.argv):
        print(inspect.cleandoc(help_text or ""))
        sys.exit(0)
    argv = [argument for argument in sys.argv if argument != "--traceback"]
    _use_compilation_cache()
    try:
        main(argv)
    except BrokenPipeError:  # of `| head`: who read our lines has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Exception, KeyboardInterrupt) as error:
        explained = _explained(error)
        if not isinstance(explained, RunError) and not hosts.are_several():
            raise
        if "--traceback" in sys.argv or not isinstance(explained, RunError):
            traceback.print_exc()
        if isinstance(explained, RunError):
            print(f"error: {explained}", file=sys.stderr)
        hosts.end(explained)


def _explained(error: BaseException) -> BaseException:
    """As an error of the user's, where it is one: of the file system, or of another process of the run."""
    if isinstance(error, OSError) and error.errno in REMEDIES:
        where = f" for {error.filename}" if error.filename else ""
        explained = InputError(f"{error.strerror}{where}; {REMEDIES[error.errno]}")
    else:
        explained = hosts.explained(error)
    explained.is_of_all = hosts.is_of_all(error)  # pyright: ignore[reportAttributeAccessIssue]
    return explained


def _use_compilation_cache() -> None:
    """Compiled programs are kept between runs, unless JAX_COMPILATION_CACHE_DIR says where (or '' says not)."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = os.environ.get("BITSPERDIM_CACHE") or os.path.expanduser("~/.cache/bitsperdim")
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "xla"))
