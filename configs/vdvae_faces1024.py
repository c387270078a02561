"""Efficient-VDVAE on faces of 1024x1024 pixels: FFHQ and CelebA-HQ (Hazami et al. 2022, Tables 2b and 4), and VDVAE.

    python train.py --config=configs/vdvae_faces1024.py:ffhq --config.data.path=$HOME/ffhq/images1024x1024

Meant for: eight accelerators of 40 GB; the base is `:ffhq` with a bfloat16 trunk, levels from 256x256 up recomputed in
the backward pass, and a Polyak average that warms up. VDVAE took 32 accelerators. --config.mesh.spatial=8 divides
each image by rows over eight devices, with --config.train.batch_size=1 where an image needs more than one has.
Parameters: 75.9 M.
Reach: ffhq 2.30, celebahq 1.01, vdvae 2.42 bits/dim (published; not yet reproduced here). Without smoothing both
diverge within 80,000 updates (Table 2b; with it 6 and 23 of them are skipped).
The paper shows CelebA-HQ at temperatures 0.4, 0.6, 0.8 and 1, FFHQ at 0.3, 0.5, 0.7 and 0.9; the third is set.
Variants: ffhq, celebahq, vdvae, table2b_ffhq_unsmoothed, table2b_celebahq_unsmoothed, tiny (seconds; for tests).
"""

from ml_collections import ConfigDict

from bitsperdim import config_files
from vdvae.levels import from_block_strings

VARIANTS = ("ffhq", "celebahq", "vdvae", "table2b_ffhq_unsmoothed", "table2b_celebahq_unsmoothed", "tiny")
DECODER = (
    "1x2,4m1,4x3,8m4,8x4,16m8,16x9,32m16,32x20,64m32,64x14,128m64,128x7,256m128,256x2,512m256,1024m512"  # one string
)
ENCODER = "1024x1,1024d2,512x3,512d2,256x5,256d2,128x7,128d2,64x10,64d2,32x14,32d2,16x7,16d2,8x5,8d2,4x5,4d4,1x4"
WIDTHS = {512: 32, 256: 64} | dict.fromkeys((1, 4, 8, 16, 32, 64, 128), 512)


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", *VARIANTS):
        raise ValueError(f"no variant '{variant}'; there are {', '.join(VARIANTS)}")
    if variant == "tiny":
        return _tiny()
    if variant == "vdvae":
        return _vdvae()
    config = _ffhq()
    if "celebahq" in variant:
        splits = {"train_split": "train[:29000]", "evaluation_split": "train[29000:]"}
        config.data = ConfigDict({"source": "tfds", "name": "celeb_a_hq/1024", "image_size": 1024, **splits})
        config.sampling.temperatures = (0.8,)
    if variant.endswith("unsmoothed"):
        exponential = {"latent": "log_std", "latent_beta": 1.0, "output_scale": "log_std", "output_beta": 1.0}
        config.model.update(exponential)
        config.train.steps = 80_000
    elif variant == "":
        config.model.update({"dtype": "bfloat16", "remat": 256})
        config.train.ema_ramp = True
    return config


def _ffhq() -> ConfigDict:
    config = config_files.load("vdvae_ffhq256:released_8bit")
    config.data.image_size = 1024
    layers, skips = (2, 4, 5, 8, 12, 13, 13, 6, 5, 4), (2, 4, 5, 8, 12, 7, 5, 3, 2, 1)
    config.model.update({"strides": (1, 4) + (2,) * 8, "layers": layers, "skips": skips, "blocks": skips})
    config.model.widths = (512, 512, 512, 512, 256, 128, 64, 32, 16, 8)
    config.model.update({"bottlenecks": (0.25,) * 7 + (0.5, 1.0, 1.0), "kernels": (1,) + (3,) * 9})
    config.model.update({"latents": (64,) * 10, "latent_beta": 0.4, "output_beta": 0.4})
    config.train.update({"clip_norm": 300.0, "skip_norm": 1200.0})
    config.sampling.update({"temperatures": (0.7,), "batch_size": 4})
    return config


def _vdvae() -> ConfigDict:
    config = config_files.load("vdvae_ffhq256:vdvae")
    config.data.image_size = 1024
    config.model.update(from_block_strings(DECODER, ENCODER, width=16, latent=16, widths=WIDTHS))
    config.model.update({"whiten": (111.8685, 69.9465), "target_bits": 8, "mixtures": 2})
    config.optim.learning_rate = 7e-5
    config.train.update({"clip_norm": 360.0, "skip_norm": 500.0})
    return config


def _tiny() -> ConfigDict:
    config = config_files.load("vdvae_imagenet64:tiny")
    config.model.update({"latent_beta": 0.4, "output_beta": 0.4})
    return config
