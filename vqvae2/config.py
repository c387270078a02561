"""What a VQ-VAE-2 config may say: one frozen dataclass for each section, every key checked by name.

Defaults are the supplement's (Tables 1 and 3) where it gives a value. Not here: the published experiments (`configs/`).
"""

import dataclasses
import math

from bitsperdim.augment import ColourConfig
from bitsperdim.config import at_least, one_of
from bitsperdim.data import DataConfig
from bitsperdim.optim import OptimConfig
from bitsperdim.sharding import MeshConfig
from bitsperdim.step import TrainConfig
from vqvae2.attention import DROPPED
from vqvae2.autoencoder import level_names
from vqvae2.prior import READINGS


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The encoder, the decoder and the codebooks. Strides run from the image upwards: (4, 2) is bottom, top."""

    strides: tuple[int, ...] = (4, 2)
    hidden: int = 128
    residual: int = 64
    residual_layers: int = 2
    code_dim: int = 64
    num_codes: int = 512
    # 'ema': Euclidean codes that follow moving averages, the paper's. 'cosine': vectors and codes at unit length, which
    # keep more of a large codebook in use, best with a small code_dim. 'fsq': rounded channels, nothing to learn; of
    # the values below fsq_levels alone matters. 'none': vectors as they are, each channel in num_codes bins for storage
    # and for the prior (the ablation of table 5); of one level.
    quantizer: str = "ema"
    fsq_levels: tuple[int, ...] = (8, 8, 8)  # values of each channel: code_dim of them, whose product is num_codes
    commitment: float = 0.25  # beta
    # DeepMind's notebook divides the squared error by the variance of the data, which makes beta independent of the
    # pixel range; the supplement does not say. False: the plain squared error.
    scale_by_variance: bool = True
    codebook_init: str = "uniform"  # or 'kmeans': one iteration on each of the first kmeans_iterations batches
    kmeans_iterations: int = 10
    codebook_decay: float = 0.99
    codebook_epsilon: float = 1e-5
    revival_threshold: float = (
        0.05  # fraction of the fair share of hits below which a code is revived; 0: never (paper)
    )
    # Share of training images that are decoded without their finer levels (nested dropout). Without it a short run lets
    # the finest level carry everything: commitment then pulls the top's vectors to one point, and `mse_without_top`
    # comes down to `mse`. The paper has none; whether its two million steps need it was not tried.
    level_dropout: float = 0.0
    flip: bool = False  # mirror training images with probability 1/2
    colour: ColourConfig = dataclasses.field(default_factory=ColourConfig)  # changes of training images' colours
    dtype: str = "float32"  # of the convolutions; or 'bfloat16'. Parameters, quantiser and loss stay float32

    def __post_init__(self) -> None:
        at_least(self, 1, "hidden", "residual", "residual_layers", "code_dim", "kmeans_iterations")
        if not 2 <= self.num_codes <= 2**16:
            raise ValueError(f"num_codes must lie in 2..65536, not {self.num_codes}")
        if not self.strides:
            raise ValueError("strides must name a level at least, not ()")
        for stride in self.strides:
            if stride < 2 or stride & (stride - 1):
                raise ValueError(f"strides must be powers of two, not {self.strides}")
        one_of(self, dtype=("float32", "bfloat16"))
        one_of(self, quantizer=("ema", "cosine", "fsq", "none"), codebook_init=("uniform", "kmeans"))
        if self.quantizer == "fsq":
            self._check_fsq()
        if self.quantizer == "none" and (len(self.strides) > 1 or self.codebook_init != "uniform"):
            raise ValueError(
                f"quantizer 'none' is for one level without a codebook: strides must name one, not {self.strides}, and "
                f"codebook_init must be 'uniform', not '{self.codebook_init}'"
            )
        if not 0 <= self.commitment < math.inf:
            raise ValueError(f"commitment must be finite and at least 0, not {self.commitment}")
        if not 0 <= self.level_dropout < 1:
            raise ValueError(f"level_dropout must lie in [0, 1), not {self.level_dropout}")
        if not 0 < self.codebook_epsilon < math.inf:
            raise ValueError(f"codebook_epsilon must be finite and positive, not {self.codebook_epsilon}")
        if not 0 < self.codebook_decay < 1:
            raise ValueError(f"codebook_decay must lie in (0, 1), not {self.codebook_decay}")
        if not 0 <= self.revival_threshold < 1:
            raise ValueError(f"revival_threshold must lie in [0, 1), not {self.revival_threshold}")

    @property
    def cell(self) -> tuple[int, ...]:
        """The shape of what one cell of a code grid holds: () for a code, (code_dim,) for bins of every channel."""
        return (self.code_dim,) if self.quantizer == "none" else ()

    def _check_fsq(self) -> None:
        levels = self.fsq_levels
        if not levels or min(levels) < 3:
            raise ValueError(f"fsq_levels must be numbers from 3 on, one for each channel, not {levels}")
        if (len(levels), math.prod(levels)) != (self.code_dim, self.num_codes):
            raise ValueError(
                f"fsq_levels={levels} makes code_dim={len(levels)} and num_codes={math.prod(levels)}, "
                f"not code_dim={self.code_dim} and num_codes={self.num_codes}; set all three alike"
            )
        if self.codebook_init != "uniform":
            raise ValueError(
                f"codebook_init must be 'uniform' with quantizer='fsq', which has no codebook to start, "
                f"not '{self.codebook_init}'"
            )


@dataclasses.dataclass(frozen=True)
class AutoencoderStageConfig:
    model: AutoencoderConfig
    optim: OptimConfig
    train: TrainConfig


@dataclasses.dataclass(frozen=True)
class CodesConfig:
    """The extraction of codes with the Polyak weights."""

    batch_size: int = 128

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size")


@dataclasses.dataclass(frozen=True)
class ConditioningConfig:
    """The stack that turns the codes above into a map (`conditioning.py`), from the finest resolution down."""

    blocks: int = 20
    widths: tuple[int, ...] = (1024, 2048, 2048)
    bottlenecks: tuple[int, ...] = (256, 512, 512)
    # As the paper. With accumulation each micro-batch is normalised by itself, which is another model than the paper's;
    # 'group' is the same function for any batch. Or 'none'.
    norm: str = "batch"

    def __post_init__(self) -> None:
        at_least(self, 1, "blocks")
        if not self.widths or len(self.widths) != len(self.bottlenecks) or min(*self.widths, *self.bottlenecks) < 1:
            raise ValueError(f"widths must match bottlenecks={self.bottlenecks} one to one, not {self.widths}")
        one_of(self, norm=("batch", "group", "none"))


@dataclasses.dataclass(frozen=True)
class PriorConfig:
    """The network of a prior (`prior.py`). One below the top level has a section `conditioning`."""

    hidden: int = 512
    residual: int = 2048
    layers: int = 20
    filter: int = 5  # side of the paper's kernels
    # What a layer has of such a kernel; the paper does not say, and its figure of the layer is lost.
    # 'quadrant': the upper left quarter, as PixelSNAIL: 3x3 of 5x5. That gives 28.3 M parameters a layer at 512/2048,
    #   0.57 B in 20 layers. It sees the rows above up to one column to its right, and attention sees the rest.
    # 'causal': all that comes before, in two stacks (`two_stack.py`), so that nothing is unseen within reach: 61.9 M
    #   parameters and twice the work a layer.
    # 'auto': the first with attention, the second without, so that no prior has a blind spot. The paper's 128 TPUv3
    #   cores and steps fit a top prior of 0.6 B parameters better than one of 1.2 B; and its two layers of attention
    #   gained 0.02 nats over none (Table 4), little for the half of the image above that quadrants alone do not see.
    reading: str = "auto"
    activation: str = "elu"  # or 'concat_elu', as PixelSNAIL
    embedding: int = 64
    attention_every: int = 0  # layers between two attentions; 0: none
    attention_heads: int = 8
    attention_features: int = 256  # key, query and value dimensions of all heads together
    # What dropout makes zero in attention: 'probabilities', as is common, or 'logits', as the supplement words it.
    attention_dropped: str = "probabilities"
    output_layers: int = 0
    mixtures: int = 10  # components of the mixture of logistics that models latents without a quantiser
    dropout: float = 0.1  # after the first convolution of a layer, and in attention
    class_conditional: bool = False
    conditioning: ConditioningConfig | None = None
    dtype: str = "float32"  # of the layers; or 'bfloat16'. Parameters, logits and likelihood stay float32
    remat: bool = False  # compute activations of layers again in the backward pass: less memory, a third more work
    # Like layers are one loop of the compiled program. Without, they are plain code: the same parameters and values,
    # more to compile, more memory. On CPUs that is slower too, a tenth in training and half in sampling.
    scan: bool = True

    def __post_init__(self) -> None:
        at_least(self, 1, "hidden", "residual", "layers", "embedding", "attention_heads", "mixtures")
        at_least(self, 0, "attention_every", "output_layers")
        if self.filter < 3 or not self.filter % 2:
            raise ValueError(f"filter must be odd and at least 3, not {self.filter}")
        one_of(self, activation=("elu", "concat_elu"), dtype=("float32", "bfloat16"))
        one_of(self, reading=("auto", *READINGS), attention_dropped=DROPPED)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")
        if self.attention_every > self.layers:
            raise ValueError(
                f"attention_every must be at most layers={self.layers}, or 0 for no attention, "
                f"not {self.attention_every}"
            )
        if self.attention_every and (self.attention_features < 1 or self.attention_features % self.attention_heads):
            raise ValueError(
                f"attention_features must be a positive multiple of attention_heads={self.attention_heads}, "
                f"not {self.attention_features}"
            )


@dataclasses.dataclass(frozen=True)
class PriorStageConfig:
    model: PriorConfig
    optim: OptimConfig
    train: TrainConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """A VQ-VAE-2 run: `family` is 'vqvae2'. The number of strides decides which priors there are."""

    family: str
    seed: int
    data: DataConfig
    mesh: MeshConfig
    autoencoder: AutoencoderStageConfig
    codes: CodesConfig
    top: PriorStageConfig
    middle: PriorStageConfig | None = None  # of every level between top and bottom, each trained by itself
    bottom: PriorStageConfig | None = None
    # Optional: a PixelCNN decoder p(image | codes), for a bound on the likelihood of the image (supplement, section E).
    pixels: PriorStageConfig | None = None

    def __post_init__(self) -> None:
        sections = {name.split("_")[0] for name in self.levels}
        for name in ("middle", "bottom"):
            given, wanted = getattr(self, name) is not None, name in sections
            if given != wanted:
                raise ValueError(
                    f"{name} must be {'a section' if wanted else 'None'} where autoencoder.model.strides="
                    f"{self.autoencoder.model.strides} makes the levels {', '.join(self.levels)}, "
                    f"not {'a section' if given else 'None'}; a config file can change that (vqvae2_ffhq.py has three "
                    "levels, the variant table5_vq of vqvae2_imagenet.py has one)"
                )
        if self.pixels is not None and self.autoencoder.model.quantizer == "none":
            raise ValueError("pixels must be None where autoencoder.model.quantizer is 'none': there are no codes")
        for name in sorted(sections | ({"pixels"} if self.pixels is not None else set())):
            given, wanted = getattr(self, name).model.conditioning is not None, name != "top"
            if given != wanted:
                raise ValueError(
                    f"{name}.model.conditioning must be {'a section: there are codes above' if wanted else 'None'}"
                    f"{'' if wanted else ': there are no codes above'}, not {'a section' if given else 'None'}"
                )

    @property
    def levels(self) -> tuple[str, ...]:
        """The names of the levels, top first."""
        return level_names(len(self.autoencoder.model.strides))

    def prior(self, level: str) -> PriorStageConfig:
        """The section of a level's prior; 'middle_1', 'middle_2', ... share the section `middle`."""
        return getattr(self, level.split("_")[0])
