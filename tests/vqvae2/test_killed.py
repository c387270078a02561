"""A whole VQ-VAE-2 run, killed at random moments, ends with the bits of one that was left alone."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from bitsperdim import run as run_lib
from bitsperdim import trainer

ROOT = pathlib.Path(__file__).resolve().parents[2]
KILLS = 5
STEPS = {"autoencoder": 400, "top": 200, "bottom": 200}


def command(workdir):
    flags = [f"--config.{stage}.train.steps={steps}" for stage, steps in STEPS.items()]
    # A save a step or two: the random moments are to fall into saves too.
    flags += [f"--config.{stage}.train.save_every=2" for stage in STEPS]
    return [sys.executable, str(ROOT / "train.py"), "--config=vqvae2_photos:tiny", f"--workdir={workdir}", *flags]


def environment(folder):
    return os.environ | {"XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(folder / "xla")}


def saves_under_way(workdir):
    """Checkpoint folders whose manifest, the commit, was never written."""
    folders = [path for path in pathlib.Path(workdir).glob("*/checkpoints/*") if path.is_dir()]
    return [path for path in folders if not (path / "manifest.json").exists()]


def arrays(workdir):
    """Every array of the last checkpoint of every stage, and the codes, by name."""
    run = run_lib.open_run(workdir)
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    found = {path.name: np.fromfile(path, np.uint8) for path in run.folder("codes").glob("*.tfrecord-*")}
    for name in STEPS:
        stage = run.stage(name)
        with trainer.checkpoints_of(run, stage) as checkpoints:
            like = trainer.abstract_state(run, stage, stage.model(run), mesh)
            step, state = checkpoints.restore(like)
        assert step == STEPS[name]
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            found[f"{name}/{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    return found


@pytest.mark.slow
def test_five_kills_at_random_moments_change_no_bit(tmp_path):
    subprocess.run(command(tmp_path / "unbroken"), env=environment(tmp_path), check=True)
    rng, inside_a_save, kills = random.Random(0), 0, 0
    while kills < KILLS or not inside_a_save:
        process = subprocess.Popen(command(tmp_path / "killed"), env=environment(tmp_path), stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(3.0, 9.0))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        inside_a_save += bool(saves_under_way(tmp_path / "killed"))
    assert kills >= KILLS, "the run ended before it was killed often enough: give it more steps"
    assert inside_a_save, "no kill fell into a save"
    subprocess.run(command(tmp_path / "killed"), env=environment(tmp_path), check=True)
    got, expected = arrays(tmp_path / "killed"), arrays(tmp_path / "unbroken")
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].tobytes() == array.tobytes(), name
    assert json.loads((tmp_path / "killed/codes/info.json").read_text()) == json.loads(
        (tmp_path / "unbroken/codes/info.json").read_text()
    )
    print(f"{kills} kills, {inside_a_save} of them inside a save: every array has equal bits")
