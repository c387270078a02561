"""What the comparison of bounded and unbounded scales takes from runs, from figures written by hand."""

import json
import math

import pytest

from bitsperdim import config_files
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError


@pytest.fixture(scope="module")
def vdvae_bounded(benchmark):
    return benchmark("vdvae_bounded")


@pytest.fixture
def run(tmp_path):
    """`run(bound, bits, size)` -> a run on photographs with an evaluation of half a bit a dimension."""

    def make(bound, bits=5, size=32):
        config = config_files.load("vdvae_imagenet32:tiny")
        config.data.update({"bits": bits, "image_size": size})
        config.model.min_log_scale = bound
        run = run_lib.check(tmp_path / f"{bound}-{bits}-{size}", config)
        run_lib.create(run)
        run_lib.write_json(run.folder("model") / "data.json", {"shape": [size, size, 3], "levels": 2**bits})
        nats = 3 * size**2 * math.log(2.0)
        figures = {"reconstruction_nats": 0.375 * nats, "kl_nats": 0.125 * nats, "bits_per_dim": 0.5, "ssim": 0.9}
        lines = ({"step": 10, "kind": "train"}, {"step": 10, "kind": "evaluation", **figures})
        (run.folder("model") / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run

    return make


def test_curves_are_of_the_evaluations_in_bits_per_dim(vdvae_bounded, run):
    (record,) = vdvae_bounded.evaluations(run(-250.0))
    expected = {"reconstruction_bits_per_dim": 0.375, "kl_bits_per_dim": 0.125, "bits_per_dim": 0.5, "ssim": 0.9}
    assert record == pytest.approx({"step": 10, **expected})
    assert vdvae_bounded.curves({"unbounded": [record], "bounded": [record]}).std() > 0
    untrained = run(-7.0)
    (untrained.folder("model") / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="has no evaluation; train the run first"):
        vdvae_bounded.evaluations(untrained)


def test_runs_that_cannot_be_compared_are_refused(vdvae_bounded, run):
    both = {"unbounded": run(-250.0), "bounded": run(-7.0)}
    source = vdvae_bounded.same_images(both | {"8 bits": run(-250.0, bits=8)})
    assert (source.levels, source.shape) == (256, (32, 32, 3))
    for wrong, message in (
        ({"bounded": run(-250.0)}, "must be below that of the second"),
        ({"bounded": run(-7.0, size=48)}, "has other held-out images than"),
        ({"bounded": run(-7.0, bits=4)}, "has 16 levels, not 32"),
        ({"8 bits": run(-250.0)}, "has 32 levels, not 256"),
    ):
        with pytest.raises(InputError, match=message):
            vdvae_bounded.same_images(both | wrong)
