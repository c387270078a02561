"""What forecasting modules save, by what they are given to see.

    python -m benchmarks modules --config=arm_digits

Every case trains the same model with other modules (h is cut off, so the likelihood is the same) and draws the same
samples: `calls_percent` is the mean number of network calls in % of the dimensions, by the modules with and without the
fallback to fixed-point iteration, and by fixed-point iteration alone.
"""

import argparse
import tempfile

import jax
import numpy as np

from arm_forecast import samplers, sampling
from arm_forecast.samplers import Sampler
from benchmarks.record import Record
from bitsperdim import config_files, sharding, trainer

CASES = {
    "h": ((), "exact"),
    "h, x": (("x",), "exact"),
    "h, noise": (("noise",), "exact"),
    "h, x, noise": (("x", "noise"), "exact"),
    "h, x, noise (literal posterior)": (("x", "noise"), "literal"),
}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="arm_digits", help="name of a config, with a variant")
    parser.add_argument("--steps", type=int, default=0, help="of training; default: those of the config")
    parser.add_argument("--data_dir", default="", help="of TFDS; default: its usual folder")
    parser.add_argument("--num", type=int, default=128, help="samples")
    arguments, record = parser.parse_args(), Record("modules")
    for case, (inputs, posterior) in CASES.items():
        config = config_files.load(arguments.config)
        if arguments.data_dir:
            config.data.data_dir = arguments.data_dir
        steps = arguments.steps or config.arm.train.steps
        config.arm.train.update({"steps": steps, "evaluate_every": steps, "pictures_every": steps})
        config.arm.forecast.update({"inputs": inputs, "posterior": posterior})
        with tempfile.TemporaryDirectory() as folder:
            run = trainer.train(config, folder)
            figures = measure(run, arguments.num)
        record.say(case, {"config": arguments.config, "steps": steps}, **figures)
    record.end()


def measure(run, count: int) -> dict[str, float]:
    mesh = sharding.make_mesh(run.config.mesh)
    measured, arm = trainer.evaluate(run, "evaluation"), sampling.restore(run, mesh)
    figures = {name: round(measured["arm"][name], 4) for name in ("bits_per_dim", "forecast_kl_nats")}
    for name in ("modules", "modules_without_fallback", "fixed_point"):
        samples = samplers.draw(arm, Sampler(name), jax.random.key(0), count, count)
        percent = 100.0 * np.asarray(samples.calls) / samples.x.shape[1]
        figures[f"calls_percent_{name}"] = round(float(percent.mean()), 2)
        figures[f"standard_error_{name}"] = round(float(percent.std(ddof=1) / np.sqrt(count)), 2)
    return figures
