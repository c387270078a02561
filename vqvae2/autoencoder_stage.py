"""Stage `autoencoder`: the loss of the hierarchical autoencoder, its codebooks as running averages, its pictures.

Source: Razavi et al. 2019, eq. 2 with the codebook term replaced by moving averages, and algorithm 1.
Not here: the networks (`autoencoder.py`) and the quantiser (`quantizer.py`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from bitsperdim import augment, data, dequantize, images, rng
from bitsperdim.errors import InputError
from bitsperdim.model import Aux, Batch, Model, Pictures, Stage
from bitsperdim.run import Run
from vqvae2 import facts as facts_lib
from vqvae2 import quantizer
from vqvae2.autoencoder import Autoencoder
from vqvae2.config import AutoencoderConfig, Config
from vqvae2.facts import Facts

NUM_PICTURES = 32
CHUNK = 64  # images encoded or decoded at once


def stage(config: Config) -> Stage:
    return Stage(
        "autoencoder",
        model=lambda run: make(config.autoencoder.model, facts_lib.of_run(run), config.autoencoder.train.batch_size),
        source=lambda run, split: data.open_source(config.data, split),
        pictures=lambda run, mesh: _pictures(run, config),
        facts=lambda run: vars(facts_lib.of_run(run)),
        optim=config.autoencoder.optim,
        settings=config.autoencoder.train,
    )


def network(config: AutoencoderConfig, facts: Facts) -> Autoencoder:
    return Autoencoder(
        strides=config.strides,
        hidden=config.hidden,
        residual=config.residual,
        layers=config.residual_layers,
        code_dim=config.code_dim,
        channels=facts.shape[-1],
        dtype=jnp.dtype(config.dtype),
    )


def make(config: AutoencoderConfig, facts: Facts, batch_size: int) -> Model:
    """L = |x - x^|^2 / variance + beta sum_l |sg(e_l) - z_l|^2, each a mean over elements and examples.

    x in [-1, 1). `extra` holds a `Codebook` per level; it is updated after the forward pass, from sums over the global
    batch, so the output and the loss use the codebook before the update.
    """
    net = network(config, facts)
    if (config.colour.hue or config.colour.saturation) and facts.shape[-1] != 3:
        raise InputError(
            f"autoencoder.model.colour changes hue or saturation, but images have {facts.shape[-1]} channel(s); set "
            "both to 0"
        )

    def init(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        keys = dict(zip(net.levels, jax.random.split(rng.for_purpose(key, "codebooks"), len(net.levels)), strict=True))
        codebooks = {level: quantizer.init(keys[level], config.num_codes, config.code_dim) for level in net.levels}
        x = jnp.zeros((1, *facts.shape))
        params = net.init(rng.for_purpose(key, "parameters"), x, embeddings(codebooks))["params"]
        return params, {"codebooks": codebooks}

    def forward(params: PyTree, extra: PyTree, x: Array) -> tuple[dict[str, Array], dict, dict]:
        reconstruction, z, quantized = net.apply({"params": params}, x, embeddings(extra["codebooks"]))  # pyright: ignore
        parts = {"mse": jnp.square(reconstruction - x).mean((1, 2, 3))}
        parts |= {f"commitment_{level}": quantized[level].squared_error for level in net.levels}
        # Enough to know the variance of whatever images the mean is taken over.
        return parts | {"pixel_mean": x.mean((1, 2, 3)), "pixel_square": jnp.square(x).mean((1, 2, 3))}, z, quantized

    def loss(params: PyTree, extra: PyTree, batch: Batch, key: Array, step: Array) -> tuple[Array, Aux]:
        x = to_input(batch["image"], facts.levels)
        if config.flip:
            x = augment.flip(rng.per_example(rng.for_purpose(key, "flip"), batch["position"]), x)
        if config.colour != augment.ColourConfig():
            colours = augment.colour(config.colour, rng.for_purpose(key, "colour"), batch["position"], (x + 1.0) / 2.0)
            x = 2.0 * colours - 1.0
        parts, z, quantized = forward(params, extra, x)
        statistics = {
            level: quantizer.statistics(
                z[level],
                quantized[level].codes,
                num_codes=config.num_codes,
                key=rng.for_purpose(key, f"revival_{level}"),
                position=batch["position"],
                global_batch=batch_size,
            )
            for level in net.levels
        }
        scale = facts.variance if config.scale_by_variance else 1.0
        commitment = sum(parts[f"commitment_{level}"] for level in net.levels)
        objective = (parts["mse"] / scale + config.commitment * commitment).mean()
        return objective, Aux(parts, {level: statistics[level].counts for level in net.levels}, statistics)

    def measure(params: PyTree, extra: PyTree, batch: Batch, key: Array) -> Aux:
        parts, _, quantized = forward(params, extra, to_input(batch["image"], facts.levels))
        count = lambda codes: jax.nn.one_hot(codes, config.num_codes).sum((1, 2))
        mask = batch["mask"][:, None]
        return Aux(parts, {level: (mask * count(quantized[level].codes)).sum(0) for level in net.levels}, ())

    def update_extra(extra: PyTree, statistics: PyTree, key: Array, step: Array) -> PyTree:
        update = functools.partial(
            quantizer.update,
            decay=config.codebook_decay,
            epsilon=config.codebook_epsilon,
            revival_threshold=config.revival_threshold,
        )
        return {"codebooks": {level: update(extra["codebooks"][level], statistics[level]) for level in net.levels}}

    return Model(init, loss, measure, _summarize, update_extra)


def embeddings(codebooks: dict[str, quantizer.Codebook]) -> dict[str, Float[Array, "k d"]]:
    return {level: codebook.embedding for level, codebook in codebooks.items()}


def to_input(image: UInt8[Array, "b h w c"], levels: int) -> Float[Array, "b h w c"]:
    """The middle of each pixel's cell, in [-1, 1)."""
    return dequantize.scale(dequantize.centre(image), levels, "symmetric")


def to_picture(x: Float[Array, "b h w c"], levels: int) -> UInt8[Array, "b h w c"]:
    """The nearest image: levels 0 ... L - 1."""
    return dequantize.to_levels(dequantize.unscale(x, levels, "symmetric"), levels)


def _summarize(parts: dict[str, float], tallies: dict[str, np.ndarray]) -> dict[str, float]:
    """`mse` in the range [-1, 1), and over the variance of the very images it was taken over; use of the codebooks."""
    variance = parts["pixel_square"] - parts["pixel_mean"] ** 2
    figures = {"mse": parts["mse"], "mse_over_variance": parts["mse"] / variance}
    figures["psnr_db"] = float(10.0 * np.log10(4.0 / parts["mse"]))
    for level, counts in tallies.items():
        figures[f"commitment_{level}"] = parts[f"commitment_{level}"]
        figures[f"perplexity_codes_{level}"] = float(quantizer.perplexity(jnp.asarray(counts)))
        figures[f"used_codes_{level}"] = int(quantizer.codes_in_use(jnp.asarray(counts)))
    return figures


class Coder(NamedTuple):
    """An autoencoder's two directions, compiled. Codes: a dict of int32 [n, h, w], by level; images: levels, uint8."""

    encode: Callable[[PyTree, PyTree, UInt8[np.ndarray, "n h w c"]], dict[str, Int[np.ndarray, "n hl wl"]]]
    # Of levels that are not given the mean vector is taken: the image then shows what the given ones know.
    decode: Callable[[PyTree, PyTree, Mapping[str, Array | np.ndarray]], UInt8[np.ndarray, "n h w c"]]


def coder(run: Run) -> Coder:
    """Functions of (params, extra, images or codes). They raise InputError for shapes that are not those of the run."""
    about, config = facts_lib.of_run(run), run.config.autoencoder.model
    net = network(config, about)
    grids = about.grids(config.strides, net.levels)

    @jax.jit
    def encoded(params: PyTree, extra: PyTree, image: Array) -> dict[str, Array]:
        x = to_input(image, about.levels)
        return net.apply({"params": params}, x, embeddings(extra["codebooks"]), method="encode")  # pyright: ignore

    @jax.jit
    def decoded(params: PyTree, extra: PyTree, given: dict[str, Array]) -> Array:
        codebooks, batch = extra["codebooks"], len(next(iter(given.values())))
        tables = embeddings(codebooks)
        for level in [level for level in grids if level not in given]:
            mean = codebooks[level].ema_sums.sum(0) / codebooks[level].ema_counts.sum()
            tables[level] = jnp.broadcast_to(mean, tables[level].shape)
            given = given | {level: jnp.zeros((batch, *grids[level]), jnp.int32)}
        return to_picture(net.apply({"params": params}, given, tables, method="decode"), about.levels)  # pyright: ignore

    def encode(params, extra, images):
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != about.shape or images.max(initial=0) >= about.levels:
            raise InputError(
                f"images must be uint8 {['n', *about.shape]} with levels below {about.levels}, "
                f"not {images.dtype} {list(images.shape)} up to {images.max(initial=0)}"
            )
        return _in_chunks(lambda images: encoded(params, extra, images), images)

    def decode(params, extra, codes):
        if not isinstance(codes, Mapping):
            levels = ", ".join(f"'{level}': ..." for level in grids)
            raise InputError(f"codes must be a dict of arrays by level, {{{levels}}}, not {type(codes).__name__}")
        if not codes or not set(codes) <= set(grids):
            raise InputError(f"codes must be given for one or more of {', '.join(grids)}, not for {list(codes)}")
        codes = {level: np.asarray(grid) for level, grid in codes.items()}
        for level, grid in codes.items():
            # Indices beyond the codebook would be taken without a word.
            low, high = (grid.min(), grid.max()) if grid.size else (0, 0)
            is_integer = np.issubdtype(grid.dtype, np.integer)
            if not is_integer or grid.shape[1:] != grids[level] or low < 0 or high >= config.num_codes:
                raise InputError(
                    f"codes of '{level}' must be integers {['n', *grids[level]]} in 0..{config.num_codes - 1}, "
                    f"not {grid.dtype} {list(grid.shape)} in {low}..{high}"
                )
        if len({len(grid) for grid in codes.values()}) > 1:
            given = ", ".join(f"{level} {len(grid)}" for level, grid in codes.items())
            raise InputError(f"there must be as many codes of each level, not {given}")
        return _in_chunks(lambda codes: decoded(params, extra, codes), codes)

    return Coder(encode, decode)


def _in_chunks(function: Callable[[PyTree], PyTree], rows: PyTree) -> PyTree:
    """`function` of at most CHUNK rows at a time, as numpy, so that any number of them fits into memory."""
    count = len(jax.tree.leaves(rows)[0])
    # The last chunk is filled up: another size would be another program to compile.
    places = np.minimum(np.arange(max(-(-count // CHUNK), 1) * min(count, CHUNK)), count - 1)
    chosen = lambda chunk: jax.tree.map(lambda leaf: leaf[chunk], rows)
    parts = [jax.device_get(function(chosen(chunk))) for chunk in np.split(places, range(CHUNK, len(places), CHUNK))]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)


def _pictures(run: Run, config: Config) -> Pictures:
    """Held-out images above their reconstructions."""
    originals = held_out(data.open_source(config.data, "evaluation"))["image"]
    code, levels = coder(run), facts_lib.of_run(run).levels

    def pictures(params: PyTree, extra: PyTree, key: Array) -> dict[str, np.ndarray]:
        reconstructions = code.decode(params, extra, code.encode(params, extra, originals))
        return {"reconstructions": images.pairs(originals, reconstructions, levels=levels)}

    return pictures


def held_out(source: data.Source, count: int = NUM_PICTURES) -> dict[str, np.ndarray]:
    """A fixed choice of examples, spread over the split."""
    return source.read(np.linspace(0, source.size - 1, min(count, source.size)).astype(np.int64))
