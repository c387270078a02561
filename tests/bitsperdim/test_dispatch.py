"""Several steps in one program: they change how often the host is asked, and nothing of what is learned."""

import os
import signal

import jax
import numpy as np
import pytest

from bitsperdim import metrics, trainer
from bitsperdim.errors import InputError, Interrupted

STEPS = 24
EVERY = {"train.log_every": 4, "train.evaluate_every": 8, "train.pictures_every": 24, "train.save_every": 12}
ONE = {"train.steps": STEPS, **EVERY}
FOUR = {**ONE, "train.steps_per_dispatch": 4}


def with_values(config, values):
    """The config with keys that its file may not name."""
    with config.unlocked():
        config.update_from_flattened_dict(values)
    return config


def figures(workdir):
    """Every logged line but its speed."""
    records = metrics.read(workdir / "model" / metrics.FILE)
    return [{name: value for name, value in record.items() if name != "images_per_second"} for record in records]


@pytest.fixture(scope="module")
def four(toy_config, tmp_path_factory):
    """A complete run of 24 steps, four to a program; not to be changed."""
    folder = tmp_path_factory.mktemp("dispatch") / "four"
    trainer.train(with_values(toy_config(), FOUR), str(folder))
    return folder


def test_four_steps_in_one_program_leave_the_state_of_four_programs(four, toy_config, tmp_path, saved_state):
    trainer.train(with_values(toy_config(), ONE), str(tmp_path / "one"))
    # Not to the bit: the compiler fuses across the steps of a program.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        saved_state(four),
        saved_state(tmp_path / "one"),
    )
    np.testing.assert_array_equal(
        saved_state(four)["extra"]["chosen"], saved_state(tmp_path / "one")["extra"]["chosen"]
    )
    assert len(figures(four)) == len(figures(tmp_path / "one")) == 9
    for line, expected in zip(figures(four), figures(tmp_path / "one"), strict=True):
        assert line.pop("kind") == expected.pop("kind")
        assert line == pytest.approx(expected, rel=1e-5)
    assert [line["step"] for line in figures(four) if line["kind"] == "train"] == [4, 8, 12, 16, 20, 24]


def test_a_run_that_is_told_to_stop_saves_between_two_programs_and_goes_on_from_there(
    four, toy_config, tmp_path, monkeypatch, saved_state, assert_same_bits
):
    make, stopped = trainer.data.train_batch, []

    def batch_then_stop(source, seed, index, *rest):
        if index == 5 and not stopped:
            stopped.append(index)
            os.kill(os.getpid(), signal.SIGTERM)
        return make(source, seed, index, *rest)

    monkeypatch.setattr(trainer.data, "train_batch", batch_then_stop)
    config = with_values(toy_config(), {**FOUR, "train.save_every": 24})
    with pytest.raises(Interrupted):
        trainer.train(config, str(tmp_path / "run"))
    [saved] = (tmp_path / "run/model/checkpoints").iterdir()
    assert int(saved.name) in range(4, STEPS, 4)
    trainer.train(config, str(tmp_path / "run"))
    assert_same_bits(saved_state(tmp_path / "run"), saved_state(four))
    assert figures(tmp_path / "run") == figures(four)


@pytest.mark.parametrize("name", ["steps", "log_every", "evaluate_every", "pictures_every", "save_every"])
def test_what_happens_within_a_program_cannot_be_asked_for(toy_config, tmp_path, name):
    config = with_values(toy_config(), {**FOUR, f"train.{name}": 6})
    with pytest.raises(
        InputError, match=rf"config value train\.{name} must be a multiple of steps_per_dispatch=4, not 6"
    ):
        trainer.train(config, str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []
