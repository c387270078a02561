"""Real processes on one host are one run: they start, stop, lose one of them, and end as a single one does."""

import json
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from toy_processes import CHANGES, READ_SLOWLY, STEPS, TOY, Processes, lines, wait_for_checkpoint

from bitsperdim import cli, hosts, trainer
from bitsperdim import run as run_lib
from bitsperdim.config import flatten
from bitsperdim.errors import InputError

# What only one of the processes can know.
LOOK_FIRST = """
    import sys
    import jax
    from etils import epath
    from bitsperdim import hosts
    from bitsperdim.errors import InputError

    join = hosts.join

    def fail_here():
        with hosts.together():
            if jax.process_index() == 1:
                raise InputError("only here")

    def join_and_look(how):
        join(how)
        hosts.SECONDS_TO_APPEAR = 0.5
        name = next(flag for flag in sys.argv if flag.startswith("--workdir")).partition("=")[2]
        for check in (fail_here, lambda: hosts.check_shared(epath.Path(f"{name}-{jax.process_index()}"))):
            try:
                check()
            except InputError as error:
                print("refused:", error, file=sys.stderr, flush=True)
        try:
            hosts.check_same(jax.process_index(), "it has another number")
        except InputError as error:
            print("refused:", error, file=sys.stderr, flush=True)
        numbers = [hosts.from_first(lambda: 7 + jax.process_index()), hosts.any_of(jax.process_index() == 1)]
        print("agreed:", *numbers, hosts.any_of(False), file=sys.stderr, flush=True)

    hosts.join = join_and_look
"""

# A second start in the same processes, which saves the time of a third one.
TWICE = """
    from bitsperdim import hosts, scripts

    try:
        scripts.train()
    except SystemExit as end:
        print("ended with", end.code, file=sys.stderr, flush=True)
    hosts.join = lambda how: None  # it has
"""

EVALUATE = """
    import sys
    from bitsperdim import cli

    cli.hosts.join = lambda how: None  # it has
    sys.argv = [flag for flag in sys.argv if flag.partition("=")[0] in ("-c", "--workdir", "--multihost")]
    cli.evaluate()
"""


@pytest.fixture(scope="module")
def alone(toy_config, sub_mesh, tmp_path_factory):
    """`alone(data, fsdp)` -> the run of a single process on as many devices, and its evaluation."""

    def make(data, fsdp=1):
        folder = tmp_path_factory.mktemp("alone")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer.sharding, "make_mesh", lambda config: sub_mesh(data, fsdp))
            trainer.train(toy_config(CHANGES | {"mesh.fsdp": fsdp}), str(folder))
            return folder, trainer.evaluate(run_lib.open_run(folder), "evaluation")

    return make


def test_two_processes_end_with_the_bits_of_one_though_one_is_killed_and_one_is_told_to_stop(
    tmp_path, alone, saved_state, assert_same_bits
):
    run = tmp_path / "run"
    first = Processes(run, before=LOOK_FIRST + READ_SLOWLY + TWICE)
    first.wait_for(f"step 6/{STEPS}")
    first.each[1].send_signal(signal.SIGTERM)
    first.wait_for(r"ended with 3[^$]*going on from step \d+[^$]*step \d+/")
    saved = int(re.search(r"model: saved at step (\d+)", first.said())[1])
    assert 6 <= saved < STEPS / 2 and f"model: going on from step {saved}" in first.said()
    assert "error: stopped by another process; the same command goes on from here" in first.said(0)
    assert "error: stopped by SIGTERM; the same command goes on from here\nended with 3" in first.said(1)
    later = wait_for_checkpoint(run, saved + 1)
    first.each[1].kill()
    assert first.codes(60) == [5, -signal.SIGKILL], first.said()
    assert "error: process 0 of 2 cannot go on" in first.said()
    assert "start all of them again: the run goes on from its last checkpoint" in first.said()
    for index in (0, 1):
        only, unshared, other = re.findall("refused: (.*)", first.said(index))
        assert only == ("process 1 of 2: " if index == 0 else "") + "only here"
        assert f"does not see what the first process writes to {run}-1" in unshared
        assert other.endswith("it has another number")
        assert "agreed: 7 True False" in first.said(index)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]

    ended = Processes(run, after=EVALUATE, flags=["--deterministic"])  # of GPUs, but XLA must know it here too
    assert ended.codes() == [0, 0], ended.said(0) + ended.said(1)
    assert later <= int(re.search(r"model: going on from step (\d+)", ended.said())[1]) < STEPS
    assert not [line for line in ended.said(1).splitlines() if not line.startswith("[Gloo]")]

    # The sum of two numbers is the same in either order, so a process for each device changes no bit.
    expected, measured = alone(2)
    assert_same_bits(saved_state(run), saved_state(expected))
    assert lines(run) == lines(expected)
    assert json.loads((run / "evaluation.json").read_text()) == measured
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    assert "note: deterministic changed from False to True" in ended.said()
    pictures = lambda folder: {path.name: path.read_bytes() for path in (folder / "model/images").glob("rows*")}
    assert pictures(run) == pictures(expected)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("", "--multihost must be tpu, slurm or HOST:PORT,NUM_PROCESSES,PROCESS_ID such as 10.0.0.1:1234,2,0, not ''"),
        ("gpu", "--multihost must be tpu, slurm or .*, not 'gpu'"),
        ("localhost:1234", "--multihost must be .*, not 'localhost:1234'"),
        ("localhost:1234,0,0", "--multihost must be .*, not 'localhost:1234,0,0'"),
        ("localhost:1234,2,2", "the process in 0..1"),
        ("localhost:99999,2,0", "the port must lie in 1..65535"),
        ("slurm", "--multihost=slurm: SLURM_JOB_ID, SLURM_NTASKS, SLURM_PROCID is not set; start the script with srun"),
    ],
)
def test_a_start_that_cannot_be_meant_is_refused_by_name(monkeypatch, how, message):
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=message):
        hosts._address(how)


def test_a_start_of_tpu_workers_inside_a_slurm_job_is_refused(monkeypatch):
    """JAX would join the processes of the job."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(InputError, match="--multihost=slurm starts its processes"):
        hosts._address("tpu")


def test_what_was_asked_for_explicitly_is_not_looked_for_in_the_environment():
    assert hosts._address("[::1]:1234,16,3") == {
        "coordinator_address": "[::1]:1234",
        "num_processes": 16,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} cannot be opened here \(Address already in use\)"):
            hosts.join(f"localhost:{port},2,0")


def free_port():
    with socket.create_server(("", 0)) as free:
        return free.getsockname()[1]


def test_a_first_process_that_is_not_there_is_missed_in_time(monkeypatch):
    monkeypatch.setattr(hosts, "START_TIMEOUT", 0.1)
    with pytest.raises(InputError, match=r"no process 0 at localhost:\d+ within 0.1 s .*; start all processes"):
        hosts.join(f"localhost:{free_port()},2,1")


def test_a_first_process_to_which_nobody_comes_ends_with_a_message():
    program = f"from bitsperdim import hosts; hosts.START_TIMEOUT = 2; hosts.join('localhost:{free_port()},2,0')"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "the processes have not found each other (not all have started within 2 s)" in ended.stderr


def test_a_plan_needs_no_other_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", f"--config={TOY / 'toy.py'}", "--plan=8", "--multihost=tpu"])
    with pytest.raises(SystemExit) as end:
        cli.train()
    assert end.value.code == 2
    assert "error: --multihost means nothing beside --plan" in capsys.readouterr().err


SURVIVORS = (5, -signal.SIGABRT)  # by themselves, or ended by JAX, whose service has lost the first process


def assert_close(got, expected):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        # As Adam has it: a gradient near zero decides a sign.
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_four_processes_lose_the_first_go_on_and_the_run_ends_in_two_and_in_one(
    tmp_path, toy_config, alone, saved_state, assert_same_bits, sub_mesh, monkeypatch
):
    """With the weights sharded over processes, so that each has a part of every checkpoint to write."""
    sharded = {"mesh.fsdp": 4}
    whole = Processes(tmp_path / "whole", 4, devices=2, changes=sharded)
    assert whole.codes() == [0] * 4, whole.said()

    broken = Processes(tmp_path / "broken", 4, READ_SLOWLY, devices=2, changes=sharded)
    committed = wait_for_checkpoint(tmp_path / "broken", 4)
    start = time.monotonic()
    broken.each[0].kill()
    codes = broken.codes(60)
    assert codes[0] == -signal.SIGKILL and set(codes[1:]) <= set(SURVIVORS), codes
    for index in (1, 2, 3):
        said = broken.said(index)
        assert "start all of them again" in said or "another task died" in said
    print(f"killed: the others ended after {time.monotonic() - start:.1f} s with {codes[1:]}")
    again = Processes(tmp_path / "broken", 4, devices=2, changes=sharded)
    assert again.codes() == [0] * 4, again.said()
    assert committed <= int(re.search(r"model: going on from step (\d+)", again.said())[1]) < STEPS
    assert_same_bits(saved_state(tmp_path / "broken"), saved_state(tmp_path / "whole"))
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")

    moved = Processes(tmp_path / "moved", 4, READ_SLOWLY, devices=2, changes=sharded)
    moved.wait_for(f"step 5/{STEPS}")
    moved.each[3].send_signal(signal.SIGTERM)
    assert moved.codes() == [3] * 4
    halves = Processes(tmp_path / "moved", 2, READ_SLOWLY, devices=1)
    halves.wait_for(f"step 16/{STEPS}")
    halves.each[0].send_signal(signal.SIGTERM)
    assert halves.codes() == [3, 3]
    monkeypatch.setattr(trainer.sharding, "make_mesh", lambda config: sub_mesh(8))
    trainer.train(toy_config(CHANGES), str(tmp_path / "moved"))
    expected, _ = alone(8)
    for name in ("whole", "moved"):
        got = saved_state(tmp_path / name)
        assert_close(got["params"], saved_state(expected)["params"])
        # Which examples were chosen, of batches that are the same.
        np.testing.assert_array_equal(got["extra"]["chosen"], saved_state(expected)["extra"]["chosen"])
        for line, other in zip(lines(tmp_path / name), lines(expected), strict=True):
            assert (line["step"], line["black"]) == (other["step"], other["black"])
            assert line["nats"] == pytest.approx(other["nats"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_process_that_hangs_is_given_up_within_a_minute(tmp_path, frozen):
    """Nothing closes its connections: only that it gives no sign of life can tell."""
    processes = Processes(tmp_path / "run", before=READ_SLOWLY)
    processes.wait_for(f"step 6/{STEPS}")
    start = time.monotonic()
    processes.each[frozen].send_signal(signal.SIGSTOP)
    code = processes.each[1 - frozen].wait(75)
    print(f"frozen: the other one ended after {time.monotonic() - start:.1f} s with {code}")
    assert time.monotonic() - start < 60
    assert code in SURVIVORS
    processes.each[frozen].kill()
    processes.codes()
    said = processes.said(1 - frozen)
    assert "start all of them again" in said or "another task died" in said


# The first process alone commits, so it alone meets the full disk.
FULL_DISK = """
    import errno, os
    from bitsperdim import manifest

    write = manifest.write

    def write_until_full(folder, content):
        if content.step == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder, content)

    manifest.write = write_until_full
"""
# Each writes its own part in the background, where all wait for each other.
BROKEN_WRITE = """
    import errno, os
    import jax
    from orbax.checkpoint import type_handlers

    serialize = type_handlers.ArrayHandler.serialize

    class Broken:
        def result(self, timeout=None):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def serialize_until_broken(self, values, infos, args=None):
        futures = await serialize(self, values, infos, args)
        is_broken = jax.process_index() == 1 and "00000008" in str(infos[0].parent_dir)
        return [*futures, Broken()] if is_broken else futures

    type_handlers.ArrayHandler.serialize = serialize_until_broken
"""
# An image that one process alone reads; not in an exchange, so the others cannot be told.
BAD_IMAGE = """
    import jax
    from bitsperdim import data
    from bitsperdim.errors import InputError

    make = data.train_batch

    def make_until_bad(source, seed, index, *rest):
        if index == 10 and jax.process_index() == 1:
            raise InputError("img_0412.jpg is truncated")
        return make(source, seed, index, *rest)

    data.train_batch = make_until_bad
"""


@pytest.mark.slow
def test_what_ends_one_process_ends_the_other_with_a_message(tmp_path):
    full = Processes(tmp_path / "full", before=FULL_DISK)
    assert full.codes(60) == [2, 2], full.said(0) + full.said(1)
    for index, whose in enumerate(("", "process 0 of 2: ")):
        last = full.said(index).splitlines()[-1]
        assert last.startswith(f"error: {whose}cannot write the checkpoint ") and "No space left on device" in last
    assert wait_for_checkpoint(tmp_path / "full", 1) == 4

    broken = Processes(tmp_path / "broken", before=BROKEN_WRITE)
    assert broken.codes(120) == [5, 2], broken.said(0) + broken.said(1)
    assert "Input/output error" in broken.said(1).splitlines()[-1]
    assert "another one has ended, whose message says why" in broken.said(0)
    assert wait_for_checkpoint(tmp_path / "broken", 1) == 4

    bad = Processes(tmp_path / "bad", before=BAD_IMAGE)
    assert bad.codes(60) == [5, 2], bad.said(0) + bad.said(1)
    assert bad.said(1).splitlines()[-1] == "error: img_0412.jpg is truncated"
    assert "another one has ended, whose message says why" in bad.said(0)


EXTRACT_SLOWLY = """
    import sys, time
    from bitsperdim import extracted

    add = extracted.Writer.add

    def add_slowly(self, rows):
        time.sleep(0.2)
        done = add(self, rows)
        print("extracted", done, file=sys.stderr, flush=True)
        return done

    extracted.Writer.add = add_slowly
"""


@pytest.mark.slow
def test_all_stages_of_two_processes_have_the_bits_of_one_though_the_codes_were_interrupted(
    tmp_path, saved_state, assert_same_bits
):
    tiny = {"config": "vqvae2_photos:tiny"}
    one = Processes(tmp_path / "one", 1, after=EVALUATE, devices=2, **tiny)
    assert one.codes(600) == [0], one.said()
    stopped = Processes(tmp_path / "two", 2, EXTRACT_SLOWLY, **tiny)
    stopped.wait_for("extracted", index=1)
    stopped.each[1].send_signal(signal.SIGTERM)
    assert stopped.codes() == [3, 3], stopped.said(0) + stopped.said(1)
    assert not (tmp_path / "two/codes/info.json").exists()
    two = Processes(tmp_path / "two", 2, after=EVALUATE, **tiny)
    assert two.codes(600) == [0, 0], two.said(0) + two.said(1)
    codes = [sorted((tmp_path / name / "codes").glob("*.tfrecord-*")) for name in ("one", "two")]
    assert codes[0]
    for path, other in zip(*codes, strict=True):
        assert (path.name, path.read_bytes()) == (other.name, other.read_bytes())
    for name in ("autoencoder", "top", "bottom"):
        assert_same_bits(saved_state(tmp_path / "two", name=name), saved_state(tmp_path / "one", name=name))
        assert lines(tmp_path / "two", name) == lines(tmp_path / "one", name)
    read = lambda name: json.loads((tmp_path / name / "evaluation.json").read_text())
    assert read("two") == read("one")
    pictures = [sorted(path.name for path in (tmp_path / name).glob("*/images/*")) for name in ("one", "two")]
    assert pictures[0] == pictures[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flows_digits", "vdvae_digits", "arm_digits"])
def test_the_other_families_learn_the_same_in_one_process_and_in_two(tmp_path, name, saved_state):
    """To float32: a process of one device may divide its arithmetic among threads otherwise than one of two."""
    for count in (1, 2):
        config = {"config": f"{name}:tiny", "devices": 2 // count}
        processes = Processes(tmp_path / str(count), count, after=EVALUATE, **config)
        assert processes.codes(300) == [0] * count, processes.said(count - 1)
    one, two = tmp_path / "1", tmp_path / "2"
    figures = [flatten(json.loads((folder / "evaluation.json").read_text())) for folder in (one, two)]
    first, second = ({key: value for key, value in found if not isinstance(value, str)} for found in figures)
    assert second == pytest.approx(first, rel=1e-5)
    for stage in run_lib.open_run(one).stages():
        if stage.settings is not None and not stage.on_request:
            states = (saved_state(folder, name=stage.name)["params"] for folder in (two, one))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *states)
            steps = [[(line["step"], line["kind"]) for line in lines(folder, stage.name)] for folder in (one, two)]
            assert steps[0] == steps[1]
    drawn = [sorted(path.name for path in folder.glob("*/images/*")) for folder in (one, two)]
    assert drawn[0] == drawn[1]
