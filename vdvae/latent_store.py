"""Stage `latents`, on request: a data set as the kept channels of its latents, and the images from them again.

    layer_00, ...    [n, h, w, kept channels, 2]: mean and log-deviation of the posterior, given the layers before, of
                     each layer with a kept channel; in the order of the split
    label            int32 [n], where the images have labels

Source: Efficient-VDVAE, section 7; the released code writes such a file, of means and deviations, and cannot read it.
Noise is a function of the image's number: decoding draws the z of encoding from the stored posterior, and the channels
that were not kept from the prior as encoding did. So the bound is that of the images that were encoded.
Not here: how shards are kept, and refused to another model (`bitsperdim/extracted.py`).
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree

from bitsperdim import data, extracted, facts, likelihood, rng, seen, sharding, trainer
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from bitsperdim.extracted import Extraction
from bitsperdim.model import Batch, Stage
from bitsperdim.run import Run
from bitsperdim.ssim import ssim
from vdvae import levels, pruning, vae
from vdvae.network import Draw
from vdvae.pruning import Channels
from vdvae.vae import Vae

NAME = "latents"
SETTINGS = ("keep", "count", "images", "dtype")


def stage() -> Stage:
    is_extracted = lambda run: extracted.is_extracted(run, _extraction(run))
    return Stage(NAME, ("model",), extract=_extract, is_extracted=is_extracted, on_request=True)


def _extraction(run: Run) -> Extraction:
    config = run.config.encoding
    return Extraction(NAME, of="model", settings={name: getattr(config, name) for name in SETTINGS})


def _extract(run: Run, mesh: Mesh, check_signals: Callable[[], None]) -> None:
    """Encodes both splits. An extraction that was interrupted goes on."""
    config, model = run.config.encoding, vae.make(run.config.model, facts.of_run(run))
    _, state = trainer.restore(run, "model", mesh)
    kept = pruning.channels(model, pruning.kl_by_channel(run, mesh), config.keep, config.count)
    about = {"channels": [np.flatnonzero(of_layer).tolist() for of_layer in kept], **pruning.shares(model, kept)}

    def encode(params: PyTree, extra: PyTree, batch: Batch) -> dict[str, Array]:
        sources = pruning.sources(model, _keys(run, batch["index"]), kept)
        keep = lambda draw: model.net.latent.packed(draw.posterior)
        _, packed = vae.infer(model, params, batch["image"], sources, keep)
        rows = {_field(i): packed[i][..., np.flatnonzero(of_layer), :] for i, of_layer in enumerate(kept)}
        rows = {name: values.astype(config.dtype) for name, values in rows.items() if values.size}
        return rows | {name: batch[name] for name in ("label",) if name in batch}

    extracted.encode_images(run, _extraction(run), state, encode, config.batch_size, mesh, check_signals, about)


def _field(layer: int) -> str:
    return f"layer_{layer:02d}"


def _keys(run: Run, index: Array) -> Key[Array, " b"]:
    """Of the images, by their number in the split."""
    return rng.per_example(rng.for_purpose(jax.random.key(run.seed(NAME)), "latents"), index)


def decode(run: Run, mesh: Mesh, split: str) -> tuple[int, Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]]:
    """How many images are stored of the split, and the images, likeliest given z, batch by batch.

    Where the data set is at hand each batch has the parts of the bound, in nats per image, and the SSIM. InputError
    where nothing is stored, or by another model.
    """
    extraction = _extraction(run)
    if split not in extracted.SPLITS:
        raise InputError(f"'{NAME}' has the splits {' and '.join(extracted.SPLITS)}, not '{split}'")
    if not (run.made(NAME) / "info.json").exists():
        raise InputError(f"{run.made(NAME)} is missing; train.py --stage={NAME} makes it")
    arrays = extracted.open_arrays(run, extraction, split)
    about = extracted.record(run, extraction, split)["about"]
    model = vae.make(run.config.model, facts.of_run(run))
    shapes = levels.latent_shapes(model.net.levels)
    kept = [np.isin(np.arange(z), chosen) for (*_, z), chosen in zip(shapes, about["channels"], strict=True)]
    fields = {name: array for name, array in arrays.items() if name != "label"}
    size = len(next(iter(fields.values())))
    return size, _batches(run, mesh, model, kept, fields, size, _originals(run, split))


def _originals(run: Run, split: str) -> data.Source | None:
    try:
        source = data.open_source(run.config.data, split)
        seen.check_sources(run, run.stage("model"), {split: source})
    except InputError as error:
        run_lib.say(f"note: the images are decoded without their likelihood: {error}")
        return None
    return source


def _batches(
    run: Run, mesh: Mesh, model: Vae, kept: Channels, fields: dict[str, Any], size: int, source: data.Source | None
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    _, state = trainer.restore(run, "model", mesh)

    @jax.jit
    def compute(params: PyTree, rows: dict[str, Array], index: Array, image: Array | None) -> tuple[Array, dict]:
        raw, kl = from_stored(model, params, rows, _keys(run, index), kept)
        decoded = model.output.likeliest(raw)
        if image is None:
            return decoded, {}
        target = vae.target(model, image)
        parts = {"reconstruction_nats": model.output.nats(raw, target), "kl_nats": kl}
        nats = parts["reconstruction_nats"] + kl
        parts |= {"nats": nats, "bits_per_dim": likelihood.bits_per_dim(nats, model.num_dims)}
        return decoded, parts | {"ssim": ssim(target, decoded, model.output.levels)}

    each = sharding.whole_batch(min(run.config.encoding.batch_size, size), mesh)
    for start in range(0, size, each):
        index = np.minimum(np.arange(start, start + each), size - 1)
        rows = {name: array[index] for name, array in fields.items()}
        image = None if source is None else source.read(index)["image"]
        batch = jax.device_put((rows, index.astype(np.int32), image), sharding.over_batch(mesh))
        count = min(each, size - start)
        yield jax.tree.map(lambda leaf, count=count: leaf[:count], jax.device_get(compute(state["ema"], *batch)))


def from_stored(
    model: Vae, params: PyTree, rows: dict[str, Array], keys: Key[Array, " b"], kept: Channels
) -> tuple[Array, Array]:
    """The outputs, and the divergence of the kept channels from the prior, in nats per image."""
    latent, count = model.net.latent, len(keys)
    sources, posteriors = [], []
    for layer, (source, shape) in enumerate(
        zip(pruning.sources(model, keys, kept), levels.latent_shapes(model.net.levels), strict=True)
    ):
        numbers = jnp.zeros((count, *shape, latent.numbers))
        if kept[layer].any():
            numbers = numbers.at[..., np.flatnonzero(kept[layer]), :].set(rows[_field(layer)].astype(jnp.float32))
        posteriors.append(latent.unpacked(numbers))
        noise = jax.vmap(lambda key, shape=shape: latent.noise(key, shape))(source.noise)
        sources.append(source._replace(noise=None, given=latent.draw(posteriors[-1], noise, 1.0)))
    keep: Callable[[Draw], Any] = lambda draw: draw.prior
    raw, priors = vae.generate(model, params, sources, keep)
    kl = [
        jnp.where(mask, latent.kl(posterior, prior), 0.0).sum((1, 2, 3))
        for posterior, prior, mask in zip(posteriors, priors, kept, strict=True)
    ]
    return raw, jnp.stack(kl).sum(0)
