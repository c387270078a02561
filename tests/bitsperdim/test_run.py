"""The folder of a run: which config may go on in it, and what is said where it may not."""

import json

import pytest

from bitsperdim import run as run_lib
from bitsperdim.errors import InputError

COSINE = {"optim.schedule": "cosine"}


@pytest.fixture
def start(toy_config, tmp_path):
    """`start(changes)` -> the folder of a run that was begun with the toy config so changed."""

    def begin(changes=()):
        run_lib.create(run_lib.check(tmp_path / "run", toy_config(changes)))
        return tmp_path / "run"

    return begin


def refusal(folder, config):
    with pytest.raises(InputError) as caught:
        run_lib.check(folder, config)
    return str(caught.value)


def test_a_run_is_opened_with_the_config_that_it_was_begun_with(start, toy_config):
    changes = {"model.hidden": 8, "data.bits": 8, "train.steps": 77}
    folder = start(changes)
    _, expected = run_lib.parse(toy_config(changes))
    assert run_lib.open_run(folder).config == expected
    assert run_lib.check(folder, toy_config(changes)).config == expected


def test_another_config_is_refused_with_every_difference_and_nothing_else(start, toy_config):
    folder = start()
    changes = {"model.hidden": 8, "seed": 2, "optim.learning_rate": 0.5, "train.log_every": 7}
    assert refusal(folder, toy_config(changes)) == (
        f"{folder} was trained with another config; use a new --workdir or the old values:\n"
        "         model.hidden   16 -> 8\n"
        "         optim.learning_rate   0.003 -> 0.5\n"
        "         seed   1 -> 2"
    )


def test_a_run_from_before_a_key_existed_goes_on_with_its_default(start, toy_config):
    folder = start()
    written = json.loads((folder / "config.json").read_text())
    del written["train"]["skip_norm"]
    (folder / "config.json").write_text(json.dumps(written))
    run_lib.check(folder, toy_config())
    assert "train.skip_norm   0.0 -> 3.0" in refusal(folder, toy_config({"train.skip_norm": 3.0}))


def test_a_key_that_is_gone_is_a_difference(start, toy_config):
    folder = start()
    written = json.loads((folder / "config.json").read_text())
    written["model"]["width"] = 3
    (folder / "config.json").write_text(json.dumps(written))
    assert refusal(folder, toy_config()).endswith("model.width   3 -> (absent)")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mesh.fsdp", 8),
        ("mesh.data", 8),
        ("data.data_dir", "/elsewhere"),
        ("data.cache_dir", "/elsewhere"),
        ("train.log_every", 5),
        ("train.evaluate_every", 5),
        ("train.pictures_every", 5),
        ("train.save_every", 5),
        ("train.keep_checkpoints", 5),
        ("train.milestones", [["late", 5]]),
        ("train.accumulation", 2),
        ("train.max_non_finite", 5),
        ("train.steps", 13),
    ],
)
def test_what_does_not_change_the_model_may_change_and_is_noted(start, toy_config, key, value):
    folder = start()
    config = toy_config()
    with config.unlocked():
        config.update_from_flattened_dict({key: value})
    run_lib.create(run_lib.check(folder, config))
    kept = json.loads((folder / "config.json").read_text())
    section, name = key.split(".")
    assert kept[section][name] == json.loads(json.dumps(value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.batch_size", 32),
        ("train.ema_decay", 0.5),
        ("train.skip_norm", 1.0),
        ("train.steps", 11),
        ("data.source", "synthetic"),
        ("optim.b1", 0.5),
    ],
)
def test_what_changes_the_model_may_not(start, toy_config, key, value):
    folder, config = start(), toy_config({"data.source": value, "data.image_size": 8} if key == "data.source" else ())
    with config.unlocked():
        config.update_from_flattened_dict({key: value})
    assert f"         {key}   " in refusal(folder, config)


def test_more_steps_are_refused_where_the_schedule_ends_with_the_run(start, toy_config):
    folder = start(COSINE)
    message = refusal(folder, toy_config({**COSINE, "train.steps": 20}))
    assert "         train.steps   12 -> 20\nthe cosine schedule of optim ends with train.steps, so " in message
    assert "set optim.cosine_steps or another optim.schedule from the beginning" in message
    assert message.endswith(f"--init_from={folder}")
    # Fewer steps are another matter.
    assert "cosine" not in refusal(folder, toy_config({**COSINE, "train.steps": 8}))


def test_more_steps_are_welcome_where_the_cosine_has_its_own_length(start, toy_config):
    own_length = {**COSINE, "optim.cosine_steps": 9}
    folder = start(own_length)
    assert run_lib.check(folder, toy_config({**own_length, "train.steps": 20})).config.train.steps == 20


def test_a_folder_of_other_things_is_refused_and_left_as_it_was(toy_config, tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    assert refusal(tmp_path, toy_config()) == (
        f"{tmp_path} is not empty and is no run (it has no config.json); use a new --workdir"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_will_do(toy_config, tmp_path):
    run_lib.create(run_lib.check(tmp_path, toy_config()))
    assert run_lib.open_run(tmp_path).config.train.steps == 12


def test_a_file_in_the_place_of_the_folder_is_refused(toy_config, tmp_path):
    (tmp_path / "run").write_text("")
    assert refusal(tmp_path / "run", toy_config()) == f"{tmp_path / 'run'} is a file, not a folder; use a new --workdir"
    with pytest.raises(InputError, match=r"run/below: Not a directory; use another --workdir"):
        run_lib.create(run_lib.check(tmp_path / "run" / "below", toy_config()))


@pytest.mark.parametrize("content", ['{"family": "toy_fam', "", "[1, 2]", "\x00\x00", "3"])
def test_a_damaged_config_is_named(start, toy_config, content):
    folder = start()
    (folder / "config.json").write_text(content)
    assert refusal(folder, toy_config()).startswith(f"{folder / 'config.json'} is damaged (")
    with pytest.raises(InputError, match=r"config\.json is damaged"):
        run_lib.open_run(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", "one", "'seed' must be of type int, not str ('one')"),
        ("train", {}, "the config lacks the key 'train.batch_size'"),
    ],
)
def test_a_config_with_a_wrong_value_is_named(start, key, value, message):
    path = start() / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError) as caught:
        run_lib.open_run(path.parent)
    assert str(caught.value) == f"{path}: {message}"


def test_the_home_of_people_is_where_they_mean_it(toy_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run_lib.create(run_lib.check("~/run", toy_config()))
    assert (tmp_path / "run" / "config.json").exists()
    assert run_lib.open_run("~/run").workdir == run_lib.place(tmp_path / "run")
    assert str(run_lib.place("gs://bucket/~/run")) == "gs://bucket/~/run"


def test_checking_writes_nothing(toy_config, tmp_path):
    run_lib.check(tmp_path / "run", toy_config())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["absent", "."])
def test_a_folder_that_is_no_run_cannot_be_opened(tmp_path, folder):
    with pytest.raises(InputError, match=r"there is no run folder|is no run: it has no config.json"):
        run_lib.open_run(tmp_path / folder)


def test_a_stage_that_does_not_exist_is_answered_with_those_that_do(start):
    with pytest.raises(InputError, match=r"there is no stage 'top' in .*run; its stages are model"):
        run_lib.open_run(start()).stage("top")


def test_a_change_of_the_machine_is_noted_once(start, toy_config, monkeypatch):
    folder = start()
    run = run_lib.check(folder, toy_config())
    assert run_lib.create(run) == []
    monkeypatch.setattr(run_lib.jax, "__version__", "0.0.1")
    [line] = run_lib.create(run)
    assert line.startswith("jax changed from ") and line.endswith(" to 0.0.1")
    assert run_lib.create(run) == []
    assert run_lib.create(run_lib.check(folder, toy_config({"mesh.fsdp": 8}))) == ["mesh.fsdp changed from 1 to 8"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "the config lacks the key 'family'"),
        ({"family": "no_such_family"}, "the family 'no_such_family' of the config is not an installed package"),
        ({"family": "json"}, "'json' is not a family of models: it exports no Config and stages"),
        ({"family": "../evil"}, "'family' must name an installed family such as 'vqvae2', not '../evil'"),
        ({"family": 3}, "'family' must name an installed family such as 'vqvae2', not 3"),
    ],
)
def test_a_family_that_cannot_be_is_named(values, message):
    with pytest.raises(InputError) as caught:
        run_lib.parse(values)
    assert str(caught.value).startswith(message)
