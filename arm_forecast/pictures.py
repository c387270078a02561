"""Pictures of autoregressive models: samples, and the maps of forecasting mistakes beside them.

After Wiggers & Hoogeboom 2020, supplement C: 16 uncurated samples of seed 10, the mistakes of the modules and those of
fixed-point iteration on the same noise.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree, UInt8

from arm_forecast import codes, engine, facts, networks, samplers
from arm_forecast.autoencoder_stage import coder
from arm_forecast.engine import Samples
from arm_forecast.pixelcnn import Grid
from arm_forecast.samplers import Sampler
from bitsperdim import dequantize, images, plots
from bitsperdim.model import Pictures
from bitsperdim.run import Run

NUM_SAMPLES = 16
SEED = 10  # the supplement's; `sample.py --seed=10` draws the same images from the same weights
RED = np.array([230, 30, 30])


def of_arm(run: Run, mesh: Mesh) -> Pictures:
    """Samples during training, always of seed 10, and where their forecasts were wrong."""
    config, grid, levels = run.config.arm, facts.grid(run), facts.of_run(run).levels
    draw = samplers.compiled(config.model, None, grid, Sampler("fixed_point"), NUM_SAMPLES, NUM_SAMPLES)
    decode = decoder(run, mesh)

    def pictures(params: PyTree, extra: PyTree, key: Array) -> dict[str, np.ndarray]:
        samples = draw(networks.prepared(params, config.model, grid), jax.random.key(SEED))
        x = _as_images(samples, grid)
        shown = x.astype(np.uint8) if decode is None else decode(x)
        return {
            "samples": images.grid(shown, levels=levels),
            **mistakes({"fixed_point": samples}, grid, levels, decode),
        }

    return pictures


def decoder(run: Run, mesh: Mesh) -> Callable[[np.ndarray], UInt8[np.ndarray, "n h w c"]] | None:
    """Codes to images, for a latent run."""
    if run.config.autoencoder is None:
        return None
    autoencoder = codes.autoencoder(run, mesh)
    return lambda drawn: coder(run).decode(autoencoder["ema"], autoencoder["extra"], drawn)


def mistakes(
    drawn: Mapping[str, Samples], grid: Grid, levels: int, decode: Callable | None
) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
    """For each forecaster its samples, below each the map of its mistakes: the wrongly forecast pixels in red, the rest
    in faint grey. `levels` are those of the images, decoded ones too.

    The depth of the red is the share of the pixel's channels (or of the codes at that place) that were wrong. With a
    decoder the maps lie on the grid of codes: below each decoded image over it in faint grey, and below that alone.
    """
    shown_by_name = {}
    for name, samples in drawn.items():
        x = _as_images(samples, grid)
        shown = np.asarray(dequantize.to_uint8(x if decode is None else decode(x), levels))
        wrong = np.asarray(engine.mistakes(jnp.asarray(samples.call_of)))
        share = wrong.reshape(x.shape).mean(-1)
        factor = shown.shape[1] // share.shape[1]
        share = share.repeat(factor, 1).repeat(factor, 2)
        rows = [np.broadcast_to(shown, (*shown.shape[:3], 3)), _overlay(shown, share)]
        if decode is not None:
            rows.append(_overlay(np.full_like(shown, 255), share))
        title = f"{name}: samples; below each in red what was forecast wrongly, {100 * wrong.mean():.1f} % of all"
        shown_by_name[f"mistakes_{name}"] = plots.titled(_in_turn(rows), title)
    return shown_by_name


def _in_turn(rows: Sequence[UInt8[np.ndarray, "n h w 3"]]) -> UInt8[np.ndarray, "H W 3"]:
    """A grid in which each row of the first images is followed by one of the second, and so on."""
    count = len(rows[0])
    columns = min(8, count)
    padded = [np.pad(row, ((0, -count % columns), (0, 0), (0, 0), (0, 0)), constant_values=images.GREY) for row in rows]
    # [kind, row, column, h, w, 3] -> row, kind, column
    tiles = np.stack(padded).reshape(len(rows), -1, columns, *rows[0].shape[1:]).swapaxes(0, 1)
    return images.grid(tiles.reshape(-1, *rows[0].shape[1:]), columns)


def _overlay(shown: UInt8[np.ndarray, "n h w c"], share: Float[np.ndarray, "n h w"]) -> UInt8[np.ndarray, "n h w 3"]:
    """Images in faint grey with red of the strength sqrt(share): one channel of three should be seen."""
    grey = np.broadcast_to(shown.mean(-1, keepdims=True), (*shown.shape[:3], 3))
    faint = 255.0 - (255.0 - grey) * 0.35
    strength = np.sqrt(share)[..., None]
    return np.rint(faint * (1.0 - strength) + RED * strength).astype(np.uint8)


def _as_images(samples: Samples, grid: Grid) -> np.ndarray:
    return np.asarray(samples.x).reshape(-1, grid.height, grid.width, grid.channels)
