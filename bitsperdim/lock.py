"""One process at a time in the folder of a stage, where several are started on one machine.

Not here: the processes of one run, which agree on what they do (`hosts.py`).
"""

import contextlib
import fcntl
from collections.abc import Iterator

from etils import epath

from bitsperdim import atomic, hosts
from bitsperdim.errors import InputError


@contextlib.contextmanager
def alone(folder: epath.Path) -> Iterator[None]:
    """Holds the lock of a stage's folder; `InputError` where another run on this machine does.

    Two runs in one folder would remove each other's files. The system frees the lock of a process that is killed.
    """
    with contextlib.ExitStack() as stack:
        with hosts.together():
            if hosts.is_first() and not atomic.is_remote(folder):
                folder.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(folder.parent / f".{folder.name}.lock", "w"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    message = f"another process is working on {folder}; wait for it, or use a new --workdir"
                    raise InputError(message) from error
        yield
