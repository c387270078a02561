"""bitsperdim: likelihood-based image generative models in JAX/Flax. The shared core; each family is its own package.

run = bitsperdim.load("runs/vqvae2_photos-base")
images = run.sample(jax.random.key(0), 16)
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitsperdim.model import Loaded


def load(workdir: str | os.PathLike[str]) -> "Loaded":
    """The trained run in a folder, with its Polyak weights: sample, encode, decode, reconstruct, log_prob, config.

    The folder may be that of a published run (`convert.py --export`), which holds little more than the weights.
    Raises `bitsperdim.errors.InputError` where the folder is no run.
    """
    from bitsperdim import run, sharding  # not above: every module of the package imports this one first

    opened = run.open_run(workdir)
    return opened.family.load(opened, sharding.mesh_at_hand(opened.config.mesh))
