"""A run that was saved on N devices goes on on M, in both directions, with the same batches and the same noise."""

import jax
import numpy as np
import pytest

from bitsperdim import metrics, trainer

LEG = 4  # steps on each mesh
MOVES = ((8, 1), (1, 1), (2, 4), (1, 8), (4, 2))  # data x fsdp


@pytest.fixture
def train_on(toy_config, sub_mesh, monkeypatch):
    """`train_on(folder, shape, steps)` -> the images of each batch of the toy, trained up to that step on a mesh."""

    def train(folder, shape, steps):
        seen, make = {}, trainer.data.train_batch

        def batch(source, seed, index, *rest):
            made = make(source, seed, index, *rest)
            seen[index] = np.asarray(made["image"])
            return made

        with monkeypatch.context() as patch:
            patch.setattr(trainer.data, "train_batch", batch)
            patch.setattr(trainer.sharding, "make_mesh", lambda config: sub_mesh(*shape))
            trainer.train(toy_config({"train.steps": steps, "mesh.fsdp": shape[1]}), str(folder))
        return seen

    return train


def lines(folder):
    return [line for line in metrics.read(folder / "model" / metrics.FILE) if line["kind"] == "train"]


def test_a_run_that_moves_at_every_save_is_the_one_that_stays(train_on, tmp_path, saved_state):
    moved = {}
    for index, shape in enumerate(MOVES, start=1):
        moved |= train_on(tmp_path / "moved", shape, index * LEG)
    stayed = train_on(tmp_path / "stayed", (8, 1), len(MOVES) * LEG)

    assert moved.keys() == stayed.keys() == set(range(len(MOVES) * LEG))
    for index, images in stayed.items():
        np.testing.assert_array_equal(moved[index], images)
    for line, other in zip(lines(tmp_path / "moved"), lines(tmp_path / "stayed"), strict=True):
        assert (line["step"], line["black"], line["skipped_steps"]) == (other["step"], other["black"], 0)
        # Other dropout or flips would make a difference of 1e-4 and more.
        assert line["nats"] == pytest.approx(other["nats"], rel=2e-5)
    got, expected = (saved_state(tmp_path / name) for name in ("moved", "stayed"))
    np.testing.assert_array_equal(got["extra"]["chosen"], expected["extra"]["chosen"])
    # As Adam has it: where a gradient is near zero, rounding decides its sign.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4)
    jax.tree.map(close, (got["params"], got["ema"]), (expected["params"], expected["ema"]))


def test_on_the_same_mesh_a_sharded_run_that_was_stopped_has_the_bits_of_one_that_was_not(
    train_on, tmp_path, saved_state, assert_same_bits
):
    for steps in (LEG, 2 * LEG):
        train_on(tmp_path / "twice", (2, 4), steps)
    train_on(tmp_path / "once", (2, 4), 2 * LEG)
    assert_same_bits(saved_state(tmp_path / "twice"), saved_state(tmp_path / "once"))
