"""Efficient-VDVAE on a folder of your own images.

    python train.py --config=configs/vdvae_folder.py --config.data.path=$HOME/pictures --workdir=runs/mine

Meant for: one GPU with 16 GB at 64x64, four with 40 GB at `:256`. Images of another size are padded with zeros to the
next multiple of the product of the strides, and that padding is not counted; `image_height` and `image_width` with
`image_size=0` take images that are not square. Grey images: `--config.data.channels=1`.
Parameters: 25.4 M.
Reach: that depends on the images. Compare the training with the held-out `bits_per_dim`, and look at `kl_nats_1x1`: a
level whose divergence stays near zero is not used.
Variants: 256 (eight levels at 256x256, in bfloat16), cpu (32x32, a small network for two CPU cores), tiny (32x32,
    seconds; for tests).
"""

from ml_collections import ConfigDict

from bitsperdim import config_files

BASES = {
    "": ("vdvae_celeba64", 64),
    "256": ("vdvae_ffhq256", 256),
    "cpu": ("vdvae_cifar10:cpu", 32),
    "tiny": ("vdvae_imagenet64:tiny", 32),
}


def get_config(variant: str = "") -> ConfigDict:
    if variant not in BASES:
        raise ValueError(f"no variant '{variant}'; there are 256, cpu and tiny")
    base, edge = BASES[variant]
    config = config_files.load(base)
    config.data = ConfigDict({"source": "folder", "path": "pictures", "image_size": edge, "train_crop": "random"})
    config.model.flip = True
    if variant == "cpu":
        return config
    if variant == "tiny":
        for key in ("layers", "skips", "blocks", "widths", "latents", "bottlenecks"):
            config.model[key] = config.model[key][:-1]
        config.model.strides, config.model.kernels = (1, 4, 2, 2, 2), (1, 3, 3, 3, 3)
        return config
    # A descent that ends with the run, whose length is a guess.
    config.optim.update({"cosine_start": 0, "cosine_steps": 0})
    config.train.update({"steps": 300_000, "best_metric": "bits_per_dim"})
    return config
