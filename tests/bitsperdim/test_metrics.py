"""Figures as they are read again: from a file after a kill, from a screen, from a table."""

import io
import json
import math
import sys

import pytest

from bitsperdim import metrics
from bitsperdim.errors import InputError
from bitsperdim.metrics import Console, Rate, Throughput, Writer

UNKNOWN = Rate(math.nan, math.nan)


class Terminal(io.StringIO):
    """A terminal of 80 columns that keeps what is sent to it, and shows its last line as a person would see it."""

    encoding = "ascii"

    def isatty(self):
        return True

    def screen(self):
        lines = []
        for sent in self.getvalue().split("\n"):
            line = ""
            for part in sent.split("\r"):
                line = part + line[len(part) :]
            lines.append(line.rstrip())
        return lines


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal()


def write_steps(folder, first, last):
    with Writer(folder, first - 1) as writer:
        for step in range(first, last + 1):
            writer.write(step, "train", {"mse": step / 10})


def test_lines_are_json_with_step_kind_and_figures(tmp_path):
    with Writer(tmp_path) as writer:
        writer.write(400, "evaluation", {"bits_per_dim": 3.25, "mse": 1})
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 400, "kind": "evaluation", "bits_per_dim": 3.25, "mse": 1.0}


def test_a_line_is_there_before_the_file_is_closed(tmp_path):
    with Writer(tmp_path) as writer:
        writer.write(1, "train", {"mse": 0.5})
        assert metrics.read(tmp_path / "metrics.jsonl")[0]["mse"] == 0.5


def test_a_resumed_run_has_each_step_once(tmp_path):
    write_steps(tmp_path, 1, 7)
    write_steps(tmp_path, 5, 9)  # went on from the checkpoint of step 4
    records = metrics.read(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 10))
    assert records[6]["mse"] == 0.7


def test_a_line_cut_by_a_kill_is_passed_over_and_then_removed(tmp_path):
    write_steps(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    assert [record["step"] for record in metrics.read(path)] == [1, 2]
    write_steps(tmp_path, 3, 4)
    assert [record["step"] for record in metrics.read(path)] == [1, 2, 3, 4]


def test_damage_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for damaged in (b'{"st', b"[1, 2]", b"{}", b"\xff\xfe", b'{"step": 2, "mse": "low"}', b'{"step": [2]}'):
        path.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 3}\n')
        with pytest.raises(InputError, match=r"metrics.jsonl, line 2, is no record"):
            metrics.read(path)


def test_values_that_are_not_finite_are_null(tmp_path):
    with Writer(tmp_path) as writer:
        writer.write(1, "train", {"mse": math.nan, "gradient_norm": math.inf})
    [record] = metrics.read(tmp_path / "metrics.jsonl")
    assert record["mse"] is None and record["gradient_norm"] is None


def test_no_file_reads_as_no_lines(tmp_path):
    assert metrics.read(tmp_path / "metrics.jsonl") == []


def test_tensorboard_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(InputError, match=r'pip install "bitsperdim\[tensorboard\]"'):
        Writer(tmp_path, tensorboard=True)


def test_tensorboard_gets_the_same_figures(tmp_path):
    pytest.importorskip("tensorboardX")
    with Writer(tmp_path, tensorboard=True) as writer:
        writer.write(3, "train", {"mse": 0.5})
    [events] = tmp_path.glob("events.out.tfevents.*")
    assert b"train/mse" in events.read_bytes()


def test_speed_counts_neither_the_first_step_nor_pauses():
    now = iter([100.0, 104.0, 200.0, 201.0]).__next__
    throughput = Throughput(images_per_step=8, clock=now)
    throughput.restart(1)  # at 100 s: the first step took all the time before
    assert throughput.read(11) == Rate(images_per_second=20.0, seconds_per_step=0.4)
    throughput.restart(11)  # at 200 s, after an evaluation
    assert throughput.read(13).images_per_second == 16.0


def test_a_window_too_short_to_tell_goes_on():
    now = iter([100.0, 100.01, 100.02, 100.5, 102.5]).__next__
    throughput = Throughput(images_per_step=8, clock=now)
    throughput.restart(1)
    assert all(math.isnan(throughput.read(step).images_per_second) for step in (2, 3))
    assert throughput.read(6) == Rate(images_per_second=80.0, seconds_per_step=0.1)
    assert throughput.read(8).images_per_second == 8.0


def test_speed_is_unknown_before_the_first_window():
    assert math.isnan(Throughput(8).read(10).images_per_second)


def test_a_file_gets_plain_lines():
    stream = io.StringIO()
    console = Console(2000, stream)
    console.progress(400, {"mse": 0.0123456}, Rate(1234.4, 190 / 1600))
    console.close()
    assert stream.getvalue() == "step 400/2000  1,234 images/s  ETA 00:03:10  mse 0.01235\n"


def test_an_unknown_speed_is_left_out():
    assert metrics.progress_line(1, 10, {"mse": 2.0}, UNKNOWN) == "step 1/10  mse 2"


def test_a_terminal_shows_one_bar_that_is_redrawn(terminal):
    console = Console(10, terminal)
    console.progress(1, {"bits_per_dim": 8.125}, Rate(99.0, 3600.0))
    console.progress(5, {"mse": 2.0}, UNKNOWN)
    assert terminal.screen() == ["[##########..........]  50%  step 5/10  mse 2"]
    console.close()
    assert terminal.getvalue().endswith("\n")


def test_a_message_stands_above_the_bar(terminal):
    console = Console(4, terminal)
    console.progress(1, {}, UNKNOWN)
    console.message("evaluating")
    assert terminal.screen() == ["evaluating", "[#####...............]  25%  step 1/4"]


def test_a_bar_never_reaches_the_edge(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    Console(10, terminal).progress(5, {"bits_per_dim": 3.5}, Rate(10.0, 1.0))
    assert terminal.screen() == ["[##########..........]  50%"]


@pytest.mark.parametrize("term", ["dumb", None])
def test_a_dumb_terminal_gets_plain_lines(terminal, monkeypatch, term):
    monkeypatch.delenv("TERM") if term is None else monkeypatch.setenv("TERM", term)
    Console(10, terminal).progress(5, {}, UNKNOWN)
    assert terminal.getvalue() == "step 5/10\n"


def test_a_lost_terminal_does_not_end_the_training(terminal):
    console = Console(10, terminal)
    terminal.close()
    console.progress(5, {}, UNKNOWN)
    console.message("evaluating")
    console.close()


def test_letters_that_a_terminal_lacks_are_replaced(terminal):
    Console(10, terminal).message("Größe")
    assert terminal.screen()[0] == "Gr??e"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "00:00:00"), (190, "00:03:10"), (86_399.6, "1d 00:00:00"), (200_000, "2d 07:33:20")]
)
def test_duration(seconds, text):
    assert metrics.duration(seconds) == text


def test_table_aligns_words_left_and_numbers_right():
    text = metrics.table([("bits_per_dim", 3.14159265), ("images", 10000), ("split", None)], head=("figure", "value"))
    assert text.splitlines() == [
        "figure          value",
        "------------  -------",
        "bits_per_dim  3.14159",
        "images          10000",
        "split               -",
    ]


def test_table_without_a_head_is_its_rows():
    assert metrics.table([("a", "x"), ("bcd", "y")]) == "a    x\nbcd  y"


def test_between_two_logs_the_bar_of_a_terminal_moves(terminal, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    console = Console(10, terminal)
    console.progress(2, {"mse": 2.0}, UNKNOWN)
    console.tick(3)
    assert terminal.screen() == ["[####................]  20%  step 2/10  mse 2"]
    now[0] += 1.0
    console.tick(4)
    assert terminal.screen() == ["[########............]  40%  step 4/10  mse 2"]
