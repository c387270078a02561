"""A checkpoint of the released MaCow code as a run. What its tensors are is known to `convert.py`."""

import dataclasses

from bitsperdim import archives, config_files
from bitsperdim.adopt import Imported, Weights
from bitsperdim.config import to_plain
from flows import convert


def imported(path: str, image_size: int = 32) -> Imported:
    """The config and weights of a state_dict of XuezheMax/macow.

    The weights do not say how many levels the images had: 32 (5 bits) from 128 pixels on, as in the published
    experiments, and 256 below. Raises InputError for other files.
    """
    params, flow, noise = convert.model(convert.State(archives.read_arrays(path)))
    bits = 5 if image_size >= 128 else 8
    config = config_files.load("flows_cifar10")
    # It is complete as it is; more steps go on from here.
    config.update_from_flattened_dict({"data.image_size": image_size, "data.bits": bits, "train.steps": 1})
    sections = {"flow": dataclasses.asdict(flow)} | ({} if noise is None else {"dequantization": to_plain(noise)})
    config.update({"model": sections})
    facts = {"shape": [image_size, image_size, 3], "levels": 2**bits}
    return Imported(config, {"model": Weights(params, {}, facts)})
