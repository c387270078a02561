"""A published two-level VQ-VAE-2 in PyTorch as a run: its autoencoder, on which codes and priors can be trained.

What its tensors are is known to `convert.py`.
"""

import jax
from jaxtyping import PyTree

from bitsperdim import archives, config_files
from bitsperdim.adopt import Imported, Weights
from bitsperdim.errors import InputError
from vqvae2 import convert
from vqvae2.config import AutoencoderConfig

STRIDES = (4, 2)
# There pixels x = 0 ... 255 are x / 127.5 - 1, here the middles of their cells, (x + 1/2) / 128 - 1: smaller by this.
RANGE = 127.5 / 128.0


def imported(path: str, image_size: int = 32) -> Imported:
    """The config and weights of a state_dict of rosinality/vq-vae-2-pytorch.

    The config is `vqvae2_folder` with the sizes of the file, in float32; the loss and its learning rate, for training
    further, are the port's: no division by the variance. The priors are ours. Raises InputError for other files.
    """
    state = archives.read_arrays(path)
    sizes = convert.sizes_from_torch(state)
    if image_size % (STRIDES[0] * STRIDES[1]):
        raise InputError(f"--image_size must be divisible by {STRIDES[0] * STRIDES[1]}, not {image_size}")
    config = config_files.load("vqvae2_folder")
    network = {name: value for name, value in sizes._asdict().items() if name != "channels"}
    model = network | {"strides": STRIDES, "scale_by_variance": False, "dtype": "float32"}
    # It is complete as it is; more steps go on from here.
    changes = {"data.image_size": image_size, "autoencoder.optim.learning_rate": 3e-4, "autoencoder.train.steps": 1}
    if sizes.channels != 3:
        changes["data.channels"] = sizes.channels
    config.update_from_flattened_dict(changes | {f"autoencoder.model.{key}": value for key, value in model.items()})
    params = _in_our_range(convert.params_from_torch(state))
    codebooks = convert.codebooks_from_torch(state, AutoencoderConfig.codebook_decay)
    # The variance of images that are not at hand. Nothing asks for it where scale_by_variance is False.
    facts = {"shape": [image_size, image_size, sizes.channels], "levels": 256, "num_classes": 0, "variance": 1.0}
    return Imported(config, {"autoencoder": Weights(params, {"codebooks": codebooks}, facts)})


def _in_our_range(params: PyTree) -> PyTree:
    """The same function of the pixels: the first convolution takes and the last one gives images times `RANGE`."""
    first, last = params["encoder_bottom"]["down_0"], params["decoder_bottom"]["up_1"]
    first = first | {"kernel": first["kernel"] / RANGE}
    last = jax.tree.map(lambda leaf: leaf * RANGE, last)
    encoder, decoder = params["encoder_bottom"] | {"down_0": first}, params["decoder_bottom"] | {"up_1": last}
    return params | {"encoder_bottom": encoder, "decoder_bottom": decoder}
