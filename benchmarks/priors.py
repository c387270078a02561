"""What a sampled position of a VQ-VAE-2 prior costs, cached and by whole forward passes.

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false taskset -c 0 python -m benchmarks priors

Seconds are those of the processor, so that a CPU's other work does not count; an accelerator needs wall time.
The prior has 128 hidden and 512 residual units in 20 layers, no attention unless it is asked for, and weights drawn at
random; both samplers have the same weights and noise. `compile_seconds` and `seconds_cached`, a whole grid, are the
processor's too. Whole passes are timed for one position and multiplied where a grid would take minutes (`estimated`);
where they are not, both must draw the same codes (`same_codes`).
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import Record
from vqvae2 import sampling
from vqvae2.prior import READINGS, PixelSnail, Prior, incremental
from vqvae2.runs import Manner

NUM_CODES = 512
ALL_BELOW = 12  # sides of grids that whole passes draw to the end


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=128, help="hidden units")
    parser.add_argument("--layers", type=int, default=20, help="of the prior")
    parser.add_argument("--sides", type=int, nargs="+", default=[8, 16, 32, 64], help="edges of the grids of codes")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="grids drawn at once")
    parser.add_argument("--reading", choices=READINGS, default="quadrant", help="of the paper's 5x5 kernels")
    parser.add_argument("--attention_every", type=int, default=0, help="behind every so many layers; 0: none")
    arguments, record = parser.parse_args(), Record("priors")
    reading, every, hidden = arguments.reading, arguments.attention_every, arguments.hidden
    network = PixelSnail(NUM_CODES, 64, hidden, 4 * hidden, arguments.layers, 5 if reading == "causal" else 3, reading)
    prior = Prior(network.clone(attention_every=every, attention_features=hidden // 2, manner=Manner(scan=True)))
    params = jax.jit(prior.init)(jax.random.key(0), jnp.zeros((1, 4, 4), jnp.int32))["params"]
    about = {"hidden": hidden, "layers": arguments.layers, "reading": reading, "attention_every": every}
    about["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
    for batch in arguments.batches:
        for side in arguments.sides:
            of = {"side": side, "batch": batch, **about}
            record.say("grid", of, **measure(prior, params, side, batch))
    record.end()


def measure(prior: Prior, params, side: int, batch: int) -> dict:
    noise, shape = sampling.gumbel_noise(jax.random.key(1), jnp.arange(batch), NUM_CODES), (batch, side, side)

    @jax.jit
    def cached(params):
        return sampling.sample_codes(incremental(prior, {"params": params}), noise, shape)

    @jax.jit
    def whole(params):
        network = sampling.whole(lambda codes: prior.apply({"params": params}, codes))  # pyright: ignore
        return sampling.sample_codes(network, noise, shape)

    start = clock()
    cached.lower(params).compile()
    compile_seconds = clock() - start
    codes, seconds = timed(cached, params)
    figures = {
        "compile_seconds": compile_seconds,
        "seconds_cached": seconds,
        "milliseconds_a_position": 1e3 * seconds / side**2,
    }
    if side <= ALL_BELOW:
        expected, seconds_whole = timed(whole, params)
        figures |= {"same_codes": bool((codes == expected).all()), "estimated": False}
    else:
        one = jax.jit(lambda params, codes: prior.apply({"params": params}, codes)[:, -1, -1])
        seconds_whole = side**2 * timed(functools.partial(one, codes=codes), params)[1]
        # One pass over all cells says whether each cached choice was the right one.
        figures |= {"same_codes": consistent(prior, params, codes, noise), "estimated": True}
    return figures | {"seconds_whole": seconds_whole, "ratio": seconds_whole / seconds}


def consistent(prior: Prior, params, codes, noise) -> bool:
    """Whether every code is the argmax of the whole grid's logits with its noise, which proves the whole sample."""
    batch, height, width = codes.shape
    eps = jax.jit(jax.vmap(noise))(jnp.arange(height * width)).swapaxes(0, 1).reshape(batch, height, width, -1)
    logits = jax.jit(lambda params, codes: prior.apply({"params": params}, codes))
    return all(
        bool(((logits(params, codes[i : i + 1]) + eps[i : i + 1]).argmax(-1) == codes[i : i + 1]).all())
        for i in range(batch)
    )


def clock() -> float:
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def timed(function, params) -> tuple[np.ndarray, float]:
    """The result, and the median of three runs after the one that compiles."""
    result, seconds = jax.block_until_ready(function(params)), []
    for _ in range(3):
        start = clock()
        jax.block_until_ready(function(params))
        seconds.append(clock() - start)
    return np.asarray(result), sorted(seconds)[1]
