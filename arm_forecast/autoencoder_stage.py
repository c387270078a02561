"""Stage `autoencoder` of a latent ARM: mean squared error, BatchNorm's running moments, pictures.

Source: Wiggers & Hoogeboom 2020, supplement A.3. Not here: the network (`autoencoder.py`), and the codes of whole
splits (`codes.py`).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from arm_forecast import facts
from arm_forecast.autoencoder import Autoencoder
from arm_forecast.config import Config
from bitsperdim import batch_norm, data, dequantize, images, likelihood
from bitsperdim.errors import InputError
from bitsperdim.facts import check_images
from bitsperdim.model import Aux, Batch, Model, Pictures, Stage
from bitsperdim.run import Run

NUM_PICTURES = 32


def stage(config: Config) -> Stage:
    assert config.autoencoder is not None
    return Stage(
        "autoencoder",
        model=make,
        source=lambda run, split: data.open_source(config.data, split),
        pictures=lambda run, mesh: _pictures(run),
        facts=lambda run: facts.of_run(run)._asdict(),
        optim=config.autoencoder.optim,
        settings=config.autoencoder.train,
    )


def network(run: Run) -> Autoencoder:
    grid, config = facts.grid(run), run.config.autoencoder.model
    return Autoencoder(config.width, grid.channels, grid.values, facts.of_run(run).shape[-1])


def make(run: Run) -> Model:
    """L = mean of (x^ - x)^2, x in [-1, 1]."""
    net, about, grid = network(run), facts.of_run(run), facts.grid(run)

    def init(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        variables = net.init(key, jnp.zeros((1, *about.shape)))
        return variables["params"], {"batch_stats": variables["batch_stats"]}

    def parts(reconstruction: Array, x: Array) -> dict[str, Array]:
        square = lambda y: jnp.square(y).mean((1, 2, 3))
        return {"mse": square(reconstruction - x), "pixel_mean": x.mean((1, 2, 3)), "pixel_square": square(x)}

    def usage(codes: Int[Array, "b h w l"], mask: Array) -> Float[Array, "l k"]:
        return (mask[:, None, None, None, None] * jax.nn.one_hot(codes, grid.values)).sum((0, 1, 2))

    def loss(params: PyTree, extra: PyTree, batch: Batch, key: Array, step: Array) -> tuple[Array, Aux]:
        x = to_input(batch["image"], about.levels)
        (reconstruction, codes), moments = net.apply(
            {"params": params, **extra}, x, train=True, mutable=["batch_moments"]
        )
        values = parts(reconstruction, x)
        statistics = {"moments": moments["batch_moments"], "batches": jnp.ones(())}
        return values["mse"].mean(), Aux(values, usage(codes, jnp.ones(len(x))), statistics)

    def measure(params: PyTree, extra: PyTree, batch: Batch, key: Array) -> Aux:
        x = to_input(batch["image"], about.levels)
        reconstruction, codes = net.apply({"params": params, **extra}, x)  # pyright: ignore
        return Aux(parts(reconstruction, x), usage(codes, batch["mask"]), ())  # pyright: ignore

    def update_extra(extra: PyTree, statistics: PyTree, key: Array, step: Array) -> PyTree:
        moments, batches = statistics["moments"], statistics["batches"]
        return {"batch_stats": batch_norm.update_running(extra["batch_stats"], moments, batches)}

    return Model(init, loss, measure, _summarize, update_extra)


def _summarize(means: dict[str, float], usage: Float[np.ndarray, "l k"]) -> dict[str, float]:
    """The error in the range [-1, 1], over the variance of the same images; the entropy of the codes, each alone."""
    variance = means["pixel_square"] - means["pixel_mean"] ** 2
    shares = usage / usage.sum(-1, keepdims=True)
    entropy = -(shares * np.log(np.maximum(shares, 1e-30))).sum(-1).mean()
    return {
        "mse": means["mse"],
        "mse_over_variance": means["mse"] / variance,
        "perplexity_codes": float(np.exp(entropy)),
        "entropy_bits_per_code": likelihood.nats_to_bits(float(entropy)),
    }


def to_input(image: UInt8[Array, "b h w c"], levels: int) -> Float[Array, "b h w c"]:
    """Levels 0 ... L - 1 to [-1, 1], the ends included."""
    return image.astype(jnp.float32) * (2.0 / (levels - 1)) - 1.0


def to_picture(x: Float[Array, "b h w c"], levels: int) -> UInt8[Array, "b h w c"]:
    """The nearest image."""
    return dequantize.to_levels((x + 1.0) * (0.5 * (levels - 1)) + 0.5, levels)


class Coder(NamedTuple):
    """The autoencoder's two directions, compiled: functions of (params, extra, images or codes)."""

    encode: Callable[[PyTree, PyTree, UInt8[np.ndarray, "n h w c"]], Int[np.ndarray, "n hl wl l"]]
    decode: Callable[[PyTree, PyTree, Int[np.ndarray, "n hl wl l"]], UInt8[np.ndarray, "n h w c"]]


def encoder(run: Run) -> Callable[[PyTree, PyTree, Array], Int[Array, "n hl wl l"]]:
    """(params, extra, images) -> codes; to be compiled by its caller."""
    net, levels = network(run), facts.of_run(run).levels
    return lambda params, extra, image: net.apply(  # pyright: ignore
        {"params": params, **extra}, to_input(image, levels), method="encode"
    )


@functools.lru_cache(maxsize=4)
def coder(run: Run) -> Coder:
    """Raises InputError for images or codes that are not those of the run."""
    net, about, grid = network(run), facts.of_run(run), facts.grid(run)
    shape = (grid.height, grid.width, grid.channels)
    encoded = jax.jit(encoder(run))

    @jax.jit
    def decoded(params: PyTree, extra: PyTree, codes: Array) -> Array:
        return to_picture(net.apply({"params": params, **extra}, codes, method="decode"), about.levels)  # pyright: ignore

    def encode(params, extra, images):
        images = check_images(images, about)
        return np.asarray(encoded(params, extra, images))

    def decode(params, extra, codes):
        codes = np.asarray(codes)
        low, high = (codes.min(), codes.max()) if codes.size else (0, 0)
        if not np.issubdtype(codes.dtype, np.integer) or codes.shape[1:] != shape or low < 0 or high >= grid.values:
            raise InputError(
                f"codes must be integers {['n', *shape]} in 0..{grid.values - 1}, "
                f"not {codes.dtype} {list(codes.shape)} in {low}..{high}"
            )
        return np.asarray(decoded(params, extra, codes))

    return Coder(encode, decode)


def _pictures(run: Run) -> Pictures:
    """Held-out images above their reconstructions."""
    source = data.open_source(run.config.data, "evaluation")
    spread = np.unique(np.linspace(0, source.size - 1, NUM_PICTURES).astype(np.int64))
    originals, code, levels = source.read(spread)["image"], coder(run), facts.of_run(run).levels

    def pictures(params: PyTree, extra: PyTree, key: Array) -> dict[str, np.ndarray]:
        reconstructions = code.decode(params, extra, code.encode(params, extra, originals))
        return {"reconstructions": images.pairs(originals, reconstructions, levels=levels)}

    return pictures
