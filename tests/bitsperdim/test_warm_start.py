"""A run that begins with the weights of another one, and what is refused before anything is written."""

import json

import jax
import numpy as np
import pytest

from bitsperdim import config as config_lib
from bitsperdim import run as run_lib
from bitsperdim import trainer
from bitsperdim.errors import InputError

SHORT = {"train.steps": 4, "train.evaluate_every": 4, "train.pictures_every": 4, "train.save_every": 4}


@pytest.fixture(scope="module")
def other(toy_config, tmp_path_factory):
    """A complete run with weights of its own; not to be changed."""
    folder = tmp_path_factory.mktemp("warm") / "other"
    trainer.train(toy_config(), str(folder))
    return folder


@pytest.fixture
def first_state(monkeypatch):
    """The states that the loop gives to the first step of every call of `trainer.train`, as numpy."""
    begun, compiled = [], trainer.step_lib.compiled

    def watched(*arguments):
        step, seen = compiled(*arguments), []

        def first(state, *batches):
            if not seen:
                with jax.transfer_guard("allow"):
                    seen.append(jax.device_get(state))
                begun.append(seen[0])
            return step(state, *batches)

        return first

    monkeypatch.setattr(trainer.step_lib, "compiled", watched)
    return begun


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def record(workdir):
    return json.loads((workdir / "model" / "data.json").read_text())


def test_it_begins_with_the_polyak_weights_and_the_extra_state_and_nothing_else_of_the_other(
    other, toy_config, tmp_path, capsys, first_state, saved_state, assert_same_bits
):
    before = contents(other)
    trainer.train(toy_config(SHORT), str(tmp_path / "run"), init_from=str(other))
    assert f"model: starting with the weights of step 12 of {other}" in capsys.readouterr().err
    assert contents(other) == before
    [state], source = first_state, saved_state(other)
    assert not np.array_equal(source["ema"]["decoder"]["kernel"], source["params"]["decoder"]["kernel"])
    for name, origin in (("params", "ema"), ("ema", "ema"), ("extra", "extra")):
        assert_same_bits(state[name], source[origin])
    assert state["step"] == 0
    # Adam begins with moments and counts of zero, and so do the counters of skipped steps.
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((state["opt"], state["skips"])))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(source["opt"]))
    assert saved_state(tmp_path / "run")["step"] == 4


def test_the_second_start_goes_on_and_does_not_begin_again(
    other, toy_config, tmp_path, capsys, first_state, saved_state, assert_same_bits
):
    trainer.train(toy_config(SHORT), str(tmp_path / "run"), init_from=str(other))
    before = saved_state(tmp_path / "run")
    longer = {**SHORT, "train.steps": 8}
    trainer.train(toy_config(longer), str(tmp_path / "run"), init_from=str(other))
    assert "going on from step 4" in capsys.readouterr().err
    assert_same_bits(first_state[1], before)


def test_a_run_that_has_begun_checks_the_other_and_says_that_it_is_ignored(other, toy_config, tmp_path, capsys):
    trainer.train(toy_config(SHORT), str(tmp_path / "run"))
    for steps in (4, 8):  # complete, and to go on
        config = toy_config({**SHORT, "train.steps": steps})
        with pytest.raises(InputError, match=r"there is no run folder .*nonexistent"):
            trainer.train(config, str(tmp_path / "run"), init_from=str(tmp_path / "nonexistent"))
        trainer.train(config, str(tmp_path / "run"), init_from=str(other))
        assert f"--init_from={other} is ignored: stage 'model' has begun" in capsys.readouterr().err
    assert "init_from" not in record(tmp_path / "run")


def test_where_the_weights_came_from_is_kept(other, toy_config, tmp_path):
    trainer.train(toy_config(SHORT), str(tmp_path / "run"), init_from=str(other))
    expected = {"run": str(other), "step": 12}
    assert record(tmp_path / "run")["init_from"] == expected
    trainer.train(toy_config({**SHORT, "train.steps": 8}), str(tmp_path / "run"))
    assert record(tmp_path / "run")["init_from"] == expected


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_so_again(
    other, toy_config, tmp_path, monkeypatch, first_state, assert_same_bits
):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Checkpoints, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(toy_config(SHORT), str(tmp_path / "run"), init_from=str(other))
    trainer.train(toy_config(SHORT), str(tmp_path / "run"), init_from=str(other))
    assert_same_bits(*first_state)


def test_without_a_run_to_begin_with_the_weights_are_others(other, toy_config, tmp_path, first_state, saved_state):
    """Guards the tests above: the seed alone does not make these weights."""
    trainer.train(toy_config(SHORT), str(tmp_path / "run"))
    [state] = first_state
    assert not np.array_equal(state["params"]["decoder"]["kernel"], saved_state(other)["ema"]["decoder"]["kernel"])


def test_a_stage_that_the_other_run_lacks_begins_anew_and_says_so(
    toy_config, tmp_path, capsys, first_state, assert_same_bits
):
    run_lib.create(run_lib.check(tmp_path / "empty", toy_config()))
    trainer.train(toy_config(SHORT), str(tmp_path / "run"), init_from=str(tmp_path / "empty"))
    assert f"model: not trained in {tmp_path / 'empty'}, so it starts anew" in capsys.readouterr().err
    trainer.train(toy_config(SHORT), str(tmp_path / "plain"))
    assert_same_bits(*first_state)


@pytest.mark.parametrize(
    ("changes", "array"),
    [
        ({"model.hidden": 8}, r"'ema/decoder/kernel' is float32\[16,64\] in .*other.*, but should be float32\[8,64\]"),
        (
            {"data.source": "synthetic", "data.image_size": 4, "data.synthetic_channels": 1},
            r"'ema/decoder/bias' is float32\[64\] in .*other.*, but should be float32\[16\]",
        ),
    ],
)
def test_weights_of_another_shape_are_refused_by_name(other, toy_config, tmp_path, changes, array):
    values = config_lib.to_plain(toy_config().to_dict())
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    remedy = "; leave out --init_from, or use the config that it was trained with$"
    with pytest.raises(InputError, match=array + remedy):
        trainer.train(values, str(tmp_path / "run"), init_from=str(other))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "there is no run folder .*absent"),
        ("thesis", r"thesis is no run: it has no config\.json"),
        ("cut", r"cut/config\.json is damaged"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(toy_config, tmp_path, name, message):
    others = tmp_path / "others"
    for folder in ("thesis", "cut"):
        (others / folder).mkdir(parents=True)
    (others / "cut/config.json").write_text(json.dumps({"family": "toy_family"})[:-3])
    with pytest.raises(InputError, match=message):
        trainer.train(toy_config(SHORT), str(tmp_path / "run"), init_from=str(others / name))
    assert not (tmp_path / "run").exists()
