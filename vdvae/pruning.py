"""Which channels of the latents say something: their divergence, those worth keeping, and the bound without the rest.

Source: Efficient-VDVAE, section 7 and Table 5: most channels keep to the prior for all images (the polarised regime),
so z = m z_posterior + (1 - m) z_prior with a mask m of few channels reconstructs nearly as well. The released code
draws both from one key; here their noise is independent.
Not here: storing what is kept (`latent_store.py`), and the picture of a sweep (`figures.py`).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Key, PyTree, UInt8

from bitsperdim import data, extracted, facts, hosts, likelihood, rng, seen, sharding, trainer
from bitsperdim import run as run_lib
from bitsperdim.run import Run
from vdvae import coding, levels, network, vae
from vdvae.layers import Params
from vdvae.network import Draw, Source
from vdvae.vae import Vae

SHARES = (1.0, 0.07, 0.05, 0.04, 0.03, 0.025)  # of Table 5
FILE = "kl_by_channel.json"

Channels = Sequence[Bool[np.ndarray, " z"] | Bool[Array, " z"]]  # of each layer


def sources(model: Vae, keys: Key[Array, " b"], kept: Channels) -> list[Source]:
    """z of the kept channels from the posterior, with the noise that `vae.bound` has; of the others from the prior."""
    free = network.prior_sources(coding.for_purpose(keys, "prior"), [1.0] * model.num_layers)
    known = network.posterior_sources(keys, model.num_layers)
    both = zip(known, free, kept, strict=True)
    return [
        source._replace(noise=of_posterior.noise, mask=jnp.asarray(mask, jnp.float32))
        for of_posterior, source, mask in both
    ]


def bound(
    model: Vae, params: Params, image: UInt8[Array, "b h w c"], keys: Key[Array, " b"], kept: Channels
) -> tuple[Float[Array, " b"], Float[Array, " b"], UInt8[Array, "b h w c"]]:
    """-log p(x | z) and the divergence of the kept channels, in nats per image, and the likeliest image of z.

    Their sum bounds -log p(x): that of a posterior which is the prior in all other channels. With every channel kept it
    is `vae.bound`.
    """
    keep = lambda draw: draw.kl.sum((1, 2))
    raw, kl = vae.infer(model, params, image, sources(model, keys, kept), keep)
    of_kept = jnp.stack([jnp.where(mask, of_layer, 0.0).sum(-1) for of_layer, mask in zip(kl, kept, strict=True)])
    return model.output.nats(raw, vae.target(model, image)), of_kept.sum(0), model.output.likeliest(raw)


def channels(model: Vae, kl: Sequence[Float[np.ndarray, " z"]], share: float, count: str = "channels") -> Channels:
    """The channels with the largest mean divergence of an element, by layer.

    `count` 'channels': those above the quantile 1 - share of all, whatever the size of their layers, as published;
    'dimensions': as many as together have at most `share` of the latents' dimensions, but at least one. 1: all.
    """
    values = np.concatenate(kl)
    if share >= 1.0:  # above the quantile 0 would be all but the last one
        chosen = np.ones(len(values), bool)
    elif count == "channels":
        chosen = values > np.quantile(values, 1.0 - share)
        chosen[np.argmax(values)] = True  # also of values that are all the same
    else:
        order, sizes = np.argsort(-values, kind="stable"), np.concatenate(_sizes(model))
        taken = np.cumsum(sizes[order]) <= share * sizes.sum()
        taken[0] = True
        chosen = np.zeros(len(values), bool)
        chosen[order[taken]] = True
    return np.split(chosen, np.cumsum([len(of_layer) for of_layer in kl])[:-1])


def shares(model: Vae, kept: Channels) -> dict[str, float]:
    """How much of the latents is kept, counted both ways."""
    chosen, sizes = np.concatenate(kept), np.concatenate(_sizes(model))
    return {"share_of_channels": float(chosen.mean()), "share_of_dimensions": float(sizes[chosen].sum() / sizes.sum())}


def num_dims(model: Vae, kept: Channels) -> int:
    """Dimensions that are kept of an image's latents."""
    return int(np.concatenate(_sizes(model))[np.concatenate(kept)].sum())


def _sizes(model: Vae) -> list[np.ndarray]:
    """Height x width of every channel, by layer."""
    return [np.full(z, height * width) for height, width, z in levels.latent_shapes(model.net.levels)]


def kl_of_channels(draw: Draw) -> Float[Array, "b z"]:
    """A layer's divergence by channel, in nats, the mean over its elements."""
    assert draw.kl is not None
    return draw.kl.mean((1, 2))


def kl_by_channel(run: Run, mesh: Mesh) -> list[Float[np.ndarray, " z"]]:
    """Mean divergence of an element by layer and channel, in bits, over images spread over the training split.

    Kept in the run beside the weights (kl_by_channel.json), and measured again where these are others by now.
    """
    _, state = trainer.restore(run, "model", mesh)
    most = run.config.encoding.images
    of_weights = {"fingerprint": extracted.fingerprint(state), "step": int(state["step"]), "at_most": most}
    path = run.made("model") / FILE
    before = lambda: run_lib.read_json(path, {"bits": list}, "remove it: it is measured again")
    is_of_weights = lambda: path.exists() and {name: before().get(name) for name in of_weights} == of_weights
    if hosts.from_first(is_of_weights):
        return [np.asarray(of_layer) for of_layer in before()["bits"]]
    source = data.open_source(run.config.data, "train")
    seen.check_sources(run, run.stage("model"), {"train": source})
    chosen = np.unique(np.linspace(0, source.size - 1, min(most, source.size)).astype(np.int64))
    source = source._replace(size=len(chosen), read=lambda indices, read=source.read: read(chosen[indices]))
    nats = _means(run, mesh, state["ema"], source)
    bits = [likelihood.nats_to_bits(of_layer) for of_layer in nats]  # pyright: ignore
    if hosts.is_first():
        about = {"split": source.name, "images": source.size}
        run_lib.write_json(path, {**of_weights, **about, "bits": [of_layer.tolist() for of_layer in bits]})
    return bits


def _means(run: Run, mesh: Mesh, params: PyTree, source: data.Source) -> list[np.ndarray]:
    """By layer and channel, in nats."""
    model, key = vae.make(run.config.model, facts.of_run(run)), jax.random.key(run.seed("kl_by_channel"))

    def sums(params: PyTree, batch: dict[str, Array]) -> list[Array]:
        noise = network.posterior_sources(rng.per_example(key, batch["position"]), model.num_layers)
        _, kl = vae.infer(model, params, batch["image"], noise, kl_of_channels)
        return [(of_layer * batch["mask"][:, None]).sum(0) for of_layer in kl]

    compiled = jax.jit(sums, out_shardings=sharding.replicated(mesh))
    size = sharding.whole_batch(min(run.config.encoding.batch_size, source.size), mesh)
    progress, totals, done = trainer.progress("divergence of the channels", source.size), None, 0
    for batch in data.evaluation_batches(source, size, sharding.over_batch(mesh)):
        found: Any = [np.asarray(of_layer, np.float64) for of_layer in jax.device_get(compiled(params, batch))]
        totals = found if totals is None else [a + b for a, b in zip(totals, found, strict=True)]
        done = min(done + size, source.size)
        progress(done)
    return [total / source.size for total in totals]  # pyright: ignore
