"""The chain of a whole run: the codes of every level given those above, the image that all of them stand for.

Source: Razavi et al. 2019, algorithm 2. Not here: training the parts (`autoencoder_stage.py`, `prior_stage.py`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from arm_forecast import gumbel
from bitsperdim import metrics, rng, sharding, trainer
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from bitsperdim.model import Loaded
from bitsperdim.run import Run
from vqvae2 import autoencoder_stage, codes, comparison, facts, latents, sampling
from vqvae2.autoencoder import level_names
from vqvae2.conditioning import Conditioner, ConditioningStack
from vqvae2.prior import PixelSnail, Prior, incremental
from vqvae2.runs import Manner

Draw = Callable[..., tuple[Int[Array, "b h w"], Int[Array, " b"]]]
PerLevel = float | Mapping[str, float]
SAMPLERS = ("cached", "fixed_point", "ancestral")
PIXELS = "pixels"  # the stage below all levels, whose cells are pixels
BATCH = 64  # samples drawn at once where nothing else is said


class _Options(NamedTuple):
    temperature: float
    top_k: int
    top_p: float


def network(run: Run, name: str) -> Prior:
    """The prior of a level. Raises InputError where classes are asked of data that have none."""
    config, about = run.config.prior(name).model, facts.of_run(run)
    if config.class_conditional and not about.num_classes:
        raise InputError(
            f"{name}.model.class_conditional=True, but the images have no labels; set it to False, or use images with "
            "labels (of a folder with sub-folders: data.labels=True)"
        )
    (num_codes, cell), dtype = values(run, name), jnp.dtype(config.dtype)
    manner = Manner(config.scan, config.remat)
    reading = config.reading
    if reading == "auto":
        reading = "quadrant" if config.attention_every else "causal"
    pixel_snail = PixelSnail(
        num_codes=num_codes,
        embedding=config.embedding,
        hidden=config.hidden,
        residual=config.residual,
        layers=config.layers,
        kernel=config.filter if reading == "causal" else (config.filter + 1) // 2,
        reading=reading,
        activation=config.activation,
        attention_every=config.attention_every,
        attention_heads=config.attention_heads,
        attention_features=config.attention_features,
        attention_dropped=config.attention_dropped,
        output_layers=config.output_layers,
        dropout=config.dropout,
        num_classes=about.num_classes if config.class_conditional else 0,
        dtype=dtype,
        manner=manner,
        channels=sum(cell),
        mixtures=config.mixtures,
    )
    shape = config.conditioning
    if shape is None:
        return Prior(pixel_snail)
    stack = ConditioningStack(shape.blocks, shape.widths, shape.bottlenecks, shape.norm, dtype, manner)
    grid = shapes(run)
    codes_above = run.config.autoencoder.model.num_codes
    octaves = (grid[name][0] // grid[_above(run, name)][0]).bit_length() - 1
    return Prior(pixel_snail, Conditioner(codes_above, config.embedding, stack, octaves, dtype))


def grids(run: Run) -> dict[str, tuple[int, int]]:
    """Height and width of every level's codes, top first."""
    strides = run.config.autoencoder.model.strides
    return facts.of_run(run).grids(strides, level_names(len(strides)))


def shapes(run: Run) -> dict[str, tuple[int, int]]:
    """The grids of every level, and that of the pixels below them."""
    height, width, _ = facts.of_run(run).shape
    return grids(run) | {PIXELS: (height, width)}


def values(run: Run, name: str) -> tuple[int, tuple[int, ...]]:
    """How many values there are, and how many of them a cell holds: () one code, (d,) several channels."""
    about, model = facts.of_run(run), run.config.autoencoder.model
    return (about.levels, about.shape[-1:]) if name == PIXELS else (model.num_codes, model.cell)


def upper(run: Run, name: str, batch: dict[str, Any]) -> tuple[Any, ...]:
    """The codes above level `name`, coarsest first."""
    levels = list(shapes(run))
    return tuple(batch[level] for level in levels[: levels.index(name)])


def draw(run: Run, name: str, mesh: Mesh, sampler: str = "cached", top_k: int = 0, top_p: float = 1.0) -> Draw:
    """(params, extra, key, ids, codes above, labels, temperature) -> codes of level `name`, calls of each example.

    Compiled. Sample i of a key is the same in any batch. The conditioning stack runs once. 'cached' evaluates each cell
    once, 'fixed_point' whole grids as often as forecasts fail, 'ancestral' the whole grid for each cell: the same
    codes. Examples are spread over the devices of the mesh, each of which has all weights and draws by itself.
    """
    net, (height, width), (num_codes, cell) = network(run, name), shapes(run)[name], values(run, name)
    if cell and (sampler == "fixed_point" or top_k or top_p < 1.0):
        raise InputError(
            "latents without a quantiser, and pixels, are sampled by 'cached' or 'ancestral', without top_k and top_p"
        )

    def sample(
        params: PyTree,
        extra: PyTree,
        key: Key[Array, ""],
        ids: Int[Array, " b"],
        above: tuple[Int[Array, "b hl wl"], ...],
        label: Int[Array, " b"] | None,
        temperature: Float[Array, ""],
    ) -> tuple[Int[Array, "b h w"], Int[Array, " b"]]:
        variables = {"params": params, **extra}
        condition = net.apply(variables, above, method="condition")
        key = rng.for_purpose(key, name)
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        logits = lambda grid, context: net.apply(variables, grid, *context, method="logits")
        if sampler == "fixed_point":
            size, context = (height, width, num_codes), (condition, label)
            return sampling.sample_codes_predictively(logits, key, ids, context, size, **options)  # pyright: ignore
        if sampler == "cached":
            evaluator = incremental(net, variables, condition, label)  # pyright: ignore
        else:
            evaluator = sampling.whole(lambda grid: logits(grid, (condition, label)))  # pyright: ignore
        if cell:
            noise, choose = (
                latents.uniforms(key, ids, net.network.mixtures, net.network.channels),
                latents.choose(num_codes),
            )
        else:
            noise, choose = sampling.gumbel_noise(key, ids, num_codes), sampling.choose_code
        drawn = sampling.sample_codes(evaluator, noise, (len(ids), height, width, *cell), choose=choose, **options)
        return drawn, jnp.full(len(ids), height * width)

    whole, batch = PartitionSpec(), sharding.over_batch(mesh).spec
    # Not left to the compiler, which might spread a layer over the devices: a message for each layer of each cell.
    places = {"in_specs": (whole, whole, whole, batch, batch, batch, whole), "out_specs": batch}
    spread = jax.shard_map(sample, mesh=mesh, **places, check_vma=False)
    compiled = jax.jit(spread, out_shardings=sharding.replicated(mesh))

    def any_batch(
        params: PyTree, extra: PyTree, key: Array, ids: Array, above: tuple, label: Array | None, temperature
    ):
        count = len(ids)
        pad = lambda rows: jnp.pad(rows, [(0, -count % mesh.size)] + [(0, 0)] * (rows.ndim - 1), mode="edge")
        drawn = compiled(params, extra, key, *jax.tree.map(pad, (ids, above, label)), jnp.float32(temperature))
        return jax.tree.map(lambda rows: rows[:count], drawn)

    return any_batch


def for_drawing(run: Run, name: str, state: PyTree, mesh: Mesh) -> tuple[PyTree, PyTree]:
    """Weights and running moments of a prior on every device, in the type that its layers compute in.

    Drawing reads all weights for each cell, so half of their bytes is half of its time. The same values as without:
    layers round their weights to that type anyway. The last layer and normalisations do not, and keep theirs.
    """
    dtype = jnp.dtype(run.config.prior(name).model.dtype)

    def cast(path, leaf: Array) -> Array:
        exact = any(part in jax.tree_util.keystr(path, simple=True, separator="/") for part in ("head/", "norm/"))
        return leaf if exact else leaf.astype(dtype)

    place = jax.jit(lambda tree: jax.tree_util.tree_map_with_path(cast, tree), out_shardings=sharding.replicated(mesh))
    return place(state["ema"]), jax.device_put(state["extra"], sharding.replicated(mesh))


def load(run: Run, mesh: Mesh) -> Loaded:
    """What can be done with a trained run. Each stage is restored when it is first needed."""
    coder = autoencoder_stage.coder(run)
    autoencoder = functools.cache(lambda: trainer.restore(run, "autoencoder", mesh)[1])
    chain = functools.cache(lambda: _sampler(run, mesh))

    def encode(images: np.ndarray) -> dict[str, np.ndarray]:
        """The codes of images, uint8 [n, h, w, c]: int32 {"top": [n, ht, wt], "bottom": [n, hb, wb]}."""
        return coder.encode(autoencoder()["ema"], autoencoder()["extra"], images)

    def decode(given: Mapping[str, np.ndarray]) -> np.ndarray:
        """The images of codes, {"top": ..., "bottom": ...} as from `encode`; one level alone shows what it knows."""
        return coder.decode(autoencoder()["ema"], autoencoder()["extra"], given)

    def reconstruct(images: np.ndarray) -> np.ndarray:
        """Images, uint8 [n, h, w, c], as their codes decode."""
        return decode(encode(images))

    def draw(
        key: Key[Array, ""],
        n: int,
        temperature: PerLevel = 1.0,
        label: int | None = None,
        top_k: PerLevel = 0,
        top_p: PerLevel = 1.0,
        sampler: str = "cached",
        batch_size: int = BATCH,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """n images and what they took; without `label` every class in turn, where there are classes.

        `temperature`, `top_k` and `top_p` are one value, or a dict of one for each level. `sampler`: one
        of `SAMPLERS`, which all draw the same codes. `batch_size` images are drawn at once, on all devices together;
        the images do not depend on it.
        """
        for what, number in (("n", n), ("batch_size", batch_size)):
            if number < 1:
                raise InputError(f"{what} must be at least 1, not {number}")
        if sampler not in SAMPLERS:
            raise InputError(f"there is no sampler '{sampler}' here; there are {', '.join(SAMPLERS)}")
        options = {level: _options(run, level, temperature, top_k, top_p) for level in grids(run)}
        size = min(n, sharding.whole_batch(batch_size, mesh))
        pictures, calls, labels = chain()(key, n, size, label, sampler, options)
        about: dict[str, Any] = {"sampler": sampler, "batch_size": size, "calls_per_image": calls}
        return pictures, about if labels is None else about | {"labels": labels}

    def compare_samplers(
        key: Key[Array, ""],
        stream: TextIO,
        done: Sequence[dict[str, Any]] = (),
        keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
    ) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """`comparison.compare` at temperature 1."""
        plain = {level: _Options(1.0, 0, 1.0) for level in grids(run)}
        cells = {level: height * width for level, (height, width) in grids(run).items()}
        draw = lambda key, n, sampler: chain()(key, n, n, None, sampler, plain)[:2]
        # Fixed points are those of codes.
        samplers = [name for name in SAMPLERS if name != "fixed_point" or not run.config.autoencoder.model.cell]
        return comparison.compare(draw, cells, samplers, key, stream, done, keep)

    def log_prob(images: np.ndarray, key: Key[Array, ""] | None = None, samples: int = 1) -> NoReturn:
        """Raises InputError: there is none."""
        raise InputError(
            "a VQ-VAE-2 run gives no likelihood of an image: its priors rate the codes of a reconstruction, not the "
            "image (evaluate.py reports that rate beside the distortion)"
        )

    return Loaded(
        config=run.config,
        levels=facts.of_run(run).levels,
        log_prob=log_prob,
        draw=draw,
        encode=encode,
        decode=decode,
        reconstruct=reconstruct,
        compare_samplers=compare_samplers,
    )


def _options(run: Run, level: str, temperature: PerLevel, top_k: PerLevel, top_p: PerLevel) -> _Options:
    """What a level is drawn with; InputError for values out of range and for dicts of other levels."""
    values = []
    for name, given in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p)):
        if isinstance(given, Mapping) and set(given) != set(grids(run)):
            raise InputError(f"{name} must be a number, or a dict for {', '.join(grids(run))}, not for {list(given)}")
        values.append(given[level] if isinstance(given, Mapping) else given)
    options = _Options(float(values[0]), int(values[1]), float(values[2]))
    gumbel.check_options(*options)
    return options


def _sampler(run: Run, mesh: Mesh) -> Callable[..., tuple[UInt8[np.ndarray, "n h w c"], dict[str, float], Any]]:
    """sample(key, count, size, label, sampler, options by level) -> images, mean calls by level, their classes or None.

    `size` samples are drawn at once. Raises InputError where a stage has no checkpoint, or a label does not fit.
    """
    weights = {name: for_drawing(run, name, trainer.restore(run, name, mesh)[1], mesh) for name in grids(run)}
    compiled = functools.cache(functools.partial(draw, run))
    autoencoder, decode = codes.autoencoder(run, mesh), autoencoder_stage.coder(run).decode

    def some(
        key: Key[Array, ""], ids: Array, label: Array | None, sampler: str, options: dict[str, _Options]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        drawn: dict[str, Array] = {}
        calls: dict[str, np.ndarray] = {}
        for name, (params, extra) in weights.items():
            temperature, top_k, top_p = options[name]
            sample = compiled(name, mesh, sampler, top_k, top_p)
            drawn[name], taken = sample(params, extra, key, ids, upper(run, name, drawn), label, temperature)
            calls[name] = np.asarray(taken)
        return decode(autoencoder["ema"], autoencoder["extra"], drawn), calls

    def sample(
        key: Key[Array, ""], count: int, size: int, label: int | None, sampler: str, options: dict[str, _Options]
    ) -> tuple[np.ndarray, dict[str, float], list[int] | None]:
        labels = _labels(run, count, label)
        report = metrics.counting("samples", count, run_lib.stream())
        parts = []
        for start in range(0, count, size):
            # Whole batches: another size would be another program to compile.
            ids = jnp.arange(start, start + size, dtype=jnp.int32)
            of_part = None if labels is None else labels[ids % count]
            parts.append(some(key, ids, of_part, sampler, options))
            report(min(start + size, count))
        pictures = np.concatenate([drawn for drawn, _ in parts])[:count]
        calls = {name: float(np.concatenate([taken[name] for _, taken in parts])[:count].mean()) for name in grids(run)}
        return pictures, calls, None if labels is None else np.asarray(labels).tolist()

    return sample


def _labels(run: Run, count: int, label: int | None) -> Array | None:
    """The wanted class for every sample, or all classes in turn; None for priors without classes."""
    conditional = any(run.config.prior(name).model.class_conditional for name in grids(run))
    if not conditional:
        if label is not None:
            raise InputError(f"label={label}, but the priors of {run.workdir} were trained without classes")
        return None
    num_classes = facts.of_run(run).num_classes
    if label is not None and not 0 <= label < num_classes:
        raise InputError(f"label must lie in 0..{num_classes - 1}, not {label}")
    return jnp.arange(count, dtype=jnp.int32) % num_classes if label is None else jnp.full(count, label, jnp.int32)


def _above(run: Run, name: str) -> str:
    """The next coarser level."""
    names = [*run.config.levels, PIXELS]
    return names[names.index(name) - 1]
