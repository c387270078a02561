"""Maps of forecasting mistakes: red where one was made, and nowhere else."""

import numpy as np

from arm_forecast import pictures
from arm_forecast.engine import Samples
from arm_forecast.pixelcnn import Grid
from bitsperdim import plots


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


GRID = Grid(2, 2, 3, 4)


def drawn(wrong):
    """A sample of 12 dimensions whose forecasts were wrong in these: after each a new call begins."""
    call_of = 1 + np.cumsum([0, *(dim in wrong for dim in range(11))])
    nothing = np.zeros(1, np.float32)
    return Samples(np.full((1, 12), 3), call_of[None], call_of[-1:], nothing, nothing, np.int32(call_of[-1]))


def test_a_map_lies_below_its_image_whose_levels_are_stretched_to_white():
    # All channels of pixel (0, 1) were wrong, dimensions 3, 4, 5.
    picture = pictures.mistakes({"fixed_point": drawn((3, 4, 5))}, GRID, 4, None)["mistakes_fixed_point"]
    tile = 48 * 2  # each pixel is drawn as a square of 48
    below_title = picture[plots.TITLE :, :tile]
    image, overlay = below_title[:tile], below_title[-tile:]
    assert (image == 255).all()  # 3 is the brightest of four levels
    assert (overlay[10, 60] == pictures.RED).all() and (overlay[10, 10] == 255).all() and (overlay[60, 60] == 255).all()


def test_the_maps_of_codes_take_their_levels_from_the_decoded_images():
    decode = lambda codes: np.full((1, 4, 4, 1), 16, np.uint8)  # the brightest of 17 levels
    picture = pictures.mistakes({"modules": drawn((0, 1, 2))}, GRID, 17, decode)["mistakes_modules"]
    image, overlay, alone = (picture[plots.TITLE + row * 98 :][:96, :96] for row in range(3))
    assert (image == 255).all()
    # A code lies under a quarter of the decoded image.
    for shown in (overlay, alone):
        assert (shown[:48, :48] == pictures.RED).all() and (shown[48:] == 255).all() and (shown[:, 48:] == 255).all()
