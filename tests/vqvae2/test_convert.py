"""Published two-level weights: as a run they reconstruct what they did, and every tensor has to fit."""

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import bitsperdim
from bitsperdim import cli, sharding, trainer
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from vqvae2 import autoencoder_stage, convert, facts, importer, quantizer

LEVELS = {"t": "top", "b": "bottom"}


@pytest.fixture(scope="module")
def arrays(golden):
    return golden("vqvae2/vqvae2_two_level")


@pytest.fixture
def state(arrays):
    return {name.removeprefix("param/"): array for name, array in arrays.items() if name.startswith("param/")}


@pytest.fixture(scope="module")
def run(arrays, tmp_path_factory):
    """The golden file's weights, converted as by hand."""
    folder = tmp_path_factory.mktemp("convert")
    tensors = {name.removeprefix("param/"): array for name, array in arrays.items() if name.startswith("param/")}
    np.savez(folder / "weights.npz", **tensors)
    flags = [f"--checkpoint={folder / 'weights.npz'}", f"--workdir={folder / 'run'}", "--image_size=32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["convert.py", "--family=vqvae2", *flags])
        cli.convert()
    return run_lib.open_run(folder / "run")


@pytest.fixture(scope="module")
def restored(run):
    _, state = trainer.restore(run, "autoencoder", sharding.mesh_at_hand(run.config.mesh))
    return state


def nhwc(x):
    return np.asarray(x).transpose(0, 2, 3, 1)


def test_the_imported_run_reproduces_golden_codes_and_reconstruction(arrays, run, restored):
    net = autoencoder_stage.network(run.config.autoencoder.model, facts.of_run(run))
    # Images of the port's range [-1, 1] are [-255/256, 255/256] here.
    images = jnp.asarray(nhwc(arrays["input"])) * (255 / 256)
    tables = autoencoder_stage.embeddings(restored["extra"]["codebooks"])
    image, _, quantized = net.apply({"params": restored["ema"]}, images, tables)
    for letter, level in LEVELS.items():
        np.testing.assert_array_equal(quantized[level].codes, arrays[f"eval/code_{letter}"])
    np.testing.assert_allclose(image * (256 / 255), nhwc(arrays["eval/recon"]), atol=1e-5)


def test_a_notebook_gets_the_ports_own_function_of_the_pixels(run, state):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    net = autoencoder_stage.network(run.config.autoencoder.model, facts.of_run(run))
    x = jnp.asarray(pixels / 255 * 2 - 1, jnp.float32)
    params = {"params": convert.params_from_torch(state)}
    image, _, quantized = net.apply(params, x, convert.embeddings_from_torch(state))
    loaded = bitsperdim.load(str(run.workdir))
    for level, found in loaded.encode(pixels).items():
        np.testing.assert_array_equal(found, quantized[level].codes)
    expected = np.clip((np.asarray(image, np.float64) + 1) * 127.5, 0, 255)
    assert np.abs(loaded.reconstruct(pixels) - expected).max() < 0.501


def test_the_averages_go_on_as_the_ports_did(arrays, restored):
    for letter, level in LEVELS.items():
        codes = jnp.asarray(arrays[f"eval/code_{letter}"])
        z = jnp.asarray(nhwc(arrays[f"eval/z_{letter}"]))
        hits = np.bincount(np.ravel(codes), minlength=24).astype(np.float32)
        sums = np.zeros((24, 8), np.float32)
        np.add.at(sums, np.ravel(codes), np.reshape(z, (-1, 8)))
        statistics = quantizer.Statistics(hits, sums, np.zeros_like(sums))
        after = quantizer.update(
            restored["extra"]["codebooks"][level], statistics, decay=0.99, epsilon=1e-5, revival_threshold=0.0
        )
        name = f"after_step/quantize_{letter}"
        np.testing.assert_allclose(after.ema_counts, arrays[f"{name}.cluster_size"], rtol=1e-5)
        np.testing.assert_allclose(after.ema_sums, arrays[f"{name}.embed_avg"].T, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(after.embedding, arrays[f"{name}.embed"].T, rtol=1e-4, atol=1e-5)


def test_an_imported_run_is_measured_on_a_folder_of_images(run, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (8, 32, 32, 3), np.uint8)
    for index, image in enumerate(pixels):
        folder = tmp_path / ("held_out" if index else "train")
        folder.mkdir(exist_ok=True)
        PIL.Image.fromarray(image).save(folder / f"{index}.png")
    paths = {"path": "train", "evaluation_path": "held_out", "cache_dir": "cache"}
    opened = run_lib.open_run(run.workdir, {key: str(tmp_path / name) for key, name in paths.items()})
    measured = trainer.evaluate(opened, "evaluation")
    recon = bitsperdim.load(str(run.workdir)).reconstruct(pixels[1:])
    error = np.square((recon.astype(float) - pixels[1:]) / 128).mean()
    assert measured["autoencoder"]["images"] == 7
    assert measured["mse"] == pytest.approx(error, rel=0.02)  # of rounded and clipped pixels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("dec_t.blocks.4.bias"),
            r"lacks the tensor 'dec_t\.blocks\.4\.bias' of the two-level VQ-VAE-2",
        ),
        (
            lambda s: s.update({"dec.blocks.6.bias": np.zeros(4)}),
            r"'dec\.blocks\.6\.bias' has the shape \(4,\), not \(3",
        ),
        (
            lambda s: s.update({"enc_m.weight": np.zeros((2, 1))}),
            r"1 tensors .*, such as 'enc_m\.weight' of shape \(2, 1",
        ),
        (
            lambda s: s.update({"quantize_t.embed": np.zeros(8)}),
            r"'quantize_t\.embed' has the shape \(8,\), not 2 axes",
        ),
        (lambda s: s.clear(), r"lacks the tensor 'enc_b\.blocks\.0\.weight'"),
    ],
    ids=["missing", "misshapen", "unknown", "rank", "another"],
)
def test_a_tensor_that_does_not_fit_is_named_with_its_shape(state, tmp_path, change, message):
    change(state)
    np.savez(tmp_path / "weights.npz", **state)
    with pytest.raises(InputError, match=message):
        importer.imported(str(tmp_path / "weights.npz"), 32)


def test_an_image_size_that_the_strides_do_not_divide_is_refused(state, tmp_path):
    np.savez(tmp_path / "weights.npz", **state)
    with pytest.raises(InputError, match=r"--image_size must be divisible by 8, not 36"):
        importer.imported(str(tmp_path / "weights.npz"), 36)
