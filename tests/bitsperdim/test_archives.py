"""Files of published weights: arrays are read, everything else is refused with the way to make them."""

import sys
import zipfile

import numpy as np
import pytest
from flax import serialization

from bitsperdim import archives
from bitsperdim.errors import InputError

ARRAYS = {"out.bias": np.arange(3.0), "in.weight": np.ones((2, 1))}


def test_a_file_is_read_with_or_without_the_prefix_of_data_parallel(tmp_path):
    np.savez(tmp_path / "plain.npz", **ARRAYS)
    np.savez(tmp_path / "parallel.npz", **{f"module.{name}": array for name, array in ARRAYS.items()})
    for name in ("plain", "parallel"):
        read = archives.read_arrays(tmp_path / f"{name}.npz")
        assert set(read) == set(ARRAYS)
        np.testing.assert_array_equal(read["out.bias"], ARRAYS["out.bias"])


def test_what_is_no_whole_archive_of_arrays_is_refused_with_the_lines_that_export_one(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        archives.read_arrays(tmp_path / "model.npz")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("objects", "text"):
        with pytest.raises(InputError, match=rf"(?s){name}\.npz is not .*plain arrays.*numpy\.savez"):
            archives.read_arrays(tmp_path / f"{name}.npz")


def test_what_a_file_is_its_first_bytes_say(tmp_path):
    tree = {"params": {"kernel": np.ones((2, 3), np.float32)}, "step": 7}
    file = tmp_path / "checkpoint_7"
    file.write_bytes(serialization.msgpack_serialize(tree))
    read = archives.read(file)
    np.testing.assert_array_equal(read["params"]["kernel"], tree["params"]["kernel"])
    assert read["step"] == 7
    with pytest.raises(InputError, match=r"is no state_dict: its entry 'params' is no array but dict"):
        archives.read_arrays(file)
    file.write_bytes(serialization.msgpack_serialize(tree)[:-9])
    with pytest.raises(InputError, match="checkpoint_7 is not a whole msgpack file"):
        archives.read(file)
    file.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(InputError, match="checkpoint_7 is not a whole file of weights"):
        archives.read(file)
    file.write_text("words")
    with pytest.raises(InputError, match="checkpoint_7 is no file of weights"):
        archives.read(file)


def test_without_pytorch_its_files_are_refused_with_both_ways_on(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"(?s)model\.pth .*pip install 'bitsperdim\[convert\]'.*numpy\.savez"):
        archives.read(tmp_path / "model.pth")


def test_files_of_pytorch_are_read_where_it_is_installed_and_nothing_in_them_is_run(tmp_path):
    torch = pytest.importorskip("torch")
    halves = torch.arange(4, dtype=torch.bfloat16)
    torch.save({"state": {0: {"step": 3}}, "weights": {"a": torch.ones(2, 1), "b": halves}}, tmp_path / "model.pth")
    read = archives.read(tmp_path / "model.pth")
    assert read["state"] == {0: {"step": 3}}
    np.testing.assert_array_equal(read["weights"]["b"], np.arange(4, dtype=np.float32))
    torch.save(halves, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="holds no names but one Tensor"):
        archives.read(tmp_path / "legacy.pth")
    torch.save({"path": tmp_path}, tmp_path / "objects.pth")
    with pytest.raises(InputError, match=r"objects\.pth is not a whole file of tensors"):
        archives.read(tmp_path / "objects.pth")
    whole = (tmp_path / "model.pth").read_bytes()
    (tmp_path / "model.pth").write_bytes(whole[:-100])
    with pytest.raises(InputError, match="is not a whole file"):
        archives.read(tmp_path / "model.pth")
