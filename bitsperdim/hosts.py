"""Several processes that are one run: how they find each other, agree, and end together.

Each process drives its own devices, and all of them call what is `Collective` here in the same order, as they do every
step. The first process writes; what only one of them can know (a folder's content, an error, a signal) goes to all of
them through `together`, `from_first` and `any_of`. In a single process these do nothing.

Not here: which rows of a batch a process reads (`data.py`), where arrays live (`sharding.py`).
"""

import collections
import contextlib
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from bitsperdim.errors import InputError, Interrupted, LostError, NonFiniteError, RunError

START_TIMEOUT = 300  # seconds in which all processes must have started
HEARTBEAT_TIMEOUT = 40  # without a sign of life for so long, a process is taken for dead and the others end
SECONDS_TO_APPEAR = 30.0  # of a file, on the other hosts of a network file system
LAG = 2  # steps between asking all processes and looking at the answer
FORMS = "tpu, slurm or HOST:PORT,NUM_PROCESSES,PROCESS_ID such as 10.0.0.1:1234,2,0"
# Each process hands to all: an exit code (0: it can go on), a number, and the text of its error.
_HEADER, _BYTES = np.dtype([("code", np.int32), ("value", np.int64), ("length", np.int32)]), 1024
_ERRORS: dict[int, type[RunError]] = {kind.exit_code: kind for kind in (InputError, Interrupted, NonFiniteError)}


def join(how: str) -> None:
    """Makes this process one of several. `InputError` where `how` is none of `FORMS`, or the others do not come.

    Before anything has touched a device. A process that has not found the others can only end.
    """
    address = _address(how)
    if "process_id" in address:
        _look_for_first(how, address)
    # Its handler would take SIGTERM from ours (`signals.py`), which knows what there is to save.
    jax.config.update("jax_enable_preemption_service", False)
    times: dict[str, Any] = {
        "initialization_timeout": START_TIMEOUT + 60,
        "heartbeat_timeout_seconds": HEARTBEAT_TIMEOUT,
        "shutdown_timeout_seconds": HEARTBEAT_TIMEOUT,
    }
    failed = lambda reason: of_one(InputError(f"--multihost={how}: the processes have not found each other ({reason})"))
    # JAX would abort this process, with an address where it was in C++.
    late = threading.Timer(START_TIMEOUT, _give_up, [failed(f"not all have started within {START_TIMEOUT} s")])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(**address, **times)
    except (RuntimeError, ValueError) as error:
        # What JAX says where it has found no cluster names an argument of its own.
        alone = how == "tpu" and "coordinator_address" in str(error)
        raise failed("this is no TPU VM" if alone else str(error).strip().splitlines()[0]) from error
    finally:
        late.cancel()


def _give_up(error: Exception) -> None:
    print(f"error: {error}", file=sys.stderr)
    end(error)


def _look_for_first(how: str, address: dict[str, Any]) -> None:
    """Raises `InputError` where the first process, at this address, cannot be there, or is not in time."""
    host, _, text = address["coordinator_address"].rpartition(":")
    port, deadline = int(text), time.monotonic() + START_TIMEOUT
    if address["process_id"] == 0:
        # Two services on one port would each get a part of the processes.
        six = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if six else socket.AF_INET
        try:
            socket.create_server(("", port), family=family, dualstack_ipv6=six).close()
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise InputError(
                f"--multihost={how}: port {port} cannot be opened here ({reason}); choose another"
            ) from error
        return
    while True:
        try:
            socket.create_connection((host.strip("[]"), port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"--multihost={how}: no process 0 at {host}:{port} within {START_TIMEOUT} s ({error}); start all "
                    "processes, with the address of the first one"
                ) from error
        time.sleep(0.2)


def _address(how: str) -> dict[str, Any]:
    """Arguments of `jax.distributed.initialize`."""
    if how == "tpu":
        if "SLURM_JOB_ID" in os.environ:  # which JAX would join
            raise InputError("--multihost=tpu inside a SLURM job; --multihost=slurm starts its processes")
        return {}
    if how == "slurm":
        if lacking := [name for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID") if name not in os.environ]:
            raise InputError(f"--multihost=slurm: {', '.join(lacking)} is not set; start the script with srun")
        return {"cluster_detection_method": "slurm"}
    found = re.fullmatch(r"(.+):(\d+),([1-9]\d*),(\d+)", how)
    if not found:
        raise InputError(f"--multihost must be {FORMS}, not '{how}'")
    host, port, count, index = found[1], *map(int, found.groups()[1:])
    if not 0 < port < 65536 or not index < count:
        raise InputError(f"--multihost={how}: the port must lie in 1..65535 and the process in 0..{count - 1}")
    # Whatever cluster this is: what was asked for is all that counts.
    found = {"coordinator_address": f"{host}:{port}", "num_processes": count, "process_id": index}
    return found | {"cluster_detection_method": "deactivate"}


def are_several() -> bool:
    # Asked in this order, since counting processes touches the devices.
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Is this the process that writes?"""
    return jax.process_index() == 0


class _Message(NamedTuple):
    """What a process tells all of them."""

    code: int = 0
    value: int = 0
    text: str = ""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What one process cannot do ends it in all of them, with the same error. Collective.

    A signal that stops one process in here stops all of them. An error `of_one` ends its process alone, which the
    others then lose.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not is_of_all(error) and not is_of_one(error):
            _tell(error)
        raise
    if are_several():
        _raise_of_others(_exchange(_Message()))


def from_first(function: Callable[[], int]) -> int:
    """The first process's value on every process: what others see of its files may be older. Collective."""
    if not are_several():
        return function()
    if not is_first():
        return _raise_of_others(_exchange(_Message()))[0].value
    try:
        value = int(function())
    except (Exception, KeyboardInterrupt) as error:
        _tell(error)
        raise
    _raise_of_others(_exchange(_Message(value=value)))
    return value


def any_of(flag: bool) -> bool:
    """Does any process say so? Collective."""
    if not are_several():
        return flag
    return any(message.value for message in _raise_of_others(_exchange(_Message(value=int(flag)))))


def check_same(value: int, message: str) -> None:
    """Raises `InputError` with `message` where a process has another value than the first. Collective."""
    if are_several():
        first = from_first(lambda: value)
        with together():
            if value != first:
                raise InputError(message)


class Vote:
    """Does any process want to stop? Asked with each step and answered `LAG` steps later, so that no step waits.

    Collective: every process gets the same answer at the same step.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._places = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(lambda wishes: wishes.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._asked: collections.deque[jax.Array] = collections.deque()

    def __call__(self, wish: bool) -> bool:
        if not are_several():
            return wish
        count, devices = self._places.mesh.size, self._places.addressable_devices
        pieces = [jax.device_put(np.full(1, wish, np.int32), device) for device in devices]
        self._asked.append(self._largest(jax.make_array_from_single_device_arrays((count,), self._places, pieces)))
        return len(self._asked) > LAG and bool(jax.device_get(self._asked.popleft()))


def check_shared(folder: epath.Path) -> None:
    """Raises `InputError` where a process does not see what the first one writes to `folder`. Makes it. Collective."""
    if not are_several():
        return
    # A new name, since a network file system remembers for a while which names there were not.
    path = folder / f".seen-by-all-{from_first(lambda: secrets.randbits(40)):x}"
    existed = is_first() and folder.exists()
    with together():
        if is_first():
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text("")
    try:
        with together():
            if not _appears(path):
                raise InputError(
                    f"{socket.gethostname()} does not see what the first process writes to {folder}; the run folder "
                    "must be one that all hosts share (a network file system, or gs://...)"
                )
    except RunError:
        if is_first() and not existed:
            path.unlink(missing_ok=True)
            folder.rmdir()
        raise
    finally:
        if is_first():
            path.unlink(missing_ok=True)


def _appears(path: epath.Path) -> bool:
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def local_mesh(mesh: Mesh) -> Mesh:
    """For what one process does alone: its first device, under the axes of `mesh`; all of `mesh` where it is alone."""
    if not are_several():
        return mesh
    shape, kinds = (1,) * len(mesh.axis_names), (AxisType.Auto,) * len(mesh.axis_names)
    return jax.make_mesh(shape, mesh.axis_names, axis_types=kinds, devices=jax.local_devices()[:1])


def local(tree: PyTree) -> PyTree:
    """The arrays of `tree`, whole, where `local_mesh` has them. Collective."""
    if not are_several():
        return tree
    leaves, structure = jax.tree.flatten(tree)
    if not all(leaf.is_fully_replicated for leaf in leaves):
        whole = NamedSharding(leaves[0].sharding.mesh, PartitionSpec())
        leaves = jax.jit(lambda *given: given, out_shardings=whole)(*leaves)
    return jax.tree.unflatten(structure, [leaf.addressable_data(0) for leaf in leaves])


def is_of_all(error: BaseException) -> bool:
    """Do all processes of the run have this error, so that what is `Collective` can still be called?"""
    return not is_of_one(error) and (not are_several() or getattr(error, "is_of_all", False))


def of_one(error: Exception) -> Exception:
    """The error, marked as one that the others cannot be told of: they wait where nothing reaches them."""
    error.is_of_one = True  # pyright: ignore[reportAttributeAccessIssue]
    return error


def is_of_one(error: BaseException) -> bool:
    return getattr(error, "is_of_one", False)


def code_of(error: BaseException) -> int:
    """The exit code of a script that ends with this."""
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.exit_code
    return error.exit_code if isinstance(error, RunError) else 1


def explained(error: BaseException) -> BaseException:
    """What an error means for one of several processes: of JAX, that a collective operation has lost a partner."""
    if isinstance(error, RunError) or not are_several():
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(f"stopped by {error}; start all processes again: the run goes on from its last checkpoint")
    is_of_gloo = isinstance(error, ValueError) and "Gloo" in str(error)  # the collectives of CPUs
    is_of_orbax = isinstance(error, TimeoutError) and "barrier" in str(error)  # behind the writing of a checkpoint
    if not is_of_gloo and not is_of_orbax and not isinstance(error, jax.errors.JaxRuntimeError):
        return error
    return LostError(
        f"process {jax.process_index()} of {jax.process_count()} cannot go on, most likely because another one has "
        f"ended, whose message says why; start all of them again: the run goes on from its last checkpoint "
        f"({str(error).strip().splitlines()[0][:300]})"
    )


def end(error: BaseException) -> NoReturn:
    """Ends this process with the exit code of `error`: at once, unless all processes end with it."""
    if not is_of_all(error):
        # JAX would wait for the others first, which in turn wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code_of(error))
    sys.exit(code_of(error))


def _tell(error: BaseException) -> None:
    """Hands an error of this process to the others, who wait for it in an exchange of theirs."""
    error.is_of_all = True  # pyright: ignore[reportAttributeAccessIssue]
    _exchange(_Message(code_of(error), text=str(error) or type(error).__name__))


def _raise_of_others(messages: list[_Message]) -> list[_Message]:
    """The messages, where no process tells of an error."""
    for index, message in enumerate(messages):
        if message.code:
            kind = _ERRORS.get(message.code, LostError)
            error = kind(f"process {index} of {len(messages)}: {message.text}")
            error.is_of_all = True
            raise error
    return messages


def _exchange(message: _Message) -> list[_Message]:
    """What every process tells. Always the same program, so that one that fails meets the others wherever they are."""
    content = message.text.encode()[: _BYTES - _HEADER.itemsize]
    sent = np.zeros(_BYTES, np.uint8)
    header = np.array([(message.code, message.value, len(content))], _HEADER)
    sent[: _HEADER.itemsize] = np.frombuffer(header.tobytes(), np.uint8)
    sent[_HEADER.itemsize :][: len(content)] = np.frombuffer(content, np.uint8)
    with jax.transfer_guard("allow"):
        received = np.asarray(multihost_utils.process_allgather(sent))
    found = []
    for row in received.reshape(-1, _BYTES):
        code, value, length = np.frombuffer(row[: _HEADER.itemsize].tobytes(), _HEADER)[0]
        text = row[_HEADER.itemsize :][:length].tobytes().decode(errors="replace")
        found.append(_Message(int(code), int(value), text))
    return found
