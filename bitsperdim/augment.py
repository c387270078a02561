"""Random changes of training images on the device, each from the key of its own example.

Not here: dequantization noise, which belongs to the likelihood (`dequantize.py`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, Shaped


def flip(keys: Key[Array, " b"], images: Shaped[Array, "b h w c"]) -> Shaped[Array, "b h w c"]:
    """Each image mirrored left to right with probability 1/2, independently.

    `keys` are example keys of this purpose alone: `rng.per_example(rng.for_purpose(key, "flip"), position)`.
    """
    return jax.vmap(lambda key, image: jnp.where(jax.random.bernoulli(key), image[:, ::-1], image))(keys, images)
