"""Plots of a run from what it has recorded: which figures stand together, and what the command writes."""

import json
import pathlib

import numpy as np
import PIL.Image
import pytest

from bitsperdim import cli, run_plots
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError

SAMPLER = {"calls_percent": 5.0, "seconds_per_image": 0.1, "seeds": 1, "exact": None}


def shown(*logged):
    """The title of each panel, with its figures in order."""
    return {
        panel.title: list(names.values())
        for panel in run_plots.PANELS
        if (names := run_plots.matching(panel, list(logged)))
    }


def test_figures_stand_with_their_like_and_resolutions_in_their_order():
    assert shown("kl_nats_16x16", "kl_nats", "kl_nats_1x1", "kl_nats_8x8", "reconstruction_nats", "nats") == {
        "parts of the bound, nats an image": ["kl_nats", "reconstruction_nats"],
        "KL by resolution, nats an image": ["kl_nats_1x1", "kl_nats_8x8", "kl_nats_16x16"],
    }
    assert shown("mse", "mse_over_variance", "mse_without_top", "mse_standard_error", "used_codes_top") == {
        "mean squared error in [-1, 1)": ["mse", "mse_without_top"],
        "codes in use": ["used_codes_top"],
    }
    assert shown("bits_per_dim", "bits_per_dim_importance_weighted_8", "bits_per_dim_standard_error") == {
        "bits/dim": ["bits_per_dim", "bits_per_dim_importance_weighted_8"]
    }
    every = ("learning_rate", "skipped_steps", "gradient_norm", "images_per_second")
    assert [names for names in shown(*every).values()] == [[name] for name in (every[0], every[2], every[1], every[3])]


def test_steps_that_were_never_skipped_are_seen_as_a_line():
    record = {"kind": "train", "bits_per_dim": 2.0}
    without = run_plots.curves([{"step": 1} | record, {"step": 2} | record], "run")
    zero = run_plots.curves([{"step": i, "skipped_steps": 0.0} | record for i in (1, 2)], "run")
    assert without.shape == zero.shape and (without != zero).any()


@pytest.fixture
def recorded(toy_config, tmp_path, monkeypatch):
    """The folder of a run that has logged a few steps; nothing was trained."""
    monkeypatch.chdir(tmp_path)
    run = run_lib.check("run", toy_config())
    run_lib.create(run)
    (run.workdir / "model").mkdir()
    lines = [{"step": i, "kind": "train", "bits_per_dim": 3.0 / i, "learning_rate": 0.1} for i in range(1, 9)]
    lines.append({"step": 8, "kind": "evaluation", "bits_per_dim": 0.5})
    (run.workdir / "model" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return pathlib.Path("run")


def test_the_command_writes_curves_and_samplers_where_they_were_compared(recorded, capsys):
    cli._evaluate(["evaluate.py", "--workdir=run", "--plots"])
    assert capsys.readouterr().out == "written to run/curves-model.png\n"
    assert np.asarray(PIL.Image.open("run/curves-model.png")).std() > 0
    rows = [{"sampler": "cached", "batch": batch, **SAMPLER} for batch in (1, 8)]
    about = {"device": "cpu", "seed": 1, "steps": {}, "complete": True}
    (recorded / "samplers.json").write_text(json.dumps(about | {"rows": rows}))
    cli._evaluate(["evaluate.py", "--workdir=run", "--plots", "--out=there"])
    assert {path.name for path in pathlib.Path("there").iterdir()} == {"curves-model.png", "samplers.png"}


def test_a_run_that_has_recorded_nothing_and_flags_that_measure_are_refused(recorded):
    with pytest.raises(InputError, match="--split means nothing beside --plots"):
        cli._evaluate(["evaluate.py", "--workdir=run", "--plots", "--split=train"])
    (recorded / "model" / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"no stage of run has a metrics\.jsonl yet; train it first"):
        cli._evaluate(["evaluate.py", "--workdir=run", "--plots"])
