"""Stage `autoencoder`: the loss of the hierarchical autoencoder, its codebooks as running averages, its pictures.

Source: Razavi et al. 2019, eq. 2 with the codebook term replaced by moving averages, and algorithm 1.
Not here: the networks (`autoencoder.py`) and the quantisers (`quantizers.py`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt8

from bitsperdim import augment, data, dequantize, images, rng
from bitsperdim.errors import InputError
from bitsperdim.model import Aux, Batch, Model, Pictures, Stage
from bitsperdim.run import Run
from vqvae2 import facts as facts_lib
from vqvae2 import latents, quantizer, quantizers
from vqvae2.autoencoder import Autoencoder
from vqvae2.config import AutoencoderConfig, Config
from vqvae2.facts import Facts

NUM_PICTURES = 32
NUM_BY_LEVEL = 8  # of them, reconstructed from the first levels alone too


def stage(config: Config) -> Stage:
    return Stage(
        "autoencoder",
        model=lambda run: make(config.autoencoder.model, facts_lib.of_run(run), config.autoencoder.train.batch_size),
        source=lambda run, split: data.open_source(config.data, split),
        pictures=lambda run, mesh: _pictures(run, config),
        facts=lambda run: vars(facts_lib.of_run(run)),
        optim=config.autoencoder.optim,
        settings=config.autoencoder.train,
        by_rows=True,
    )


def network(config: AutoencoderConfig, facts: Facts) -> Autoencoder:
    """The autoencoder of a config, for images of these facts."""
    kind = quantizers.make(config)
    return Autoencoder(
        strides=config.strides,
        hidden=config.hidden,
        residual=config.residual,
        layers=config.residual_layers,
        code_dim=config.code_dim,
        channels=facts.shape[-1],
        dtype=jnp.dtype(config.dtype),
        quantize=kind.quantize,
        lookup=kind.lookup,
    )


def make(config: AutoencoderConfig, facts: Facts, batch_size: int) -> Model:
    """L = |x - x^|^2 / variance + beta sum_l |sg(e_l) - z_l|^2, each a mean over elements and examples.

    x in [-1, 1). `extra` holds a `Codebook` per level; it is updated after the forward pass, from sums over the global
    batch, so the output and the loss use the codebook before the update. Commitment is 0 with finite scalars, and
    without a quantiser.
    """
    net, kind = network(config, facts), quantizers.make(config)
    if (config.colour.hue or config.colour.saturation) and facts.shape[-1] != 3:
        raise InputError(
            f"autoencoder.model.colour changes hue or saturation, but images have {facts.shape[-1]} channel(s); set "
            "both to 0"
        )

    def init(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        keys = dict(zip(net.levels, jax.random.split(rng.for_purpose(key, "codebooks"), len(net.levels)), strict=True))
        codebooks = {level: kind.init(keys[level]) for level in net.levels}
        x = jnp.zeros((1, *facts.shape))
        params = net.init(rng.for_purpose(key, "parameters"), x, embeddings(codebooks))["params"]
        return params, {"codebooks": codebooks}

    def forward(params: PyTree, extra: PyTree, x: Array, absent: Any = None) -> tuple[dict[str, Array], dict, dict]:
        tables = embeddings(extra["codebooks"])
        found: Any = net.apply({"params": params}, x, tables, absent)
        reconstruction, z, quantized = found
        parts = {"mse": jnp.square(reconstruction - x).mean((1, 2, 3))}
        parts |= {f"commitment_{level}": quantized[level].squared_error for level in net.levels}
        for level, codebook in extra["codebooks"].items():
            if config.cell:
                parts[f"beyond_bins_{level}"] = latents.beyond(codebook.embedding, z[level])
                continue
            # The same for every example: figures of a batch are means of parts.
            norms = jnp.linalg.norm(codebook.embedding, axis=-1)
            parts |= {f"norm_mean_{level}": jnp.broadcast_to(norms.mean(), len(x))}
            parts |= {f"norm_max_{level}": jnp.broadcast_to(norms.max(), len(x))}
        # Enough to know the variance of whatever images the mean is taken over.
        return parts | {"pixel_mean": x.mean((1, 2, 3)), "pixel_square": jnp.square(x).mean((1, 2, 3))}, z, quantized

    def loss(params: PyTree, extra: PyTree, batch: Batch, key: Array, step: Array) -> tuple[Array, Aux]:
        x = to_input(batch["image"], facts.levels)
        if config.flip:
            x = augment.flip(rng.per_example(rng.for_purpose(key, "flip"), batch["position"]), x)
        if config.colour != augment.ColourConfig():
            colours = augment.colour(config.colour, rng.for_purpose(key, "colour"), batch["position"], (x + 1.0) / 2.0)
            x = 2.0 * colours - 1.0
        keys = rng.per_example(rng.for_purpose(key, "level_dropout"), batch["position"])
        absent = absent_levels(keys, config.level_dropout, extra["codebooks"], net.levels)
        parts, z, quantized = forward(params, extra, x, absent)
        statistics = {
            level: kind.statistics(
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
        x = to_input(batch["image"], facts.levels)
        parts, _, quantized = forward(params, extra, x)
        codes = {level: quantized[level].codes for level in net.levels}

        def squared_error(*absent: str) -> Array:
            tables = tables_given(extra["codebooks"], {level: level not in absent for level in net.levels})
            image = net.apply({"params": params}, codes, tables, method="decode")
            return jnp.square(image - x).mean((1, 2, 3))  # pyright: ignore

        parts["mse"] = squared_error()  # of what the codes decode to
        if len(net.levels) > 1:
            parts |= {f"mse_without_{level}": squared_error(level) for level in net.levels}
        count = lambda grid: _hits(grid, batch["mask"], config.num_codes)
        return Aux(parts, jax.tree.map(count, codes), ())

    def update_extra(extra: PyTree, statistics: PyTree, key: Array, step: Array) -> PyTree:
        return {"codebooks": {level: kind.update(extra["codebooks"][level], statistics[level]) for level in net.levels}}

    return Model(init, loss, measure, _summarize, update_extra)


def embeddings(codebooks: dict[str, quantizer.Codebook]) -> dict[str, Float[Array, "k d"]]:
    return {level: codebook.embedding for level, codebook in codebooks.items()}


def absent_levels(
    keys: Key[Array, " b"], rate: float, codebooks: dict[str, quantizer.Codebook], levels: tuple[str, ...]
) -> dict[str, tuple[Bool[Array, " b"], Float[Array, " d"]]]:
    """Nested dropout over levels (Rippel et al. 2014): which examples are decoded without which, and with what instead.

    With probability `rate` an example keeps its n coarsest levels alone, n uniform in 1 ... L - 1; for the others
    stands the mean vector, as in `tables_given`. So each level has to say what the coarser ones cannot, and the decoder
    learns to do without the finer ones.
    """
    if not rate or len(levels) == 1:
        return {}
    u = jax.vmap(jax.random.uniform)(keys)
    kept = jnp.where(u < rate, 1 + (u / rate * (len(levels) - 1)).astype(jnp.int32), len(levels))
    mean = quantizer.mean_vector
    return {level: (index >= kept, mean(codebooks[level])) for index, level in enumerate(levels) if index}


def tables_given(
    codebooks: dict[str, quantizer.Codebook], given: Mapping[str, Bool[Array, ""] | bool]
) -> dict[str, Float[Array, "k d"]]:
    """The vectors to decode with where some levels are not given: each of their codes stands for the mean vector."""
    mean = quantizer.mean_vector
    return {level: jnp.where(given[level], book.embedding, mean(book)) for level, book in codebooks.items()}


def to_input(image: UInt8[Array, "b h w c"], levels: int) -> Float[Array, "b h w c"]:
    """The middle of each pixel's cell, in [-1, 1)."""
    return dequantize.scale(dequantize.centre(image), levels, "symmetric")


def to_picture(x: Float[Array, "b h w c"], levels: int) -> UInt8[Array, "b h w c"]:
    """The nearest image: levels 0 ... L - 1."""
    return dequantize.to_levels(dequantize.unscale(x, levels, "symmetric"), levels)


def _hits(codes: Int[Array, "b h w ..."], mask: Bool[Array, " b"], num_codes: int) -> Float[Array, " k"]:
    """How often each code occurs in the examples of the mask."""
    weights = jnp.broadcast_to(mask.reshape(-1, *[1] * (codes.ndim - 1)), codes.shape)
    return jnp.bincount(codes.ravel(), weights.ravel().astype(jnp.float32), length=num_codes)


def _summarize(parts: dict[str, float], tallies: dict[str, np.ndarray]) -> dict[str, float]:
    """`mse` in the range [-1, 1), and over the variance of the very images it was taken over; use of the codebooks.

    `mse_without_top` is the error of the same codes when the mean vector stands for each of that level: where it is no
    larger than `mse`, the decoder does not look at the level, however many of its codes are in use. The mean vector,
    not the codes of another image of the batch: so the figure of an image depends on nothing but the image.

    `psnr_db` is 10 log10(peak^2 / mse) of the mean error, with the peak 2 of that range: the figure that images in
    [0, 1] with a peak of 1 have.
    """
    # Never zero, as it would be over held-out images of one constant colour.
    variance = max(parts["pixel_square"] - parts["pixel_mean"] ** 2, 1e-12)
    figures = {"mse": parts["mse"], "mse_over_variance": parts["mse"] / variance}
    figures["psnr_db"] = float(10.0 * np.log10(4.0 / parts["mse"]))
    for level, counts in tallies.items():
        of_level = [f"{name}_{level}" for name in ("mse_without", "commitment", "beyond_bins")]
        figures |= {name: parts[name] for name in of_level if name in parts}
        figures[f"perplexity_codes_{level}"] = float(quantizer.perplexity(jnp.asarray(counts)))
        figures[f"used_codes_{level}"] = int(quantizer.codes_in_use(jnp.asarray(counts)))
        of_level = [f"{name}_{level}" for name in ("norm_mean", "norm_max")]
        figures |= {f"codebook_{name}": parts[name] for name in of_level if name in parts}
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
    grids = {level: (*grid, *config.cell) for level, grid in about.grids(config.strides, net.levels).items()}

    @jax.jit
    def encoded(params: PyTree, extra: PyTree, image: Array) -> dict[str, Array]:
        x = to_input(image, about.levels)
        return net.apply({"params": params}, x, embeddings(extra["codebooks"]), method="encode")  # pyright: ignore

    # Which levels are given is an argument: one program for all choices.
    @jax.jit
    def decoded(params: PyTree, extra: PyTree, codes: dict[str, Array], given: dict[str, Array]) -> Array:
        tables = tables_given(extra["codebooks"], given)
        return to_picture(net.apply({"params": params}, codes, tables, method="decode"), about.levels)  # pyright: ignore

    def encode(params, extra, images):
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != about.shape or images.max(initial=0) >= about.levels:
            raise InputError(
                f"images must be uint8 {['n', *about.shape]} with levels below {about.levels}, "
                f"not {images.dtype} {list(images.shape)} up to {images.max(initial=0)}"
            )
        return _in_chunks(lambda images: encoded(params, extra, images), images, facts_lib.at_once(about.shape))

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
        given = {level: np.bool_(level in codes) for level in grids}
        count = len(next(iter(codes.values())))
        filled = {level: np.zeros((count, *grid), np.int32) for level, grid in grids.items()} | codes
        rows = {level: grid.astype(np.int32) for level, grid in filled.items()}
        return _in_chunks(lambda codes: decoded(params, extra, codes, given), rows, facts_lib.at_once(about.shape))

    return Coder(encode, decode)


def _in_chunks(function: Callable[[PyTree], PyTree], rows: PyTree, size: int) -> PyTree:
    """`function` of at most `size` rows at a time, as numpy, so that any number of them fits into memory."""
    count = len(jax.tree.leaves(rows)[0])
    # The last chunk is filled up: another size would be another program to compile.
    places = np.minimum(np.arange(max(-(-count // size), 1) * min(count, size)), count - 1)
    chosen = lambda chunk: jax.tree.map(lambda leaf: leaf[chunk], rows)
    parts = [jax.device_get(function(chosen(chunk))) for chunk in np.split(places, range(size, len(places), size))]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)


def _pictures(run: Run, config: Config) -> Pictures:
    """Held-out images above their reconstructions; and in rows of several levels: image, from the top alone, ..., from
    all, each with one level more and the mean vector for those that miss."""
    originals = held_out(data.open_source(config.data, "evaluation"))["image"]
    code, levels = coder(run), facts_lib.of_run(run).levels

    def pictures(params: PyTree, extra: PyTree, key: Array) -> dict[str, np.ndarray]:
        codes = code.encode(params, extra, originals)
        reconstructions = code.decode(params, extra, codes)
        drawn = {
            "reconstructions": images.pairs(originals, reconstructions, levels=levels, labels=("image", "decoded"))
        }
        if len(codes) == 1:
            return drawn
        rows = [originals]
        for last in range(1, len(config.levels)):
            rows.append(code.decode(params, extra, {level: codes[level] for level in config.levels[:last]}))
        # The middle of each part of them: where crops of a picture lie in order, the first are of its edge.
        parts = min(NUM_BY_LEVEL, len(originals))
        chosen = ((np.arange(parts) + 0.5) * len(originals) / parts).astype(np.int64)
        tiles = np.stack([*rows, reconstructions], 1)[chosen].reshape(-1, *originals.shape[1:])
        grid = images.grid(tiles, columns=len(rows) + 1, levels=levels)
        headings = ["image", "top alone", *(f"to {level}" for level in config.levels[1:-1]), "all codes"]
        return drawn | {"reconstructions_by_level": images.labelled(grid, columns=headings)}

    return pictures


def held_out(source: data.Source, count: int = NUM_PICTURES) -> dict[str, np.ndarray]:
    """A fixed choice of examples, spread over the split."""
    return source.read(np.linspace(0, source.size - 1, min(count, source.size)).astype(np.int64))
