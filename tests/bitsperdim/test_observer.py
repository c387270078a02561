"""What a run leaves for people to look at: profiler traces, TensorBoard files, curves."""

import itertools
import re

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from bitsperdim import metrics, plots, tfrecord, trainer
from bitsperdim.errors import InputError
from bitsperdim.step import TrainConfig

SHORT = {"train.steps": 8, "train.evaluate_every": 4, "train.pictures_every": 8, "train.save_every": 4}


@pytest.fixture
def train(toy_config, tmp_path):
    """`train(steps=8, **values of the section train)` -> the folder of the stage."""

    def begin(**values):
        config = toy_config()
        with config.unlocked():
            config.update_from_flattened_dict({**SHORT, **{f"train.{name}": v for name, v in values.items()}})
        trainer.train(config, str(tmp_path / "run"))
        return tmp_path / "run" / "model"

    return begin


@pytest.fixture
def tape(monkeypatch):
    """What happens in order: 'start' and 'stop' of the profiler, and the number of the step that each program ends."""
    happened, compiled = [], trainer.step_lib.compiled

    def watched(*arguments):
        step = compiled(*arguments)

        def taken(state, *batches):
            happened.append(len(batches) + next((done for done in reversed(happened) if isinstance(done, int)), 0))
            return step(state, *batches)

        return taken

    monkeypatch.setattr(trainer.step_lib, "compiled", watched)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: happened.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: happened.append("stop"))
    monkeypatch.setattr(plots, "curves", lambda records: np.zeros((1, 1, 3), np.uint8))  # half of the time
    return happened


def test_a_milestone_is_measured_at_its_step_and_logged_under_its_name(train):
    lines = metrics.read(train(milestones=(("two_epochs", 3), ("the_end", 8))) / metrics.FILE)
    measured = {line["step"]: line for line in lines if line["kind"] == "evaluation"}
    assert list(measured) == [3, 4, 8]
    named = [line for line in lines if line["kind"] == "milestone"]
    assert [line["step"] for line in named] == [3, 8]
    assert named[0]["bits_per_dim_at_two_epochs"] == measured[3]["bits_per_dim"]
    assert named[1]["bits_per_dim_at_the_end"] == measured[8]["bits_per_dim"] != measured[3]["bits_per_dim"]


def test_who_watches_is_called_when_there_is_something_new_to_see(toy_config, tmp_path):
    seen = []

    def watch(run, stage):
        lines = metrics.read(run.folder(stage) / metrics.FILE)
        pictures = list((run.folder(stage) / "images").glob("*-00000008.png"))
        seen.append((stage, lines[-1]["step"], len(lines), len(pictures) > 0))

    config = toy_config()
    with config.unlocked():
        config.update_from_flattened_dict({**SHORT, "train.log_every": 2})
    trainer.train(config, str(tmp_path / "run"), watch=watch)
    # The lines of training, and behind those of steps 4 and 8 that of an evaluation; pictures at the end.
    assert seen == [("model", 2, 1, False), ("model", 4, 3, False), ("model", 6, 4, False), ("model", 8, 6, True)]


def test_skipped_steps_are_said_and_the_largest_norm_of_each_window_is_logged(train, capsys):
    folder = train(skip_norm=1e-9, log_every=4)
    lines = [line for line in metrics.read(folder / metrics.FILE) if line["kind"] == "train"]
    assert [line["skipped_steps"] for line in lines] == [4, 8]
    assert all(line["largest_gradient_norm"] >= line["gradient_norm"] > 0 for line in lines)
    assert lines[0]["largest_gradient_norm"] > lines[0]["gradient_norm"]
    assert "skipped_steps 4\n" in (said := capsys.readouterr().err) and "skipped_steps 8\n" in said


@pytest.mark.parametrize("step", [0, 9])
def test_a_milestone_that_is_never_reached_is_refused(step):
    with pytest.raises(ValueError, match=f"milestones must lie within the 8 steps of the stage, not 'late' at {step}"):
        TrainConfig(batch_size=8, steps=8, milestones=(("late", step),))


@pytest.mark.parametrize(
    ("profile", "each", "expected"),
    [
        ((3, 5), 1, [1, 2, "start", 3, 4, 5, "stop", 6, 7, 8]),
        ((1, 1), 1, ["start", 1, "stop", 2, 3, 4, 5, 6, 7, 8]),
        ((8, 8), 1, [1, 2, 3, 4, 5, 6, 7, "start", 8, "stop"]),
        ((7, 20), 1, [1, 2, 3, 4, 5, 6, "start", 7, 8, "stop"]),
        # The programs that hold these steps.
        ((6, 6), 4, [4, "start", 8, "stop"]),
        ((2, 3), 4, ["start", 4, "stop", 8]),
        ((4, 5), 4, ["start", 4, 8, "stop"]),
    ],
)
def test_the_trace_holds_the_steps_that_were_asked_for_and_no_other(train, tape, profile, each, expected):
    train(profile=profile, log_every=each, steps_per_dispatch=each)
    assert tape == expected


def test_a_trace_is_written_and_has_the_step_in_it(train):
    [path] = train(profile=(3, 4)).glob("profile/plugins/profile/*/*.xplane.pb")
    assert b"PjitFunction(steps)" in path.read_bytes()


@pytest.mark.parametrize("profile", [(3,), (5, 3), (0, 3), (1, 2, 3), (9, 20)])
def test_steps_that_are_no_range_are_refused(train, tmp_path, profile):
    with pytest.raises(InputError, match=rf"train\.profile must .*, not {re.escape(str(profile))}"):
        train(profile=profile)
    assert list(tmp_path.iterdir()) == []


def board(folder):
    """(figure, step, value) of every scalar in the event files of a folder, oldest file first."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        content, bounds = path.read_bytes(), tfrecord.boundaries(epath.Path(path))
        for begin, end in itertools.pairwise(bounds):
            event = event_pb2.Event.FromString(content[begin + tfrecord.HEADER : end - tfrecord.FOOTER])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_holds_every_logged_value(train):
    pytest.importorskip("tensorboardX")
    folder = train(tensorboard=True)
    expected = [
        (f"{record['kind']}/{name}", record["step"], np.float32(value))
        for record in metrics.read(folder / metrics.FILE)
        for name, value in record.items()
        if name not in ("step", "kind") and value is not None
    ]
    assert len(expected) > 60
    assert board(folder) == expected


def test_the_curves_of_a_run_have_a_panel_for_every_logged_figure(train):
    folder = train()
    records = metrics.read(folder / metrics.FILE)
    names = {name for record in records for name in record if any(other.get(name) for other in records)}
    names -= {"step", "kind", "steps", "images", "non_finite_in_a_row"}
    shown = [name for name in names if not name.endswith("_standard_error")]
    with Image.open(folder / "images" / "curves.png") as picture:
        pixels = np.asarray(picture)
    # Three panels to a row of 260 pixels; only the places behind the last one are white.
    rows = -(-len(shown) // 3)
    assert pixels.shape == (260 * rows, 1200, 3)
    last_row = pixels[-200:-60].reshape(140, 3, 400, 3)[:, :, 100:-50]
    assert [(last_row[:, column] != 255).any() for column in range(3)] == [
        column < (len(shown) - 1) % 3 + 1 for column in range(3)
    ]
