"""Pictures of a very deep VAE while it trains: held-out images above their reconstructions, and samples."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from bitsperdim import data, facts, images, rng
from bitsperdim.model import Pictures
from bitsperdim.run import Run
from vdvae import coding, vae

NUM_PICTURES = 16


def of_run(run: Run, mesh: Mesh) -> Pictures:
    """Samples are always of the same noise, at the temperatures of the config."""
    source = data.open_source(run.config.data, "evaluation")
    spread = np.unique(np.linspace(0, source.size - 1, NUM_PICTURES).astype(np.int64))
    originals = source.read(spread)["image"]
    model = vae.make(run.config.model, facts.of_run(run))
    sampling = run.config.sampling
    reconstruct = jax.jit(lambda params, image: coding.reconstructed(model, params, image))

    @jax.jit
    def sample(params: PyTree, key: Array) -> Array:
        keys = rng.per_example(key, jnp.arange(NUM_PICTURES))
        temperatures = coding.by_layer(model, sampling.temperatures)
        return coding.sampled(model, params, keys, temperatures, sampling.output_temperature)

    def pictures(params: PyTree, extra: PyTree, key: Array) -> dict[str, np.ndarray]:
        shown = np.asarray(vae.target(model, jnp.asarray(originals))).astype(np.uint8)
        found = np.asarray(reconstruct(params, jnp.asarray(originals)))
        drawn = np.asarray(sample(params, key))
        return {
            "reconstructions": images.pairs(shown, found, levels=model.output.levels),
            "samples": images.grid(drawn, levels=model.output.levels),
        }

    return pictures
