"""The rate and distortion of runs, from figures written by hand."""

import json
import math
import sys

import pytest

from bitsperdim import config_files
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from vqvae2 import run_plots


@pytest.fixture(scope="module")
def rate_distortion(benchmark):
    return benchmark("rate_distortion")


@pytest.fixture
def evaluated(tmp_path):
    """`evaluated("small", num_codes, measured)` -> a run of 32x32 images whose evaluation.json says so."""

    def make(name, num_codes, measured, images=100, source=None):
        config = config_files.load("vqvae2_photos:tiny")
        config.autoencoder.model.num_codes = num_codes
        run = run_lib.check(tmp_path / name, config)
        run_lib.create(run)
        about = {"shape": [32, 32, 3], "levels": 256, "num_classes": 0, "variance": 0.3}
        run_lib.write_json(run.workdir / "autoencoder" / "data.json", about)
        if source is not None:
            run_lib.write_json(run.workdir / "autoencoder" / "sources.json", {"train": {}, "evaluation": source})
        autoencoder = {"images": images, "mse": 0.04, "psnr_db": 20.0}
        run_lib.write_json(
            run.workdir / "evaluation.json", {"split": "evaluation", "autoencoder": autoencoder, **measured}
        )
        return str(run.workdir)

    return make


def test_levels_without_a_prior_count_as_uniform_codes_and_say_so(rate_distortion, evaluated):
    # Strides (4, 2): 4x4 codes above 8x8.
    none = rate_distortion.case(evaluated("none", 512, {}))
    assert none["bits_per_image"] == none["bits_uniform"] == 9 * (16 + 64)
    assert none["rate_of"] == "top uniform, bottom uniform"
    top = rate_distortion.case(evaluated("top", 100, {"top": {"rate_bits_per_image": 50.5}}))
    assert top["bits_per_image"] == pytest.approx(50.5 + 64 * math.log2(100))
    assert top["bits_uniform"] == pytest.approx(80 * math.log2(100))
    assert top["rate_of"] == "top prior, bottom uniform"


def test_the_command_prints_a_line_a_run_and_draws_the_curve(rate_distortion, evaluated, monkeypatch, capsys, tmp_path):
    priors = {"top": {"rate_bits_per_image": 60.0}, "bottom": {"rate_bits_per_image": 240.0}}
    runs = [evaluated("large", 512, priors), evaluated("small", 64, priors)]
    monkeypatch.setattr(sys, "argv", ["rate_distortion.py", *runs, f"--out={tmp_path / 'curve.png'}"])
    rate_distortion.main()
    small, large, *_ = capsys.readouterr().out.splitlines()
    assert json.loads(small)["of"]["run"] == "small" and json.loads(large)["of"]["num_codes"] == 512
    assert json.loads(small)["figures"]["bits_per_image"] == 300.0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_cannot_be_compared_are_refused(rate_distortion, evaluated, tmp_path):
    cases = [rate_distortion.case(evaluated(name, 64, {}, images)) for name, images in (("a", 100), ("b", 90))]
    with pytest.raises(InputError, match="a: 100 images of photos, 32x32x3, 256 levels; b: 90 images of photos"):
        rate_distortion.check_comparable(cases)
    (tmp_path / "a" / "evaluation.json").unlink()
    with pytest.raises(InputError, match=r"evaluation.json is missing; python evaluate.py --workdir=.*a makes it"):
        rate_distortion.case(str(tmp_path / "a"))


def test_runs_on_other_images_are_told_apart_by_fingerprint_or_name(rate_distortion, evaluated):
    check = lambda *sources: rate_distortion.check_comparable(
        [rate_distortion.case(evaluated(f"{index}", 32, {}, source=source)) for index, source in enumerate(sources)]
    )
    folder = lambda name, fingerprint: {"name": name, "fingerprint": fingerprint}
    check(folder("/a/pictures", "f00d"), folder("/b/pictures", "f00d"))  # moved
    with pytest.raises(InputError, match=r"0: 100 images of f00d, 32x32x3, 256 levels; 1: 100 images of beef"):
        check(folder("/a/pictures", "f00d"), folder("/a/pictures", "beef"))
    with pytest.raises(InputError, match="100 images of svhn test"):
        check(folder("cifar10 test", ""), folder("svhn test", ""))


def test_one_run_is_a_curve_from_nothing_over_the_top_codes_to_all_codes(evaluated):
    about = {"images": 100, "mse": 0.04, "mse_over_variance": 0.25, "mse_without_bottom": 0.1, "mse_without_top": 0.15}
    run = run_lib.open_run(evaluated("run", 512, {}))
    measured = {"autoencoder": about, "top": {"rate_bits_per_image": 50.0}}
    assert run_plots.rate_distortion(run, measured) == {
        "uniform codes": [("nothing", 0.0, 0.16), ("top alone", 144.0, 0.1), ("all codes", 720.0, 0.04)],
        "codes by the trained priors": [("nothing", 0.0, 0.16), ("top alone", 50.0, 0.1), ("all codes", 626.0, 0.04)],
    }
    assert run_plots.plots(run, measured)["rate_distortion"].std() > 0
    assert run_plots.plots(run, {"top": {"rate_bits_per_image": 50.0}}) == {}
