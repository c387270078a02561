"""What may stand behind a flag, and what is said of the rest."""

import math
import sys

import numpy as np
import pytest

from bitsperdim import flag_values
from bitsperdim.errors import InputError


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.9", 0.9), ("top=0.9,bottom=1", {"top": 0.9, "bottom": 1.0}), ("top=0, bottom=2", {"top": 0.0, "bottom": 2.0})],
)
def test_one_number_or_one_for_each_level(text, value):
    assert flag_values.by_level("temperature", text, 0.0, math.inf) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("warm", "--temperature must be a number, not 'warm'"),
        ("", "--temperature must be a number, not ''"),
        ("-1", "--temperature must be finite and at least 0, not -1"),
        ("nan", "--temperature must be finite"),
        ("inf", "--temperature must be finite"),
        ("top=", "--temperature must be a number, not ''"),
        ("top=1,bottom=-1", "--temperature must be finite and at least 0, not -1"),
        ("top=1,0.9", "'0.9' must be LEVEL=NUMBER"),
        ("top=1,top=2", "'top=2' must be LEVEL=NUMBER, each level once"),
        ("=1", "'=1' must be LEVEL=NUMBER"),
    ],
)
def test_values_by_level_that_are_none_are_named(text, message):
    with pytest.raises(InputError, match=message):
        flag_values.by_level("temperature", text, 0.0, math.inf)


def test_counts_are_integers():
    assert flag_values.by_level("top_k", "top=5,bottom=7", 1, math.inf, int) == {"top": 5, "bottom": 7}
    with pytest.raises(InputError, match=r"--top_k must be an integer, not '1\.5'"):
        flag_values.by_level("top_k", "1.5", 1, math.inf, int)


def test_shares_come_the_largest_first_and_once():
    assert flag_values.shares("accept_top", "0.05,1,0.5,0.5") == (1.0, 0.5, 0.05)


@pytest.mark.parametrize("text", ["0", "1,0", "1.01", "-0.5", "5%", "nan", "0.5,", ""])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(InputError, match="--accept_top must"):
        flag_values.shares("accept_top", text)


def test_a_function_of_the_folder_one_stands_in(tmp_path, monkeypatch):
    (tmp_path / "my_scorer.py").write_text("def brightness(images, labels): return 'here'")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert flag_values.function("scorer", "my_scorer:brightness")(None, None) == "here"
    assert sys.path == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("my_module", "--scorer must be MODULE:FUNCTION, not 'my_module'"),
        (":f", "--scorer must be MODULE:FUNCTION"),
        ("nowhere_at_all:f", "cannot import nowhere_at_all: ModuleNotFoundError"),
        ("broken_scorer:f", "cannot import broken_scorer: ZeroDivisionError"),
        ("math:sinn", "math has no function 'sinn'"),
        ("math:pi", "math has no function 'pi'"),
    ],
)
def test_a_function_that_is_not_there_is_named(text, message, tmp_path, monkeypatch):
    (tmp_path / "broken_scorer.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        flag_values.function("scorer", text)


def test_an_array_is_one_npy_file_of_numbers(tmp_path):
    expected = np.arange(6).reshape(2, 3) - 1
    np.save(tmp_path / "known.npy", expected)
    np.testing.assert_array_equal(flag_values.array("given", str(tmp_path / "known.npy")), expected)
    np.savez(tmp_path / "archive.npy.npz", expected)
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("1 2 3")
    (tmp_path / "short.npy").write_bytes((tmp_path / "known.npy").read_bytes()[:-8])
    for name in ("archive.npy.npz", "objects.npy", "text.npy", "short.npy", "missing.npy", "."):
        with pytest.raises(InputError, match=r"--given=.* is no readable \.npy file"):
            flag_values.array("given", str(tmp_path / name))
