"""Pictures by their pixels."""

import numpy as np
import PIL.Image
import pytest

from bitsperdim import images
from bitsperdim.images import GREY, SEPARATOR


def plain(*values, size=96, channels=3):
    """One image of a single colour per value, so large that it is not enlarged."""
    return np.stack([np.full((size, size, channels), value, np.uint8) for value in values])


def tile(picture, row, column, size=96):
    top, left = row * (size + SEPARATOR), column * (size + SEPARATOR)
    return picture[top : top + size, left : left + size]


def test_tiles_stand_row_by_row_between_thin_lines():
    picture = images.grid(plain(10, 20, 30, 40), columns=2)
    assert picture.shape == (2 * 96 + SEPARATOR, 2 * 96 + SEPARATOR, 3)
    for index, value in enumerate((10, 20, 30, 40)):
        assert (tile(picture, *divmod(index, 2)) == value).all()
    assert (picture[96 : 96 + SEPARATOR] == GREY).all()
    assert (picture[:, 96 : 96 + SEPARATOR] == GREY).all()


def test_places_left_over_are_grey():
    picture = images.grid(plain(10, 20, 30), columns=2)
    assert (tile(picture, 1, 1) == GREY).all()


def test_every_pixel_of_a_small_image_becomes_a_square():
    image = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(1, 32, 32, 3).astype(np.uint8)
    picture = images.grid(image)
    assert picture.shape == (96, 96, 3)
    for dy in range(3):
        for dx in range(3):
            np.testing.assert_array_equal(picture[dy::3, dx::3], image[0])


@pytest.mark.parametrize(("size", "drawn"), [(8, 96), (28, 84), (32, 96), (80, 80), (256, 256)])
def test_small_images_are_drawn_near_96_pixels(size, drawn):
    assert images.grid(plain(1, size=size)).shape == (drawn, drawn, 3)


def test_one_channel_becomes_grey_rgb():
    picture = images.grid(plain(7, channels=1))
    assert picture.shape == (96, 96, 3) and (picture == 7).all()


def test_few_levels_are_spread_from_black_to_white():
    picture = images.grid(plain(0, 8, 16), columns=3, levels=17)
    assert [int(tile(picture, 0, column).max()) for column in range(3)] == [0, 128, 255]


def test_default_columns_make_a_square():
    assert images.grid(plain(*range(9))).shape[:2] == (3 * 96 + 2 * SEPARATOR,) * 2


def test_pairs_put_each_reconstruction_below_its_original():
    picture = images.pairs(plain(10, 20, 30), plain(11, 21, 31), columns=2)
    assert picture.shape == (4 * 96 + 3 * SEPARATOR, 2 * 96 + SEPARATOR, 3)
    values = [[int(tile(picture, row, column)[0, 0, 0]) for column in range(2)] for row in range(4)]
    assert values == [[10, 20], [11, 21], [30, GREY], [31, GREY]]


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 4, 4, 3), np.float32), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)]
)
def test_anything_but_a_batch_of_bytes_is_refused(wrong):
    with pytest.raises(ValueError, match="images must be uint8"):
        images.grid(wrong)


def test_values_beyond_the_levels_are_refused():
    with pytest.raises(ValueError, match="values below levels = 17, not 17"):
        images.grid(plain(17), levels=17)


def test_png_gives_the_pixels_back_and_leaves_nothing_else(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    path = tmp_path / "new" / "picture.png"
    images.save_png(path, picture)
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(path)), picture)
    assert [entry.name for entry in path.parent.iterdir()] == ["picture.png"]


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    images.save_png(path, np.zeros((4, 4, 3), np.uint8))

    def no_space(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        images.save_png(path, np.full((4, 4, 3), 255, np.uint8))
    assert (np.asarray(PIL.Image.open(path)) == 0).all()


def test_labels_stand_beside_what_they_name_and_leave_the_picture_as_it_is():
    picture = images.grid(plain(10, 20, 30, 40, 50, 60), columns=3)
    page = images.labelled(picture, columns=("one", "", "three"), rows=("", "two"))
    above, left = page.shape[0] - picture.shape[0], page.shape[1] - picture.shape[1]
    assert 8 < above < 24 and 16 < left < 48
    np.testing.assert_array_equal(page[above:, left:], picture)
    is_dark = page.min(-1) < 128
    # Ink above the first and third column and left of the second row, none where there is no text.
    column = lambda index: is_dark[:above, left + 98 * index : left + 98 * (index + 1)]
    assert column(0).any() and column(2).any() and not column(1).any()
    assert is_dark[above + 98 :, :left].any() and not is_dark[above : above + 98, :left].any()
    assert not is_dark[:above, :left].any()
    # Another text is another picture.
    assert (images.labelled(picture, rows=("", "twenty"))[:, :16] != page[above:, :16]).any()


def test_a_heading_that_is_too_long_does_not_run_into_the_next_column():
    picture = images.grid(plain(1, 2), columns=2)
    short, long = (images.labelled(picture, columns=(text, "x")) for text in ("i", "i" * 200))
    half = picture.shape[1] // 2
    np.testing.assert_array_equal(short[:, half:], long[:, half:])


def test_rows_of_pairs_are_labelled_in_turn():
    page = images.pairs(plain(10, 20, 30), plain(11, 21, 31), columns=2, labels=("before", "after"))
    bare = images.pairs(plain(10, 20, 30), plain(11, 21, 31), columns=2)
    left = page.shape[1] - bare.shape[1]
    rows = [page[98 * index : 98 * index + 96, :left] for index in range(4)]
    inked = [row.min() < 128 for row in rows]
    assert all(inked)
    is_wide = [np.nonzero((row.min(-1) < 128).any(0))[0].max() for row in rows]
    assert is_wide[0] == is_wide[2] > is_wide[1] == is_wide[3]
