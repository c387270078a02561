"""The loop on the toy family: what it learns, logs, refuses and leaves behind."""

import json
import math

import numpy as np
import pytest
from sklearn.datasets import load_digits

from bitsperdim import metrics, trainer
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError, NonFiniteError

D = 64


def lines(workdir, kind):
    return [line for line in metrics.read(workdir / "model" / metrics.FILE) if line["kind"] == kind]


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def nats(params):
    """-log p of the held-out digits under the toy model, in numpy."""
    x = load_digits().data[-360:] / 16.0
    mean = x @ params["encoder"]["kernel"] @ params["decoder"]["kernel"] + params["decoder"]["bias"]
    return 0.5 * np.square(x - mean).sum(1) + 0.5 * D * math.log(2.0 * math.pi)


@pytest.fixture(scope="module")
def finished(toy_config, tmp_path_factory):
    """A run of 60 steps that is complete; not to be changed."""
    folder = tmp_path_factory.mktemp("trainer") / "run"
    changes = {"train.steps": 60, "train.log_every": 7, "train.evaluate_every": 25, "train.save_every": 20}
    trainer.train(toy_config(changes), str(folder))
    return folder, toy_config(changes)


def test_a_trained_model_beats_the_best_that_ignores_its_input(finished):
    # The mean image is the best constant; its figure needs no model of ours.
    folder, _ = finished
    digits = load_digits().data / 16.0
    constant = 0.5 * np.square(digits[-360:] - digits[:-360].mean(0)).sum(1).mean() + 0.5 * D * math.log(2 * math.pi)
    assert lines(folder, "evaluation")[-1]["nats"] < constant


def test_the_figures_are_those_of_the_polyak_weights_in_the_checkpoint(finished, saved_state):
    folder, _ = finished
    expected = nats(saved_state(folder)["ema"])
    last = lines(folder, "evaluation")[-1]
    assert last["nats"] == pytest.approx(expected.mean(), rel=1e-6)
    assert last["nats_standard_error"] == pytest.approx(expected.std(ddof=1) / math.sqrt(360), rel=1e-5)
    measured = trainer.evaluate(run_lib.open_run(folder), "evaluation")
    assert measured["model"]["nats"] == last["nats"]
    assert measured["bits_per_dim"] == pytest.approx(expected.mean() / D / math.log(2.0), rel=1e-6)


def test_everything_happens_at_its_interval_and_at_the_last_step(finished):
    folder, _ = finished
    assert [line["step"] for line in lines(folder, "train")] == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    assert [line["step"] for line in lines(folder, "evaluation")] == [25, 50, 60]
    assert sorted(path.name for path in (folder / "model" / "checkpoints").iterdir()) == ["00000040", "00000060"]
    pictures = sorted(path.name for path in (folder / "model" / "images").iterdir())
    assert pictures == ["curves.png"] + [f"rows-{step:08d}.png" for step in (8, 16, 24, 32, 40, 48, 56, 60)]


def test_a_logged_figure_is_the_mean_over_every_step_since_the_last(finished, toy_config, tmp_path):
    folder, _ = finished
    trainer.train(toy_config({"train.steps": 14}), str(tmp_path / "run"))
    each = [line["nats"] for line in lines(tmp_path / "run", "train")]
    first, second = lines(folder, "train")[:2]
    assert first["nats"] == pytest.approx(np.mean(each[:7]), rel=1e-6)
    assert second["nats"] == pytest.approx(np.mean(each[7:]), rel=1e-6)
    assert [line["steps"] for line in lines(folder, "train")] == [7] * 8 + [4]


def test_a_start_between_two_logs_is_followed_by_a_mean_over_fewer_steps_which_is_said(toy_config, tmp_path):
    for steps in (5, 14):
        trainer.train(toy_config({"train.steps": steps, "train.log_every": 7}), str(tmp_path / "stopped"))
    trainer.train(toy_config({"train.steps": 14}), str(tmp_path / "run"))
    each = [line["nats"] for line in lines(tmp_path / "run", "train")]
    logged = lines(tmp_path / "stopped", "train")
    assert [(line["step"], line["steps"]) for line in logged] == [(5, 5), (7, 2), (14, 7)]
    for line in logged:
        first = line["step"] - int(line["steps"])
        assert line["nats"] == pytest.approx(np.mean(each[first : line["step"]]), rel=1e-6)


def test_a_complete_run_says_so_and_nothing_in_it_changes(finished, capsys):
    folder, config = finished
    before = contents(folder)
    trainer.train(config, str(folder))
    assert "is complete: nothing left to do" in capsys.readouterr().err
    assert contents(folder) == before


def test_a_longer_run_goes_on_from_a_complete_one_as_if_it_had_never_ended(
    toy_config, tmp_path, saved_state, assert_same_bits
):
    for steps in (5, 11):
        trainer.train(toy_config({"train.steps": steps}), str(tmp_path / "twice"))
    trainer.train(toy_config({"train.steps": 11}), str(tmp_path / "once"))
    assert_same_bits(saved_state(tmp_path / "twice"), saved_state(tmp_path / "once"))
    assert [line["step"] for line in lines(tmp_path / "twice", "train")] == list(range(1, 12))


def test_how_often_it_looks_changes_nothing_of_what_it_learns(toy_config, tmp_path, saved_state, assert_same_bits):
    often = {"train.evaluate_every": 1, "train.pictures_every": 1, "train.save_every": 1, "train.steps": 6}
    seldom = {name: 6 for name in [*often, "train.log_every"]}
    for name, changes in (("often", often), ("seldom", seldom)):
        trainer.train(toy_config(changes), str(tmp_path / name))
    assert_same_bits(saved_state(tmp_path / "often"), saved_state(tmp_path / "seldom"))


def test_a_seed_decides_the_run(toy_config, tmp_path, saved_state):
    for seed in (1, 2):
        trainer.train(toy_config({"seed": seed, "train.steps": 2}), str(tmp_path / str(seed)))
    first, second = (saved_state(tmp_path / str(seed))["params"]["encoder"]["kernel"] for seed in (1, 2))
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.2


def test_a_run_that_stays_non_finite_ends_and_keeps_its_last_finite_state(toy_config, tmp_path, saved_state):
    folder = tmp_path / "run"
    changes = {"model.nan_from": 6, "train.max_non_finite": 3, "train.steps": 100, "train.save_every": 1}
    with pytest.raises(NonFiniteError, match=r"not finite for 3 steps in a row, up to step 9; lower the learning rate"):
        trainer.train(toy_config(changes), str(folder))
    state = saved_state(folder)
    assert all(np.isfinite(leaf).all() for name in ("params", "ema") for leaf in state[name]["decoder"].values())
    assert state["skips"]["total"] == state["step"] - 6
    # JSON has no NaN: what is not finite is written as null.
    assert lines(folder, "train")[-1]["objective"] is None


def test_a_shorter_spell_of_non_finite_steps_is_passed_over(toy_config, tmp_path, saved_state):
    config = toy_config({"model.nan_from": 6, "train.max_non_finite": 4})
    with config.unlocked():
        config.model.nan_until = 9
    trainer.train(config, str(tmp_path / "run"))
    assert saved_state(tmp_path / "run")["skips"]["total"] == 3


@pytest.mark.parametrize("nan_from", [0, 11])
def test_a_run_that_ends_non_finite_is_not_complete(toy_config, tmp_path, nan_from):
    message = rf"not finite for {12 - nan_from} steps in a row, up to step 12; "
    with pytest.raises(NonFiniteError, match=message):
        trainer.train(toy_config({"model.nan_from": nan_from}), str(tmp_path / "run"))
    run = run_lib.open_run(tmp_path / "run")
    assert not trainer.is_complete(run, run.stage("model"))


def test_a_damaged_checkpoint_is_named_and_the_run_ends_as_it_should(
    toy_config, tmp_path, capsys, saved_state, assert_same_bits
):
    folder = tmp_path / "run"
    trainer.train(toy_config({"train.steps": 10}), str(folder))
    victim = max((folder / "model/checkpoints/00000010").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 255
    victim.write_bytes(content)
    trainer.train(toy_config(), str(folder))
    said = capsys.readouterr().err
    assert f"checkpoint of step 10 is damaged: {victim}" in said
    assert "going on from step 8" in said
    trainer.train(toy_config(), str(tmp_path / "whole"))
    assert_same_bits(saved_state(folder), saved_state(tmp_path / "whole"))
    assert [line["step"] for line in lines(folder, "train")] == list(range(1, 13))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.source": "tfds", "data.name": "cifar10"}, "data set 'cifar10' is not in "),
        (
            {"train.batch_size": 12},
            r"^train\.batch_size=12 in 1 part\(s\) is not divisible by the 8 devices; use a multiple of 8",
        ),
        (
            {"train.batch_size": 24, "train.accumulation": 2},
            r"in 2 part\(s\) is not .* use .*accumulation=1 or a multiple of 16",
        ),
        ({"mesh.data": 3}, "does not use the 8 devices present"),
        ({"optim.schedule": "cosine", "optim.warmup_steps": 12}, "model: the cosine schedule starts at update 12"),
        ({"optim.name": "sgd"}, "config value optim.name must be one of"),
        (
            {"optim.name": "adamw", "optim.weight_decay": 0.1, "optim.decay_mask": "zzz"},
            "model: optim.decay_mask 'zzz' matches no parameter; correct it",
        ),
        ({"data.bits": 5}, "digits train has 17 levels and bits reduces from 256 only"),
    ],
)
def test_nothing_is_written_where_the_config_or_the_data_do_not_fit(toy_config, tmp_path, changes, message):
    config = toy_config()
    with config.unlocked():
        config.update_from_flattened_dict({**changes, "data.data_dir": str(tmp_path / "none")})
    with pytest.raises(InputError, match=message):
        trainer.train(config, str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_the_environment_is_in_the_run(finished):
    folder, _ = finished
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["devices"] == "8 x cpu"
    assert environment["mesh"]["fsdp"] == 1


def test_a_run_moves_to_another_number_of_devices_and_says_so(
    toy_config, tmp_path, monkeypatch, capsys, saved_state, sub_mesh
):
    folder = tmp_path / "run"
    trainer.train(toy_config({"train.steps": 5}), str(folder))
    monkeypatch.setattr(trainer.sharding, "make_mesh", lambda config: sub_mesh(1, 2))
    trainer.train(toy_config({"mesh.fsdp": 2}), str(folder))
    assert "note: mesh.fsdp changed from 1 to 2; bit-for-bit" in capsys.readouterr().err
    monkeypatch.undo()
    trainer.train(toy_config(), str(tmp_path / "whole"))
    moved, whole = saved_state(folder), saved_state(tmp_path / "whole")
    np.testing.assert_array_equal(moved["extra"]["chosen"], whole["extra"]["chosen"])
    np.testing.assert_allclose(moved["params"]["decoder"]["bias"], whole["params"]["decoder"]["bias"], atol=1e-4)
