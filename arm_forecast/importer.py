"""A published PixelCNN++ checkpoint as a run. What its tensors are is known to `convert.py`."""

from arm_forecast import convert
from bitsperdim import archives, config_files
from bitsperdim.adopt import Imported, Weights


def imported(path: str, image_size: int = 32) -> Imported:
    """The config and weights of a state_dict of pclucas14/pixel-cnn-pp.

    The optimizer and schedule are those of PixelCNN++, for training further. Raises InputError for other files.
    """
    state = archives.read_arrays(path)
    network, channels = convert.network_from_torch(state)
    config = config_files.load("arm_cifar10:dmol")
    # It is complete as it is; more steps go on from here.
    changes = {"data.image_size": image_size, "arm.train.steps": 1}
    config.update_from_flattened_dict(changes | {f"arm.model.{k}": v for k, v in vars(network).items()})
    facts = {"shape": [image_size, image_size, channels], "levels": 256}
    params = {"arm": convert.params_from_torch(state)}
    return Imported(config, {"arm": Weights(params, {}, facts)})
