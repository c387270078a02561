"""A run that is killed, or told to stop, ends with the bits of one that was left alone."""

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import toy_family

from bitsperdim import metrics, trainer
from bitsperdim.errors import Interrupted

TOY = pathlib.Path(toy_family.__file__).parent
STEPS = 40
CHANGES = {"train.steps": STEPS, "train.save_every": 1, "train.evaluate_every": 10, "train.pictures_every": 40}


@pytest.fixture(scope="module")
def unbroken(toy_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    trainer.train(toy_config(CHANGES), str(folder))
    return folder


def start(workdir, before="", **changes):
    """train.py in a process of its own; `before` is run first, in the same process."""
    script = f"{textwrap.dedent(before)}\nfrom bitsperdim import scripts\nscripts.train()"
    changes = CHANGES | {f"train.{name}": value for name, value in changes.items()}
    flags = [f"--config={TOY / 'toy.py'}", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in changes.items())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TOY), *sys.path])}
    command = [sys.executable, "-c", script, *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)


def read_until(process, pattern):
    """What the process says up to the first line with `pattern`."""
    said = []
    for line in process.stderr:
        said.append(line)
        if re.search(pattern, line):
            return "".join(said)
    raise AssertionError(f"{pattern!r} was never said:\n{''.join(said)}")


def assert_same_run(got, expected, saved_state, assert_same_bits):
    """Every array of the last two checkpoints, and every logged figure but the speed."""
    for step in (STEPS - 1, STEPS):
        assert_same_bits(saved_state(got, step), saved_state(expected, step))
    lines = [metrics.read(folder / "model" / metrics.FILE) for folder in (got, expected)]
    for line in [*lines[0], *lines[1]]:
        line.pop("images_per_second", None)
    assert lines[0] == lines[1]


# The process kills itself where a parent could hardly time it: the arrays of step 30 are on the disk, nothing commits
# them yet. Then, at step 35, when the manifest is there and the older checkpoint is half removed.
DIE_IN_A_SAVE = """
    import os, signal
    from bitsperdim import manifest
    from bitsperdim.checkpoint import Checkpoints

    write, remove = manifest.write, Checkpoints._remove_old

    def write_or_die(folder, content):
        if content.step == {before_commit}:
            os.kill(os.getpid(), signal.SIGKILL)
        write(folder, content)

    def remove_or_die(self, newest):
        if newest == {after_commit}:
            (self._path(newest - 2) / manifest.FILE).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        remove(self, newest)

    manifest.write, Checkpoints._remove_old = write_or_die, remove_or_die
"""


def test_killed_at_any_moment_a_run_ends_with_the_bits_of_the_unbroken_one(
    tmp_path, toy_config, unbroken, saved_state, assert_same_bits
):
    moments, starts = random.Random(0), []

    with start(tmp_path) as process:
        read_until(process, "step 5/")
        time.sleep(moments.uniform(0.0, 0.15))
        process.kill()
        process.communicate()
    for before_commit, after_commit in ((30, 0), (0, 35)):
        with start(tmp_path, DIE_IN_A_SAVE.format(before_commit=before_commit, after_commit=after_commit)) as process:
            starts.append(read_until(process, "going on from step|parameters"))
            process.communicate()
        assert process.returncode == -signal.SIGKILL
    trainer.train(toy_config(CHANGES), str(tmp_path))

    assert "going on from step" in starts[0]
    assert "going on from step 29" in starts[1]
    assert_same_run(tmp_path, unbroken, saved_state, assert_same_bits)


# Reading takes a while, so that the signal comes before the end.
READ_SLOWLY = """
    import time
    from bitsperdim import data

    make = data.train_batch
    data.train_batch = lambda *arguments: (time.sleep(0.05), make(*arguments))[1]
"""


def test_told_to_stop_a_run_saves_exits_with_3_and_goes_on(
    tmp_path, toy_config, unbroken, saved_state, assert_same_bits
):
    for number, step in ((signal.SIGTERM, 5), (signal.SIGINT, 20)):
        # The only checkpoint there can be is the one that the signal asks for.
        with start(tmp_path, READ_SLOWLY, save_every=1000) as process:
            read_until(process, f"step {step}/")
            process.send_signal(number)
            _, said = process.communicate()
        assert process.returncode == 3
        saved = int(re.search(r"model: saved at step (\d+)", said)[1])
        assert saved >= step
        assert said.splitlines()[-1] == f"error: stopped by {number.name}; the same command goes on from here"
        assert "Traceback" not in said
        assert saved_state(tmp_path)["step"] == saved
    trainer.train(toy_config(CHANGES), str(tmp_path))
    assert_same_run(tmp_path, unbroken, saved_state, assert_same_bits)


def test_a_signal_in_an_evaluation_stops_it_and_the_next_start_makes_it(
    tmp_path, toy_config, unbroken, saved_state, assert_same_bits, monkeypatch
):
    """The figures are those of the unbroken run, each step is there once, and the best step has its figure."""
    measured, batches = [], trainer.evaluation.data.evaluation_batches

    def slow_batches(source, *rest):
        for index, batch in enumerate(batches(source, *rest)):
            measured.append(index)
            if len(measured) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(trainer.evaluation.data, "evaluation_batches", slow_batches)
    changes = CHANGES | {"train.save_every": 10, "train.best_metric": "nats"}
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        trainer.train(toy_config(changes), str(tmp_path / "run"))
    assert measured == list(range(5))  # of 23
    assert saved_state(tmp_path / "run")["step"] == 10
    run = trainer.train(toy_config(changes), str(tmp_path / "run"))
    monkeypatch.undo()
    kept = [metrics.read(folder / "model" / metrics.FILE) for folder in (tmp_path / "run", unbroken)]
    for line in [*kept[0], *kept[1]]:
        line.pop("images_per_second", None)
    assert kept[0] == kept[1]
    assert_same_bits(saved_state(tmp_path / "run", STEPS), saved_state(unbroken, STEPS))
    with trainer.checkpoints_of(run, run.stage("model")) as checkpoints:
        logged = {line["step"]: line["nats"] for line in kept[1] if line["kind"] == "evaluation"}
        assert checkpoints.best_step() == min(logged, key=logged.get)


def test_the_last_evaluation_is_made_in_full(tmp_path, toy_config, monkeypatch):
    """A complete stage is not started again, so nothing would make up for it."""
    batches = trainer.evaluation.data.evaluation_batches

    def stopping_batches(source, *rest):
        os.kill(os.getpid(), signal.SIGTERM)
        yield from batches(source, *rest)

    monkeypatch.setattr(trainer.evaluation.data, "evaluation_batches", stopping_batches)
    with pytest.raises(Interrupted):
        trainer.train(toy_config({"train.steps": 3}), str(tmp_path))
    lines = metrics.read(tmp_path / "model" / metrics.FILE)
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [3]


# An hour in short sleeps: a signal that comes just before a sleep begins is seen only after it.
IMPORT_SLOWLY = """
    import sys, time

    class Slow:
        def find_spec(self, name, *_):
            if name == "jax":
                print("importing jax", file=sys.stderr, flush=True)
                [time.sleep(0.1) for _ in range(36_000)]

    sys.meta_path.insert(0, Slow())
"""
OPEN_SLOWLY = """
    import sys, time
    from bitsperdim import data

    def open_slowly(*_):
        try:
            print("opening the data", file=sys.stderr, flush=True)
            [time.sleep(0.1) for _ in range(36_000)]
        except Exception:  # as a reader of files has it
            print("taken for an error of the reader", file=sys.stderr)

    data.open_source = open_slowly
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("before, moment", [(IMPORT_SLOWLY, "importing"), (OPEN_SLOWLY, "opening")])
def test_told_to_stop_before_it_trains_it_ends_at_once_with_3_and_leaves_nothing(tmp_path, before, moment, number):
    with start(tmp_path / "run", before) as process:
        read_until(process, moment)
        process.send_signal(number)
        _, said = process.communicate(timeout=600)  # far less than what it is held up for
    assert (process.returncode, said.splitlines()) == (
        3,
        [f"stopped by {number.name}; the same command goes on from what is saved"],
    )
    assert list(tmp_path.iterdir()) == []


def test_no_batch_is_left_out_or_seen_twice(toy_config, tmp_path, monkeypatch):
    """The images that reach the step, across a stop for which the thread that reads ahead is not the right moment."""
    make, read, stopped = trainer.data.train_batch, {}, []

    def batch_then_stop(source, seed, index, *rest):
        batch = make(source, seed, index, *rest)
        read.setdefault(index, []).append(np.asarray(batch["image"]))
        if index == 5 and not stopped:
            stopped.append(index)
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    monkeypatch.setattr(trainer.data, "train_batch", batch_then_stop)
    with pytest.raises(Interrupted):
        trainer.train(toy_config({"train.save_every": 1000}), str(tmp_path / "run"))
    [saved] = (tmp_path / "run/model/checkpoints").iterdir()
    trainer.train(toy_config({"train.save_every": 1000}), str(tmp_path / "run"))
    # Batches that were read ahead and not used come again; those before the checkpoint do not.
    assert {index: len(images) for index, images in read.items() if index < int(saved.name)} == dict.fromkeys(
        range(int(saved.name)), 1
    )
    assert sorted(read) == list(range(12))
    for images in read.values():
        for again in images[1:]:
            np.testing.assert_array_equal(again, images[0])
