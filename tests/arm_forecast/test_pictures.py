"""Maps of forecasting mistakes: red where one was made, and nowhere else."""

import numpy as np

from arm_forecast import pictures


def test_a_mistake_is_red_and_what_was_forecast_rightly_is_faint_grey():
    shown = np.full((1, 2, 2, 3), 40, np.uint8)
    share = np.array([[[0.0, 1.0], [0.25, 0.0]]])
    overlaid = pictures._overlay(shown, share)[0].astype(int)
    np.testing.assert_array_equal(overlaid[0, 1], pictures.RED)
    right = overlaid[0, 0]
    assert (right == right[0]).all() and right[0] > 150
    # A quarter of the channels: in between, and redder than what was right.
    redness = overlaid[..., 0] - overlaid[..., 1:].mean(-1)
    assert redness[0, 0] == 0 < redness[1, 0] < redness[0, 1]
