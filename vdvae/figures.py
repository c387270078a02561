"""Figures of a trained run on held-out images: what comes back of them, what each level adds, swapped and interpolated
latents, pruning.

The path from one image to another is that of all families (`bitsperdim/figures.py`).
Not here: pictures while a run trains (`pictures.py`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree, UInt8

from bitsperdim import data, facts, figures, likelihood, metrics, rng, sharding, trainer
from bitsperdim.figures import Figure
from bitsperdim.likelihood import Means
from bitsperdim.model import Loaded
from bitsperdim.run import Run
from bitsperdim.ssim import ssim
from vdvae import levels, pruning, vae
from vdvae.pruning import Channels
from vdvae.vae import Vae

Temperature = float | Mapping[str, float] | None
MOST = 8  # images in the picture of pruning, whose table has more
PARTS = ("reconstruction", "kl")


def of_run(run: Run, mesh: Mesh, loaded: Loaded) -> dict[str, Callable[..., Figure]]:
    """The figures by name; `loaded` has what they are drawn with."""
    model = vae.make(run.config.model, facts.of_run(run))
    return {
        "reconstruction": functools.partial(_reconstruction, run, model, loaded),
        "progressive": functools.partial(_progressive, run, model, loaded),
        "swap": functools.partial(_swap, run, model, loaded),
        "interpolation": functools.partial(figures.interpolation, run, loaded, shown=functools.partial(_target, model)),
        "pruning": functools.partial(_pruning, run, mesh, model),
    }


def _reconstruction(run: Run, model: Vae, loaded: Loaded, key: Key[Array, ""], n: int, progress: Any) -> Figure:
    """Images beside the likeliest ones given the means of their posteriors, and how alike they are."""
    originals = figures.held_out(run, n)
    target, found = _target(model, originals), loaded.reconstruct(originals)
    error = np.abs(found.astype(float) - target)
    alike = np.asarray(ssim(jnp.asarray(target), jnp.asarray(found), model.output.levels))
    record = {"images": n, "mean_error_levels": float(error.mean()), "ssim": float(alike.mean())}
    heads = ["image", "reconstruction"]
    return figures.side_by_side([target, found], heads, loaded.levels), record | {"ssim_by_image": alike.tolist()}


def _progressive(
    run: Run, model: Vae, loaded: Loaded, key: Key[Array, ""], n: int, progress: Any, temperature: Temperature = None
) -> Figure:
    """Latents of the first resolutions from the posterior of an image, the rest drawn from the prior."""
    originals = figures.held_out(run, n)
    latents = loaded.encode(originals, key)
    names, ends = _resolutions(model)
    decode = lambda end: loaded.decode(_first(latents, end), key, temperature)
    prior = loaded.sample(key, n, temperature=temperature, output_temperature=0.0)
    columns = [_target(model, originals), prior, *(decode(end) for end in ends)]
    heads = ["image", "prior", *(f"to {name}" for name in names)]
    about = {"layers_from_posterior": [0, *ends], "temperature": temperature}
    return figures.side_by_side(columns, heads, loaded.levels), about


def _swap(run: Run, model: Vae, loaded: Loaded, key: Key[Array, ""], n: int, progress: Any) -> Figure:
    """Latents of one image up to a resolution, those of another image behind it."""
    one, other = figures.held_out_pairs(run, n)
    first, second = loaded.encode(one), loaded.encode(other)
    names, ends = _resolutions(model)
    mixed = [loaded.decode([*first[:end], *second[end:]]) for end in (0, *ends)]
    heads = ["A", "B: all", *(f"A to {name}" for name in names[:-1]), "A: all", "B"]
    columns = [_target(model, one), *mixed, _target(model, other)]
    return figures.side_by_side(columns, heads, loaded.levels), {"layers_of_the_first": [0, *ends]}


def _pruning(
    run: Run,
    mesh: Mesh,
    model: Vae,
    key: Key[Array, ""],
    n: int,
    progress: Any,
    keep: Sequence[float] = pruning.SHARES,
) -> Figure:
    """The bound and its parts with a share of the channels kept (Table 5, figure 6), and reconstructions side by side.

    The table is of at most `encoding.images` held-out images.
    """
    config = run.config.encoding
    _, state = trainer.restore(run, "model", mesh)
    kl = pruning.kl_by_channel(run, mesh)
    source = data.open_source(run.config.data, "evaluation")
    source = source._replace(size=min(source.size, config.images))
    train = data.open_source(run.config.data, "train").size

    @jax.jit
    def measured(params: PyTree, batch: dict[str, Array], kept: Channels) -> tuple[dict[str, Array], Array]:
        image, target = batch["image"], vae.target(model, batch["image"])
        keys = rng.per_example(key, batch["position"])
        reconstruction, of_kept, found = pruning.bound(model, params, image, keys, kept)
        parts = {"reconstruction_nats": reconstruction, "kl_nats": of_kept, "nats": reconstruction + of_kept}
        return parts | {"ssim": ssim(target, found, model.output.levels)}, found

    size = sharding.whole_batch(min(config.batch_size, source.size), mesh)
    rows, pictures = [], {}
    for share in keep:
        kept = pruning.channels(model, kl, share, config.count)
        means = Means()
        counted = metrics.counting(f"{share:.1%} of the latents", source.size, progress)
        for batch in data.evaluation_batches(source, size, sharding.over_batch(mesh)):
            parts, found = jax.device_get(measured(state["ema"], batch, kept))
            pictures.setdefault(share, found[: min(n, MOST)])
            means.add(parts, np.arange(size) < source.size - means.count)
            counted(means.count)
        num_bytes = pruning.num_dims(model, kept) * model.net.latent.numbers * np.dtype(config.dtype).itemsize
        bits = {name: likelihood.bits_per_dim(means.means()[f"{name}_nats"], model.num_dims) for name in PARTS}
        rows.append(
            {
                "keep": share,
                **pruning.shares(model, kept),
                "bits_per_dim": likelihood.bits_per_dim(means.means()["nats"], model.num_dims),
                **{f"{name}_bits_per_dim": value for name, value in bits.items()},
                "nats": means.means()["nats"],
                "ssim": means.means()["ssim"],
                "bytes_per_image": num_bytes,
                "train_split_megabytes": num_bytes * train / 1e6,
            }
        )
    heads = ["image", *(f"{share:.3g} %" for share in 100.0 * np.asarray(keep))]
    first = _target(model, source.read(np.arange(len(next(iter(pictures.values())))))["image"])
    picture = figures.side_by_side([first, *pictures.values()], heads, model.output.levels)
    return picture, {"images": source.size, "count": config.count, "dtype": config.dtype, "rows": rows}


def _target(model: Vae, image: UInt8[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "n h w c"]:
    return np.asarray(vae.target(model, jnp.asarray(image))).astype(np.uint8)


def _resolutions(model: Vae) -> tuple[list[str], list[int]]:
    """Names of the resolutions with latents, and the number of layers up to the end of each."""
    by_name: dict[str, int] = {}
    for layer, level in enumerate(levels.level_of_layer(model.net.levels), start=1):
        found = model.net.levels[level]
        by_name[f"{found.height}x{found.columns}"] = layer
    return list(by_name), list(by_name.values())


def _first(latents: Sequence[np.ndarray], end: int) -> list[np.ndarray | None]:
    return [z if layer < end else None for layer, z in enumerate(latents)]
