"""The checkpoint with the best evaluation figure: kept beside the newest, and used after training."""

import math

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

import bitsperdim
from bitsperdim import metrics, sharding, trainer
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError

# A rate at which the toy model gets better for a few steps and then far worse.
CHANGES = {
    "optim.learning_rate": 0.3,
    "optim.warmup_steps": 40,
    "train.ema_decay": 0.0,
    "train.clip_norm": 1e6,
    "train.steps": 24,
    "train.evaluate_every": 4,
    "train.save_every": 4,
    "train.pictures_every": 24,
    "train.keep_checkpoints": 1,
}


def best_config(toy_config, changes=()):
    config = toy_config()
    with config.unlocked():
        config.update_from_flattened_dict({**CHANGES, "train.best_metric": "nats", **dict(changes)})
    return config


def evaluations(workdir):
    """nats by step, as logged."""
    lines = metrics.read(workdir / "model" / metrics.FILE)
    return {line["step"]: line["nats"] for line in lines if line["kind"] == "evaluation"}


def kept(workdir):
    return sorted(int(path.name) for path in (workdir / "model" / "checkpoints").iterdir())


def nats(params):
    """-log p of the held-out digits under the toy model, in numpy."""
    x = load_digits().data[-360:] / 16.0
    mean = x @ params["encoder"]["kernel"] @ params["decoder"]["kernel"] + params["decoder"]["bias"]
    return (0.5 * np.square(x - mean).sum(1) + 32 * math.log(2.0 * math.pi)).mean()


@pytest.fixture(scope="module")
def run(toy_config, tmp_path_factory):
    """A complete run whose best step is not its last; not to be changed."""
    return trainer.train(best_config(toy_config), str(tmp_path_factory.mktemp("best") / "run"))


@pytest.fixture(scope="module")
def best(run):
    logged = evaluations(run.workdir)
    return min(logged, key=logged.get)


def test_the_best_of_the_saved_steps_is_kept_beside_the_newest(run, best):
    assert 4 < best < 20
    assert kept(run.workdir) == [best, 24]


def test_what_is_restored_evaluated_and_sampled_is_the_best(run, best):
    logged = evaluations(run.workdir)[best]
    _, state = trainer.restore(run, "model", sharding.make_mesh(run.config.mesh))
    assert int(state["step"]) == best
    assert nats(jax.device_get(state["ema"])) == pytest.approx(logged, rel=1e-5)
    measured = trainer.evaluate(run_lib.open_run(run.workdir), "evaluation")
    assert (measured["model"]["step"], measured["model"]["nats"]) == (best, logged)
    # Without noise the toy family draws the bias of its decoder.
    drawn = bitsperdim.load(run.workdir).sample(jax.random.key(0), 2, temperature=0.0)
    expected = np.clip(16.0 * np.asarray(state["ema"]["decoder"]["bias"]), 0, 16).astype(np.uint8)
    np.testing.assert_array_equal(drawn.reshape(2, -1), np.tile(expected, (2, 1)))


def test_another_run_begins_with_the_best_weights_too(
    run, best, toy_config, tmp_path, monkeypatch, capsys, saved_state, assert_same_bits
):
    class Begun(Exception):
        """Ends the run once its state is there."""

    def begin(state):
        raise Begun(jax.device_get(state))

    monkeypatch.setattr(trainer.state_lib, "num_params", begin)
    with pytest.raises(Begun) as begun:
        trainer.train(best_config(toy_config), str(tmp_path / "run"), init_from=str(run.workdir))
    assert f"starting with the weights of step {best} of " in capsys.readouterr().err
    [state] = begun.value.args
    assert_same_bits(state["params"], saved_state(run.workdir, best)["ema"])


def test_training_goes_on_from_the_newest(toy_config, tmp_path, capsys, run, best, saved_state, assert_same_bits):
    folder = tmp_path / "run"
    trainer.train(best_config(toy_config, {"train.steps": 20}), str(folder))
    trainer.train(best_config(toy_config), str(folder))
    assert "going on from step 20" in capsys.readouterr().err
    assert kept(folder) == [best, 24]
    assert_same_bits(saved_state(folder), saved_state(run.workdir))


def test_a_figure_that_the_evaluation_lacks_is_answered_with_those_it_has(toy_config, tmp_path):
    config = best_config(toy_config, {"train.best_metric": "bits_per_dimm"})
    message = "best_metric 'bits_per_dimm' is no figure of the evaluation; there are images, nats, bits_per_dim, black"
    with pytest.raises(InputError, match=message):
        trainer.train(config, str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []  # so that the right name may be given to the same folder


def test_saves_without_a_figure_are_refused(toy_config, tmp_path):
    message = r"config value train\.save_every must be a multiple of evaluate_every=8 where best_metric is set, not 4"
    with pytest.raises(InputError, match=message):
        trainer.train(best_config(toy_config, {"train.evaluate_every": 8}), str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []
