"""Checkpoints under damage, kills, other meshes and full disks."""

import json
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bitsperdim import checkpoint, manifest
from bitsperdim.checkpoint import Checkpoints
from bitsperdim.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def mesh(devices):
    return jax.make_mesh(
        (devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
    )


def make_state(seed, devices=8):
    """A train state of many dtypes and containers, its kernel sharded, the rest replicated."""
    keys = jax.random.split(jax.random.key(seed), 3)
    kernel = jax.random.normal(keys[0], (16, 24))
    params = {"conv": {"kernel": kernel, "bias": jnp.arange(24, dtype=jnp.bfloat16) * seed}}
    state = {
        "step": jnp.int32(seed),
        "params": params,
        "ema": jax.tree.map(lambda leaf: leaf + 1, params),
        "opt": optax.chain(optax.scale_by_adamax(), optax.scale_by_schedule(lambda _: 1.0)).init(params),
        "extra": {"counts": jnp.arange(7, dtype=jnp.uint8), "none": jnp.zeros((0, 3)), "moments": [kernel[:1] * 2]},
    }
    shard = lambda leaf: NamedSharding(mesh(devices), P("data") if leaf.shape == (16, 24) else P())
    return jax.device_put(state, jax.tree.map(shard, state))


def abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_all(folder, *steps, **kwargs):
    with Checkpoints(folder, **kwargs) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step))


def restored(folder, like=None):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(abstract(make_state(0)) if like is None else like)


def data_file(folder, step):
    """The largest file of a checkpoint: array data."""
    return max((folder / f"{step:08d}").rglob("d/*"), key=lambda path: path.stat().st_size)


def test_round_trip_is_bit_equal_and_keeps_containers_and_shardings(tmp_path):
    save_all(tmp_path, 5)
    step, state = restored(tmp_path)
    assert step == 5
    assert_same(state, make_state(5))
    assert state["params"]["conv"]["kernel"].sharding == make_state(5)["params"]["conv"]["kernel"].sharding
    assert isinstance(state["opt"][0], optax.ScaleByAdamState)


@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8)])
def test_a_state_moves_to_another_mesh(tmp_path, before, after):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1, before))
    _, state = restored(tmp_path, abstract(make_state(1, after)))
    assert_same(state, make_state(1))
    assert len(state["params"]["conv"]["kernel"].sharding.device_set) == after


def test_without_shardings_a_state_comes_to_the_first_device(tmp_path):
    save_all(tmp_path, 1)
    _, state = restored(tmp_path, jax.eval_shape(lambda: make_state(1)))
    assert_same(state, make_state(1))
    assert {device.id for leaf in jax.tree.leaves(state) for device in leaf.devices()} == {0}


def test_whole_entries_may_be_left_unread(tmp_path):
    save_all(tmp_path, 1)
    state = make_state(1)
    wanted = {"ema": state["ema"], "extra": state["extra"]}
    assert_same(restored(tmp_path, abstract(wanted))[1], wanted)


def test_donating_the_state_does_not_change_what_is_saved(tmp_path):
    update = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0, state), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        state = make_state(3)
        checkpoints.save(3, state)
        jax.block_until_ready(update(state))
    assert_same(restored(tmp_path)[1], make_state(3))


def test_nothing_saved_restores_nothing(tmp_path):
    assert restored(tmp_path / "absent") is None


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_bit, "has changed since it was written"),
        (cut, r"has [\d,]+ of [\d,]+ bytes"),
        (pathlib.Path.unlink, "cannot be read \\(No such file"),
    ],
)
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_taken(tmp_path, capsys, damage, message):
    save_all(tmp_path, 1, 2)
    victim = data_file(tmp_path, 2)
    damage(victim)
    step, state = restored(tmp_path)
    assert step == 1
    assert_same(state, make_state(1))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: checkpoint of step 2 is damaged: {victim} ")
    with pytest.raises(InputError, match=message), Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore_step(2, abstract(make_state(2)))


@pytest.mark.parametrize("position", [0.01, 0.5, 0.99])
def test_a_flipped_bit_in_the_manifest_is_noticed(tmp_path, capsys, position):
    save_all(tmp_path, 1, 2)
    path = tmp_path / "00000002" / "manifest.json"
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1
    path.write_bytes(content)
    assert restored(tmp_path)[0] == 1
    assert "manifest.json" in capsys.readouterr().err


def test_all_damaged_is_an_error_that_names_them(tmp_path, capsys):
    save_all(tmp_path, 1, 2)
    for step in (1, 2):
        flip_bit(data_file(tmp_path, step))
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged"):
        restored(tmp_path)
    err = capsys.readouterr().err
    assert "step 1 is damaged" in err and "step 2 is damaged" in err


def test_without_a_manifest_nothing_is_committed_and_the_next_save_clears_it(tmp_path):
    save_all(tmp_path, 1, 2)
    (tmp_path / "00000002" / "manifest.json").unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        assert checkpoints.restore(abstract(make_state(1)))[0] == 1
        checkpoints.save(2, make_state(7))
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        assert_same(checkpoints.restore(abstract(make_state(1)))[1], make_state(7))


def test_reading_a_folder_changes_nothing_in_it(tmp_path):
    # Evaluation may read the folder of a training that is in the middle of a save.
    save_all(tmp_path, 1)
    (tmp_path / "00000002" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert restored(tmp_path)[0] == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_saving_a_step_again_replaces_it(tmp_path):
    save_all(tmp_path, 1, 2)
    for seed in (8, 9):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(2, make_state(seed))
        assert_same(restored(tmp_path)[1], make_state(seed))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1, 2]


def test_a_damaged_newer_checkpoint_does_not_outlive_the_next_good_one(tmp_path):
    save_all(tmp_path, 1, 2)
    flip_bit(data_file(tmp_path, 2))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.restore(abstract(make_state(1)))[0] == 1
        checkpoints.save(2, make_state(2))
    assert_same(restored(tmp_path)[1], make_state(2))


def test_the_newest_are_kept(tmp_path):
    save_all(tmp_path, 10, 20, 30, 40, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000030", "00000040"]


@pytest.mark.parametrize(("direction", "best"), [("min", 20), ("max", 10)])
def test_the_best_is_kept_across_restarts(tmp_path, direction, best):
    values = {10: 5.0, 20: 3.0, 30: 3.0, 40: float("nan"), 50: 4.0}
    for step, value in values.items():
        with Checkpoints(tmp_path, keep=1, best=("bits_per_dim", direction)) as checkpoints:
            checkpoints.save(step, make_state(step), {"bits_per_dim": value})
    with Checkpoints(tmp_path, best=("bits_per_dim", direction)) as checkpoints:
        assert checkpoints.steps() == [best, 50]
        assert checkpoints.best_step() == best
        assert_same(checkpoints.restore_step(best, abstract(make_state(0))), make_state(best))


def test_a_step_that_is_not_there_is_named_with_those_that_are(tmp_path):
    save_all(tmp_path, 10, 20)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(InputError, match="no checkpoint of step 15; there is 10, 20"),
    ):
        checkpoints.restore_step(15, abstract(make_state(0)))


def without(state, entry, name):
    return {**state, entry: {key: value for key, value in state[entry].items() if key != name}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {**s, "extra": {**s["extra"], "counts": jnp.zeros(8, jnp.uint8)}},
            r"'extra/counts' is uint8\[7\] in .*00000001, but should be uint8\[8\]",
        ),
        (
            lambda s: {**s, "step": jnp.float32(0)},
            r"'step' is int32\[\] in .*, but should be float32\[\]",
        ),
        (
            lambda s: {**s, "extra": {**s["extra"], "usage": jnp.zeros(2)}},
            r"has no array 'extra/usage', which should be float32\[2\]",
        ),
        (lambda s: without(s, "extra", "counts"), r"has an array 'extra/counts' uint8\[7\], which should not be there"),
    ],
)
def test_a_state_of_another_config_is_refused_by_name(tmp_path, change, message):
    save_all(tmp_path, 1)
    with pytest.raises(InputError, match=message):
        restored(tmp_path, abstract(change(make_state(1))))


@pytest.mark.parametrize("place", ["before the manifest", "before removals", "within a removal"])
def test_a_death_around_the_commit_leaves_a_whole_checkpoint(tmp_path, monkeypatch, place):
    """Stops the thread where a kill would be hardest to time, then goes on as a new process would."""
    save_all(tmp_path, 1, keep=1)

    def die(*_):
        raise SystemError("killed")

    with monkeypatch.context() as patch:
        if place == "before the manifest":
            patch.setattr(manifest, "write", die)
        elif place == "before removals":
            patch.setattr(Checkpoints, "_remove_old", die)
        else:
            patch.setattr(type(checkpoint.epath.Path(tmp_path)), "rmtree", die)
        with pytest.raises(SystemError), Checkpoints(tmp_path, keep=1) as checkpoints:
            checkpoints.save(2, make_state(2))
    expected = 1 if place == "before the manifest" else 2
    step, state = restored(tmp_path)
    assert step == expected
    assert_same(state, make_state(expected))
    save_all(tmp_path, 2, keep=1)
    assert_same(restored(tmp_path)[1], make_state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["00000002"]


# A training that saves after every step and says which steps are committed for certain.
SAVER = """
    import sys
    import jax.numpy as jnp, jax
    from bitsperdim.checkpoint import Checkpoints

    make = lambda step: {"step": jnp.int32(step), "params": {"w": jnp.arange(2**18, dtype=jnp.float32) * step}}
    checkpoints = Checkpoints(sys.argv[1], keep=2)
    found = checkpoints.restore(jax.eval_shape(lambda: make(0)))
    step = found[0] if found else 0
    while True:
        step += 1
        checkpoints.save(step, make(step))  # has waited for the step before
        print(step - 1, flush=True)
"""


def test_kill_at_any_moment_loses_no_committed_step(tmp_path):
    like = jax.eval_shape(lambda: {"step": jnp.int32(0), "params": {"w": jnp.zeros(2**18)}})
    delays, committed = random.Random(0), 0
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SAVER), str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            started = [process.stdout.readline() for _ in range(2)]
            time.sleep(delays.uniform(0.0, 0.3))
            process.send_signal(signal.SIGKILL)
            said, errors = process.communicate()
        assert errors == ""
        committed = int("".join([*started, said]).split()[-1])
        step, state = restored(tmp_path, like)
        assert step in (committed, committed + 1)
        np.testing.assert_array_equal(state["params"]["w"], np.arange(2**18, dtype=np.float32) * step)
    assert committed >= 4


# No file may grow beyond 100 kB: the system refuses the data of the second save as it would on a full disk.
FULL_DISK = """
    import resource, sys
    import jax, jax.numpy as jnp
    from bitsperdim.checkpoint import Checkpoints
    from bitsperdim.errors import InputError

    make = lambda step: {"w": jax.random.normal(jax.random.key(step), (2**18,))}
    with Checkpoints(sys.argv[1], keep=1) as checkpoints:
        checkpoints.save(1, make(1))
        checkpoints.wait()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        checkpoints.save(2, make(2))
        try:
            checkpoints.save(3, make(3))
        except InputError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        print("restored", checkpoints.restore(jax.eval_shape(lambda: make(0)))[0])
        checkpoints.save(3, make(3))
        checkpoints.wait()
        print("kept", checkpoints.steps())
"""


def test_a_full_disk_is_reported_at_the_next_call_and_the_last_checkpoint_stays(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    first, *rest = done.stdout.splitlines()
    assert first.startswith(f"cannot write the checkpoint {tmp_path}/00000002: File too large; make room")
    assert rest == ["restored 1", "kept [3]"]
    assert "orbax" not in done.stderr


def test_a_folder_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write the checkpoint .*file/00000001: Not a directory"):
        save_all(tmp_path / "file", 1)


def test_the_manifest_is_plain_json_without_pickles(tmp_path):
    save_all(tmp_path, 1)
    content = json.loads((tmp_path / "00000001" / "manifest.json").read_text())
    assert content["arrays"]["params/conv/bias"] == "bfloat16[24]"
    files = [path for path in (tmp_path / "00000001" / "state").rglob("*") if path.is_file()]
    assert sorted(content["files"]) == sorted(str(path.relative_to(tmp_path / "00000001" / "state")) for path in files)


def test_nothing_is_said_when_all_is_well(tmp_path, capfd):
    save_all(tmp_path, 1, 2, 3)
    restored(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_names_that_would_collide_are_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="same path"):
        checkpoints.save(1, {"a": {"b": jnp.zeros(1)}, "a/b": jnp.zeros(1)})
