"""The cache of decoded images: whole or absent, whatever happens to its writers."""

import io
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from bitsperdim import atomic, cache
from bitsperdim.errors import InputError

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)
LABELS = np.arange(10, dtype=np.int32)


def chunks():
    for start in range(0, 10, 4):
        yield cache.Chunk(IMAGES[start : start + 4], LABELS[start : start + 4])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read(tmp_path):
    folder = tmp_path / "deep" / "digits-train"
    assert cache.load(folder) is None
    cache.write(folder, "digits", 10, 5, chunks())
    cached = cache.load(folder)
    np.testing.assert_array_equal(cached.images, IMAGES)
    np.testing.assert_array_equal(cached.labels, LABELS)
    assert cached.num_classes == 5 and isinstance(cached.images, np.memmap) and not cached.images.flags.writeable
    assert names(folder) == ["images.npy", "info.json", "labels.npy"]


def test_without_classes_there_are_no_labels(tmp_path):
    cache.write(tmp_path / "a", "digits", 10, 0, chunks())
    assert cache.load(tmp_path / "a").labels is None
    assert names(tmp_path / "a") == ["images.npy", "info.json"]


def test_the_first_of_two_writers_wins_and_the_other_leaves_nothing(tmp_path):
    def overtaken():
        yield from chunks()
        cache.write(tmp_path / "a", "first", 10, 5, chunks())

    cache.write(tmp_path / "a", "second", 10, 5, overtaken())
    assert names(tmp_path) == ["a"]
    assert '"first"' in (tmp_path / "a" / "info.json").read_text()


def test_a_failed_writer_leaves_nothing(tmp_path):
    def broken():
        yield next(chunks())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.write(tmp_path / "a", "digits", 10, 5, broken())
    assert names(tmp_path) == []


def test_a_killed_writer_leaves_nothing_that_is_taken_for_a_cache(tmp_path):
    program = """
import os, pathlib, signal, sys
import numpy as np
from bitsperdim import cache

def killed():
    yield cache.Chunk(np.zeros((4, 4, 4, 3), np.uint8), np.zeros(4, np.int32))
    os.kill(os.getpid(), signal.SIGKILL)

cache.write(pathlib.Path(sys.argv[1]), "digits", 10, 5, killed())
"""
    folder = tmp_path / "a"
    assert subprocess.run([sys.executable, "-c", program, str(folder)]).returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 1 and names(tmp_path)[0].startswith(".a-")
    assert cache.load(folder) is None
    cache.write(folder, "digits", 10, 5, chunks())
    np.testing.assert_array_equal(cache.load(folder).images, IMAGES)


def cut(path):
    with open(path, "r+b") as file:
        file.truncate(200)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: cut(folder / "images.npy"),
        lambda folder: (folder / "images.npy").write_bytes(b""),
        lambda folder: (folder / "images.npy").unlink(),
        lambda folder: [np.save(folder / "images.npy", IMAGES[:9]), np.save(folder / "labels.npy", LABELS[:9])],
        lambda folder: np.save(folder / "images.npy", IMAGES.astype(np.float32)),
        lambda folder: (folder / "labels.npy").write_bytes(b""),
        lambda folder: np.save(folder / "labels.npy", LABELS[:9]),
        lambda folder: (folder / "info.json").write_text("[1]"),
        lambda folder: (folder / "info.json").write_bytes(b"\xff"),
        lambda folder: (folder / "info.json").unlink(),
        lambda folder: shutil.rmtree(folder) or folder.write_text("a file"),
    ],
)
def test_a_damaged_cache_is_told_removed_and_made_again(tmp_path, capsys, damage):
    folder = tmp_path / "a"
    cache.write(folder, "digits", 10, 5, chunks())
    damage(folder)
    assert cache.load(folder) is None and names(tmp_path) == []
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"{folder} in the cache is damaged (") and told.endswith(") and made again")
    cache.write(folder, "digits", 10, 5, chunks())
    np.testing.assert_array_equal(cache.load(folder).images, IMAGES)


def test_what_is_kept_reaches_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(atomic, "flush", lambda file: synced.append(file.name))
    cache.write(tmp_path / "a", "digits", 10, 5, chunks())
    cache.write_bytes(tmp_path / "b", b"index")
    assert [pathlib.Path(path).name for path in synced[:3]] == ["images.npy", "labels.npy", "info.json"]
    assert all(pathlib.Path(path).relative_to(tmp_path).parts[0].startswith((".a-", ".b-")) for path in synced)
    assert len(synced) == 4


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match=r"cannot write the cache .*; set data.cache_dir or BITSPERDIM_CACHE"):
        cache.write(tmp_path / "file" / "a", "digits", 10, 5, chunks())


def test_the_cache_is_listed_and_cleared_and_nothing_else_is(tmp_path, capsys, monkeypatch):
    for name in ("digits train", "\N{SNOWMAN} pictures/train", "../.."):
        cache.write(tmp_path / cache.entry_name(name, 1), name, 10, 5, chunks())
    cache.write_bytes(tmp_path / f"{cache.entry_name('scan of a', 'b')}.json", bytes(2**20))
    killed = tmp_path / f".{cache.entry_name('digits', 1)}-0123abcd"
    killed.mkdir()
    kept = ["holiday", "xla2", "photo-2024.json"]
    for name in (*kept, "xla"):
        (tmp_path / name).mkdir()
    (tmp_path / "xla" / "jit_step-0123-cache").write_bytes(bytes(2**20))
    monkeypatch.setenv("BITSPERDIM_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["cache"])
    assert cache.main() == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 7 and listed[-1] == f"       2.0 MiB  in {tmp_path}" and killed.name in listed[0]
    assert "       1.0 MiB  xla" in listed
    monkeypatch.setattr(sys, "argv", ["cache", "--clear"])
    assert cache.main() == 0
    assert names(tmp_path) == sorted(kept)
    assert cache.entries(tmp_path / "none") == []


def test_names_tell_apart_what_differs_and_only_that():
    made = [cache.entry_name(*key) for key in (("a", 1), ("a", 2), ("b", 1), ("a", (1,)), ("a/b", 1), ("a b", 1))]
    assert len(set(made)) == 6 and made[0] == cache.entry_name("a", 1)


def test_progress_is_one_line_on_a_terminal_and_a_few_elsewhere(monkeypatch, tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, lines, returns in ((Terminal(), 1, 3), (io.StringIO(), 3, 0)):
        monkeypatch.setattr(sys, "stderr", stream)
        cache.write(tmp_path / str(lines), "digits train", 10, 5, chunks())
        assert (stream.getvalue().count("\n"), stream.getvalue().count("\r")) == (lines, returns)
        assert stream.getvalue().endswith("decoding digits train (once): 10 of 10\n")
