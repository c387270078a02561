"""VQ-VAE-2 on Tiny ImageNet, 64x64: two levels (16x16 and 8x8 codes), class-conditional priors.

    python train.py --config=configs/vqvae2_tiny_imagenet.py:cpu --config.data.data_dir=$HOME/tensorflow_datasets

Meant for: one GPU or TPU core; `:cpu` for two CPU cores. The TFDS folder `tiny_imagenet/1.0.0` has to be prepared by
hand, since TFDS has no builder for it: features `image` and `label`, splits `train` and `validation`.
Parameters: autoencoder 1.72 M, top 59.7 M, bottom 135 M.
Reach: there is no published figure for this data set.
Variants: cpu, tiny (seconds; for tests).
"""

from ml_collections import ConfigDict

from bitsperdim import config_files


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "cpu", "tiny"):
        raise ValueError(f"no variant '{variant}'; there are cpu and tiny")
    config = config_files.load(f"vqvae2_cifar10:{variant}")
    config.data = ConfigDict(
        {
            "source": "tfds",
            "name": "tiny_imagenet:1.0.0",
            "data_dir": "",
            "image_size": 64,
            "evaluation_split": "validation",
        }
    )
    return config
