"""The picture of a stage's curves, by what can be seen in it."""

import os
import subprocess
import sys

import numpy as np

from bitsperdim import plots

BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # the first and the second line of a panel


def records(kind="train", **figures):
    """Four lines of a metrics file, each figure growing with the step."""
    return [{"step": 10 * i, "kind": kind} | {name: slope * i for name, slope in figures.items()} for i in range(4)]


def colours(picture):
    return {tuple(colour) for colour in np.unique(picture.reshape(-1, 3), axis=0).tolist()}


def ink(picture, column):
    """Whether anything is drawn in the middle of a third of the picture."""
    third = picture.shape[1] // 3
    return (picture[:, column * third + 100 : (column + 1) * third - 50] != 255).any()


def test_each_figure_has_a_panel_of_its_own():
    one, two, three = (plots.curves(records(**dict.fromkeys("abc"[:n], 1.0))) for n in (1, 2, 3))
    assert [[ink(picture, column) for column in range(3)] for picture in (one, two, three)] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
    # Three panels to a row.
    seven = plots.curves(records(**dict.fromkeys("abcdefg", 1.0)))
    assert seven.shape[0] == 3 * three.shape[0]


def test_other_values_are_another_curve():
    # The same ends, so the same axes.
    straight, bent = records(mse=1.0), records(mse=1.0)
    bent[1]["mse"] = 2.5
    assert (plots.curves(straight) != plots.curves(bent)).any()


def test_evaluation_is_drawn_beside_training_in_the_panel_of_the_same_figure():
    train, both = plots.curves(records(mse=1.0)), plots.curves([*records(mse=1.0), *records("evaluation", mse=1.5)])
    assert both.shape == train.shape
    assert not ink(both, 1)
    assert BLUE in colours(train) and ORANGE not in colours(train)
    assert {BLUE, ORANGE} <= colours(both)


def test_standard_errors_and_counters_have_no_panel():
    plain = plots.curves(records(mse=1.0))
    hidden = plots.curves(records(mse=1.0, mse_standard_error=1.0, images=1.0, non_finite_in_a_row=1.0))
    np.testing.assert_array_equal(plain, hidden)


def test_a_figure_that_was_always_zero_and_lines_of_no_kind_have_no_panel():
    plain = plots.curves(records(mse=1.0))
    zero = records(mse=1.0, skipped_steps=0.0)
    np.testing.assert_array_equal(plain, plots.curves(zero))
    zero[2]["skipped_steps"] = 1.0
    assert ink(plots.curves(zero), 1)
    np.testing.assert_array_equal(plain, plots.curves([*records(mse=1.0), {"step": 7}, {"step": 9, "mse": 4.0}]))


def test_values_that_were_not_finite_leave_a_gap():
    gap = records(mse=1.0)
    gap[3]["mse"] = None
    np.testing.assert_array_equal(plots.curves(gap), plots.curves(gap[:3]))


def test_a_run_that_has_logged_nothing_yet_has_an_empty_picture():
    assert (plots.curves([]) == 255).all()


def test_a_home_that_cannot_be_written_to_is_nothing_to_talk_about(tmp_path):
    (tmp_path / "home").write_text("not a folder")
    environment = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MPL", "XDG_"))}
    command = [sys.executable, "-c", "from bitsperdim import plots; plots.curves([])"]
    drawn = subprocess.run(command, env=kept | environment, capture_output=True, text=True)
    assert (drawn.returncode, drawn.stderr) == (0, "")
