"""The runner of the benchmarks, their lines side by side, and RESULTS.md: that it says what the runs say."""

import argparse
import json
import pathlib
import re

import pytest

from bitsperdim import catalogue
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = sorted(path.parent for path in ROOT.glob("published/*/config.json"))


@pytest.fixture(scope="module")
def runner(benchmark):
    return benchmark("__main__")


@pytest.fixture(scope="module")
def record(benchmark):
    return benchmark("record")


@pytest.fixture(scope="module")
def results(benchmark):
    return benchmark("results")


def test_every_benchmark_is_listed_with_its_first_line_and_has_a_main(runner, benchmark, capsys):
    assert runner.main([]) == 0
    said = capsys.readouterr().out
    for name, line in runner.listed().items():
        assert re.search(rf"^{name} +{re.escape(line)}$", said, re.MULTILINE)
    assert {"loop", "data", "train_step", "compile_time", "memory", "samplers", "results"} <= runner.listed().keys()
    for name in runner.HELPERS:
        assert name not in runner.listed()


def test_a_name_that_there_is_not_is_refused_with_the_nearest(runner, capsys):
    assert runner.main(["tran_step"]) == 2
    assert capsys.readouterr().err == "error: there is no benchmark 'tran_step'; did you mean 'train_step'?\n"


def test_two_files_of_lines_stand_side_by_side_with_ratios(runner, record, capsys, tmp_path):
    for name, seconds in (("a", 2.0), ("b", 3.0)):
        lines = record.Record("step")
        lines.say("step", {"batch": 4}, seconds=seconds, parameters=10, bytes={"weights": 40})
        lines.say("step", {"batch": 8}, seconds=4 * seconds)
        lines.say("step", {"batch": 16 if name == "a" else 32}, seconds=1.0)  # only in one of them
        lines.end()
        (tmp_path / f"{name}.jsonl").write_text(capsys.readouterr().out)
    before, after = (record.read(str(tmp_path / f"{name}.jsonl")) for name in "ab")
    assert record.compare(before, after) == [
        ["step step batch=4", "seconds", 2.0, 3.0, 1.5],
        ["step step batch=4", "parameters", 10, 10, 1.0],
        ["step step batch=4", "bytes.weights", 40, 40, 1.0],
        ["step step batch=8", "seconds", 8.0, 12.0, 1.5],
    ]
    assert before[0]["on"]["devices"].endswith("cpu") and before[0]["on"]["jax"]
    assert runner.main(["--compare", *(str(tmp_path / f"{name}.jsonl") for name in "ab")]) == 0
    assert "1.5" in capsys.readouterr().out
    (tmp_path / "none.jsonl").write_text("nothing\n{}\n")
    assert runner.main(["--compare", str(tmp_path / "a.jsonl"), str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl has no line of a benchmark" in capsys.readouterr().err


def test_what_is_varied_is_a_case_for_each_combination(benchmark):
    untrained, parser = benchmark("untrained"), argparse.ArgumentParser()
    untrained.add_flags(parser, "arm_digits:tiny")
    flags = "--set arm.train.batch_size=4 --vary arm.model.filters 4 8 --vary arm.model.dtype float32 bfloat16"
    found = list(untrained.cases(parser.parse_args(flags.split())))
    assert [(config.arm.model.filters, config.arm.model.dtype) for _, config in found] == [
        *((4, "float32"), (4, "bfloat16"), (8, "float32"), (8, "bfloat16"))
    ]
    about = {"config": "arm_digits:tiny", "arm.train.batch_size": "4"}
    assert found[0][0] == about | {"arm.model.filters": "4", "arm.model.dtype": "float32"}
    assert all(config.arm.train.batch_size == 4 for _, config in found)
    with pytest.raises(InputError, match="has no section 'modle'"):
        list(untrained.cases(parser.parse_args(["--set", "arm.modle.filters=4"])))


@pytest.fixture
def measured(benchmark, monkeypatch, capsys):
    """`measured("samplers", flags)` -> the lines that the benchmark prints for the toy family."""

    def run(name, flags):
        monkeypatch.setattr("sys.argv", [name, f"--config={ROOT / 'tests' / 'toy' / 'toy.py'}", *flags.split()])
        benchmark(name).main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]

    return run


def test_a_step_and_a_forward_pass_are_measured_with_the_values_that_were_set(measured):
    lines = measured("train_step", "--batch=8 --set model.hidden=4 --repeats=1")
    assert [line["case"] for line in lines] == ["step", "forward"]
    # Encoder, decoder and its bias, of 64 pixels.
    assert all(line["figures"]["parameters"] == 4 * 128 + 64 for line in lines)
    assert all(line["of"]["batch"] == 8 and line["figures"]["seconds"] > 0 for line in lines)


def test_programs_are_compiled_and_images_drawn_with_weights_before_training(measured):
    (line,) = measured("compile_time", "--batch=8")
    assert line["figures"]["compile_seconds"] > 0 and line["of"]["stage"] == "model"
    lines = measured("samplers", "--batches 2 4 --repeats=1")
    assert [line["of"]["batch"] for line in lines] == [2, 4]
    assert all(line["figures"]["seconds_per_image"] > 0 for line in lines)


def test_a_table_for_readers_is_markdown_with_grouped_thousands(record):
    assert record.markdown(("a", "b"), [(1234567, None), ("x", 0.5)]) == [
        *("| a | b |", "| --- | --- |", "| 1,234,567 |  |", "| x | 0.5 |")
    ]


def test_results_of_a_run_name_what_it_measured_and_refuse_one_that_did_not(results, toy_config, tmp_path):
    workdir = str(tmp_path / "toy")
    run = run_lib.check(workdir, toy_config())
    run_lib.create(run)
    run_lib.write_json(run.folder("model") / "data.json", {})
    with pytest.raises(InputError, match=r"evaluation\.json is missing; python evaluate\.py --workdir="):
        list(results.report([workdir]))
    model = {"split": "digits evaluation", "images": 360, "nats": 80.0, "nats_standard_error": 2.0, "bits_per_dim": 1.5}
    measured = {"split": "evaluation", "model": model, "bits_per_dim": 1.5}
    run_lib.write_json(run.workdir / "evaluation.json", measured)
    text = "\n".join(results.report([workdir]))
    (row,) = results.rows(run, measured)
    assert (row.figure, row.value, row.error) == ("bits_per_dim", 1.5, pytest.approx(1.5 * 2.0 / 80.0))
    assert "1.500 ± 0.037 bits/dim" in text and "digits evaluation, 360 images" in text and "8 x cpu" in text
    assert "No published figure" in text and "of no config that is installed" in text


def test_a_value_is_told_as_far_as_its_error_goes(results):
    tell = lambda value, error: results.told(results.Row("nats", value, error, "nats", ""))
    assert tell(80.95218, 0.19909) == "80.95 ± 0.20 nats"
    assert tell(2.0224, 0.01337) == "2.022 ± 0.013 nats"
    assert tell(3460.48, 7.39) == "3460.5 ± 7.4 nats"
    assert tell(0.0123449, None) == "0.01234 nats"


def test_published_figures_stand_in_the_docstrings_of_their_configs(results):
    for reference in results.REFERENCES:
        text = catalogue.docstring(reference.setting.partition(":")[0])
        assert f"{reference.value:.2f}" in text or f"{reference.value:g}" in text, reference
        assert reference.setting in results.known()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_the_results_beside_the_code_are_those_of_the_published_runs(results, folder):
    run = run_lib.open_run(folder)
    measured = json.loads((folder / "evaluation.json").read_text())
    text = (ROOT / "RESULTS.md").read_text()
    found = results.rows(run, measured)
    assert found
    for row in found:
        assert f"{results.told(row)} ({row.kind})" in text
        assert f"| {row.figure} | {row.value:.6g} |" in text
