"""Files of published weights: plain arrays are read, everything else is refused with the way to make them."""

import numpy as np
import pytest

from bitsperdim import adopt
from bitsperdim.errors import InputError


def test_a_file_is_read_with_or_without_the_prefix_of_data_parallel(tmp_path):
    arrays = {"out.bias": np.arange(3.0), "in.weight": np.ones((2, 1))}
    np.savez(tmp_path / "plain.npz", **arrays)
    np.savez(tmp_path / "parallel.npz", **{f"module.{name}": array for name, array in arrays.items()})
    for name in ("plain", "parallel"):
        read = adopt.read_arrays(tmp_path / f"{name}.npz")
        assert set(read) == set(arrays)
        np.testing.assert_array_equal(read["out.bias"], arrays["out.bias"])


def test_a_file_of_pytorch_is_refused_with_the_lines_that_export_it(tmp_path):
    with pytest.raises(InputError, match=r"(?s)model\.pth is not an \.npz file.*numpy\.savez"):
        adopt.read_arrays(tmp_path / "model.pth")
    with pytest.raises(InputError, match="does not exist"):
        adopt.read_arrays(tmp_path / "model.npz")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("objects", "text"):
        with pytest.raises(InputError, match=rf"(?s){name}\.npz is not .*plain arrays.*numpy\.savez"):
            adopt.read_arrays(tmp_path / f"{name}.npz")
