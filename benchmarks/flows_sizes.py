"""Parameters of the published flows, beside those of Table 4 of MaCow's appendix. Seconds: from shapes alone.

    python -m benchmarks flows_sizes              a JSON line a config, then all as a table
    python -m benchmarks flows_sizes --glow       what Glow's four would have with other priors of what is split off

Table 4 was not made from the released configs throughout: `why` says where they differ.
"""

import argparse
import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from benchmarks.record import Record, markdown
from bitsperdim import config_files, plan
from bitsperdim import run as run_lib
from flows import density
from flows.config import FlowConfig

# In millions; None where the table has no such row.
PUBLISHED = {
    "flows_cifar10": 41.2,
    "flows_cifar10:variational": 43.5,
    "flows_cifar10:glow": 44.2,
    "flows_imagenet64": 117.2,
    "flows_imagenet64:variational": 122.5,
    "flows_imagenet64:glow": 111.6,
    "flows_lsun128": 166.6,
    "flows_lsun128:variational": 171.9,
    "flows_lsun128:glow": 198.1,
    "flows_celebahq256": 171.9,
    "flows_celebahq256:variational": 177.3,
    "flows_celebahq256:glow": 170.8,
    "flows_cifar10:cpu": None,
    "flows_cifar10:cpu_variational": None,
    "flows_cifar10:cpu_glow": None,
    "flows_folder": None,
    "flows_folder:uniform": None,
    "flows_digits": None,
    "flows_digits:variational": None,
    "flows_digits:glow": None,
    "flows_digits:glow_variational": None,
}
WHY = {
    "flows_cifar10": "the released config has 37.2; none gives 41.2",
    "flows_cifar10:variational": "the released config has 38.4; none gives 43.5",
    "flows_imagenet64:variational": "the released config has 123.1; with LSUN's smaller noise flow it would be 122.6",
    "flows_lsun128:glow": "no config was released; see --glow",
    "flows_celebahq256:glow": "no config was released; cut off instead of rounded",
}
RECORD = Record("flows_sizes")
COLUMNS = ("config", "flow", "dequantizer", "parameters_m", "table_4_m", "why")
# The coupling before a split of C channels: hidden channels for each of C, at most 512 (8 in the released code); 0: one
# 3x3 convolution in its place. And whether the top has a trained prior, as in OpenAI's Glow.
READINGS = {
    **{f"min({factor} C, 512)": (factor, False) for factor in (1, 2, 4, 8, 16)},
    "512": (10**6, False),
    "a 3x3 convolution": (0, False),
    "the same, with a prior of the top": (0, True),
}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--glow", action="store_true", help="other readings of Glow's priors")
    if parser.parse_args().glow:
        names = [name for name in PUBLISHED if name.endswith(":glow") and PUBLISHED[name]]
        count = lambda reading: [f"{glow_parameters(name, *READINGS[reading]) / 1e6:.2f}" for name in names]
        rows = [[reading, *count(reading)] for reading in READINGS]
        print("\n".join(markdown(["prior", *names], [*rows, ["Table 4", *(str(PUBLISHED[name]) for name in names)]])))
        return
    cases = [case(name) for name in PUBLISHED]
    print("\n" + "\n".join(markdown(COLUMNS, [[found[column] for column in COLUMNS] for found in cases])))


def case(name: str) -> dict:
    _, config = run_lib.parse(config_files.load(name))
    params = jax.eval_shape(density.make(config.model, plan.facts_of(config.data)).init, jax.random.key(0))
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    found = {"config": name, "flow": count(params["flow"]), "dequantizer": count(params["dequantizer"])}
    found |= {"parameters_m": round(count(params) / 1e6, 3 if count(params) < 1e6 else 2)}
    found |= {"table_4_m": PUBLISHED[name], "why": WHY.get(name)}
    RECORD.say("parameters", {"config": name}, **{key: value for key, value in found.items() if key != "config"})
    return found


def glow_parameters(name: str, factor: int, has_top: bool) -> int:
    """In closed form, under one of `READINGS`."""
    flow: FlowConfig = run_lib.parse(config_files.load(name))[1].model.flow
    total, channels = 0, 3
    for i, (steps, width) in enumerate(zip(flow.steps, flow.widths, strict=True)):
        channels *= 4
        total += steps[0] * _step(channels, width, flow.affine)
        if i < len(flow.steps) - 1:
            plain = _convolution(9, channels // 2, channels)
            total += _step(channels, min(factor * channels, width), flow.prior_affine) if factor else plain
            channels //= 2
    return total + (_convolution(9, 2 * channels, 2 * channels) if has_top else 0)


def _step(channels: int, hidden: int, affine: bool) -> int:
    """Actnorm, 1x1 convolution, coupling."""
    half = channels // 2
    net = _convolution(9, half, hidden) + _convolution(1, hidden, hidden)
    return 2 * channels + channels**2 + net + _convolution(9, hidden, channels if affine else half)


def _convolution(taps: int, inputs: int, outputs: int) -> int:
    """Kernel, gain and bias."""
    return outputs * (taps * inputs + 2)
