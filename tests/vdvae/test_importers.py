"""Released checkpoints as runs: synthetic files of all three layouts, made of the golden arrays."""

import json
import re
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

from bitsperdim import adopt, archives, cli, config_files, facts, sharding, trainer
from bitsperdim import run as run_lib
from bitsperdim.errors import InputError
from vdvae import convert, hyperparameters, importer, levels, vae
from vdvae.network import Source

NAME = "evdvae_unbounded_8bit_std"
LONGER = {"up_strides": "[1] + [2, 4] + [1] * 1", "up_n_layers": "[2] * 4"}  # as released files write lists


def cfg(sections, **changes):
    """The text of a released file of hyper-parameters."""
    text = []
    for section, values in sections.items():
        text.append(f"[{section}]\n# What people should know\n")
        written = {key: LONGER.get(key, repr(value)) for key, value in values.items()}
        written |= {key: value for key, value in changes.items() if key in values or section == changes.get("section")}
        text += [f"{key} = {value}\n" for key, value in written.items() if key != "section" and value is not None]
    return "\n".join(text)


@pytest.fixture(scope="module")
def tensors(efficient):
    return efficient.tensors("param/")


@pytest.fixture
def sections(efficient):
    return json.loads(str(efficient.arrays["config_json"]))


@pytest.fixture
def write(tmp_path, sections):
    """Writes `checkpoints-small` and the hyper-parameters where its release has them."""

    def write(contents, **changes):
        (tmp_path / "logs-small").mkdir(exist_ok=True)
        (tmp_path / "logs-small" / "hparams-small.cfg").write_text(cfg(sections, **changes))
        path = tmp_path / "checkpoints-small"
        path.write_bytes(serialization.msgpack_serialize(contents))
        return path

    return write


def flax_tree(tensors, mixtures):
    """The same parameters as the released JAX code keeps them (by the table of paths, written down once more here)."""
    table = [
        (r"levels_up\.(\d+)\.(\d+)", r"block_up_level_\1_\2"),
        (r"levels_up_downsample\.(\d+)", r"block_up_level_\1_downsample"),
        (r"levels_down\.(\d+)\.(\d+)", r"block_down_level_\1_\2"),
        (r"levels_down_upsample\.(\d+)", r"block_down_level_\1_upsample"),
        (r"residual_block\.(\d+)", r"residual_block_\1"),
        (r"(prior|posterior)_net\.0", r"\1_net"),
        (r"(prior|posterior)_layer\.projection", r"\1_gaussian_layer/projection"),
        (r"unpool\.ops\.0", "unpooling_layer/conv"),
        (r"unpool\.scale_bias", "unpooling_layer/scale_bias"),
        (r"\bpool\.ops\.0", "pooling_layer/conv"),
        (r"z_projection", "z_projection/z_projection"),
        *((rf"convs\.{1 + 2 * k}\b", f"conv_{k}") for k in range(4)),
    ]
    tree = {}
    for name, tensor in tensors.items():
        path = name
        for pattern, ours in table:
            path = re.sub(pattern, ours, path)
        path = re.sub(r"\.(weight|bias)$", r"/conv/\1", path).replace("weight", "kernel").replace(".", "/")
        if tensor.ndim == 4:
            is_map = name.endswith(("scale_bias", "trainable_h"))
            tensor = tensor.transpose((0, 2, 3, 1) if is_map else (2, 3, 1, 0))
        if name.startswith("top_down.output_conv") and mixtures:
            moved = tensor.copy()
            for colour in range(3):
                for q in range(3 * mixtures):
                    moved[..., mixtures + 3 * q + colour] = tensor[..., mixtures + colour * 3 * mixtures + q]
            tensor = moved
        *folders, leaf = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = tensor
    return tree


def of_jax(tensors, ema=None, mixtures=4, step=9):
    tree = lambda tensors: flax_tree(tensors, mixtures)
    moments = {name: tree({key: by * value for key, value in tensors.items()}) for name, by in (("mu", 0.1), ("nu", 2))}
    adamax, rate = {"count": np.int32(step), **moments}, {"count": np.int32(step)}
    optimizer = {"0": adamax, "1": rate}
    ema = tensors if ema is None else ema
    rest = {"opt_state": optimizer, "ema_decay": 0.9999, "ema_params": tree(ema)}
    return {"step": np.int32(step), "params": tree(tensors), **rest}


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def restored(run):
    """The whole train state."""
    stage = run.stage("model")
    like = trainer.abstract_state(run, stage, stage.model(run), sharding.make_mesh(run.config.mesh))
    with trainer.checkpoints_of(run, stage) as checkpoints:
        return checkpoints.restore(like)[1]


def test_a_checkpoint_of_jax_becomes_a_run_with_the_published_outputs_and_bound(efficient, tensors, write, tmp_path):
    path = write(of_jax(tensors))
    run = adopt.adopt(tmp_path / "run", importer.imported(str(path)))
    state = restored(run)
    assert_same(state["ema"], efficient.params)
    assert int(state["step"]) == run.config.train.steps == 9 and int(state["skips"]["total"]) == 0
    adamax = state["opt"][0]
    assert int(adamax.count) == 9
    assert_same(adamax.mu, jax.tree.map(lambda leaf: np.float32(0.1) * leaf, efficient.params))
    assert_same(adamax.nu, jax.tree.map(lambda leaf: np.float32(2.0) * leaf, efficient.params))
    model = vae.make(run.config.model, facts.of_run(run))
    sources = [Source(noise=noise) for noise in efficient.layers("eps")]

    @jax.jit
    def bound(params):
        raw, kl = vae.infer(model, params, efficient.image, sources, vae.kl_of_image)
        return raw, model.output.nats(raw, vae.target(model, efficient.image)) + jnp.stack(kl).sum(0)

    raw, nats = bound(state["ema"])
    np.testing.assert_allclose(raw, np.moveaxis(efficient.arrays["logits_nchw"], 1, -1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(nats.mean() / 3072, efficient.arrays["neg_elbo_nats_per_dim"], rtol=1e-4)


def test_hyperparameters_are_those_of_the_file(efficient, tensors, write):
    config = run_lib.parse(importer.imported(str(write(of_jax(tensors)))).config)[1]
    expected = efficient.model.config
    for key in ("strides", "layers", "skips", "blocks", "widths", "bottlenecks", "kernels", "latents", "cells"):
        assert getattr(config.model, key) == getattr(expected, key)
    assert config.model.latent_beta == config.model.output_beta == 0.6931472 and config.model.mixtures == 4
    assert config.model.bins == "normalised" and config.model.min_log_scale == -250.0 and config.model.flip
    assert (config.objective.kl_steps, config.objective.gamma_steps) == (5000, 10_000)
    optimizer, train = config.optim, config.train
    assert (optimizer.name, optimizer.cosine_start, optimizer.cosine_steps) == ("adamax", 50_000, 750_000)
    assert optimizer.final_fraction == pytest.approx(0.2) and optimizer.weight_decay == 0.0
    assert (train.batch_size, train.clip_norm, train.skip_norm, train.ema_decay) == (2, 0.0, 800.0, 0.9999)
    # Weights decayed in the released JAX code alone.
    decayed = run_lib.parse(importer.imported(str(write(of_jax(tensors), use_weight_decay=True))).config)[1]
    assert decayed.optim.weight_decay == 0.01


def test_a_checkpoint_of_pytorch_has_its_averages_and_its_optimizer(efficient, tensors, golden, write, monkeypatch):
    expected = efficient._replace(arrays=golden("vdvae/evdvae_train4_adamax"))
    trained, ema = expected.tensors("param_after4/"), expected.tensors("ema_after4/")
    trained = {name: trained[name] for name in tensors}  # in the order of the file
    moments = {
        number: {"step": 3, "exp_avg": 0.5 * tensor, "exp_inf": np.abs(tensor)}
        for number, tensor in enumerate(trained.values())
    }
    contents = {"global_step": 4, "model_state_dict": trained, "ema_model_state_dict": ema}
    contents |= {"optimizer_state_dict": {"state": moments, "param_groups": [{"lr": 1e-3}]}, "scheduler_state_dict": {}}
    path = write({"in": "place"})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    monkeypatch.setattr(archives, "_read_torch", lambda path: contents)
    imported = importer.imported(str(path))
    weights = imported.stages["model"]
    assert_same(weights.params, expected.converted("param_after4/"))
    assert_same(weights.ema, expected.converted("ema_after4/"))
    assert_same(weights.moments.first, jax.tree.map(lambda leaf: np.float32(0.5) * leaf, weights.params))
    assert_same(weights.moments.second, jax.tree.map(np.abs, weights.params))
    assert (weights.moments.count, imported.config.train.steps, imported.config.optim.weight_decay) == (3, 4, 0.0)
    del moments[7]["exp_inf"]
    with pytest.raises(InputError, match="lacks the entry 'exp_inf'"):
        importer.imported(str(path))
    del contents["optimizer_state_dict"]
    with pytest.raises(InputError, match="lacks the entry 'optimizer_state_dict'"):
        importer.imported(str(path))


def vdvae_log(path, baseline, **changes):
    values = json.loads(str(baseline.arrays["config_json"]))
    values |= {
        "n_batch": 16,
        "mpi_size": 2,
        "ema_rate": 0.9999,
        "grad_clip": 200.0,
        "skip_threshold": 400.0,
        "lr": 2e-4,
    }
    values |= {"wd": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.9, "warmup_iters": 100.0, "desc": "test"} | changes
    lines = [{"type": "hparam", "key": key, "value": value} for key, value in values.items() if value is not None]
    lines += [{"message": "starting"}, {"type": "train_loss", "step": 1000, "epoch": 1, "elbo": 6.0}]
    path.write_text("\n".join(json.dumps(line) for line in lines))


def test_a_checkpoint_of_vdvae_is_read_in_all_its_parts(baseline, tmp_path, monkeypatch):
    tensors = baseline.tensors("param/")
    parallel = {f"module.{name}": tensor for name, tensor in tensors.items()}
    state = {i: {"exp_avg": 0.5 * tensor, "exp_avg_sq": tensor**2} for i, tensor in enumerate(tensors.values())}
    files = {"model-ema.th": tensors, "model.th": parallel}
    files["opt.th"] = {"state": state, "param_groups": [{"step": 990, "lr": 2e-4}]}
    for name in files:
        with zipfile.ZipFile(tmp_path / f"small-{name}", "w") as archive:
            archive.writestr("archive/data.pkl", b"")
    monkeypatch.setattr(archives, "_read_torch", lambda path: files[path.name.removeprefix("small-")])
    vdvae_log(tmp_path / "small-log.jsonl", baseline)
    imported = importer.imported(str(tmp_path / "small-model-ema.th"))
    weights, config = imported.stages["model"], run_lib.parse(imported.config)[1]
    for tree in (weights.params, weights.ema):
        assert_same(tree, baseline.params)
    assert_same(weights.moments.second, jax.tree.map(np.square, baseline.params))
    assert (weights.moments.count, config.train.steps, config.train.batch_size) == (990, 1000, 32)
    expected = baseline.model.config
    for key in (
        "strides",
        "layers",
        "blocks",
        "widths",
        "latents",
        "style",
        "constants_up_to",
        "whiten",
        "latent_beta",
    ):
        assert getattr(config.model, key) == getattr(expected, key)
    # The average alone, as CIFAR-10 was released.
    for name in ("model", "opt"):
        (tmp_path / f"small-{name}.th").unlink()
    weights = importer.imported(str(tmp_path / "small-model-ema.th")).stages["model"]
    assert_same(weights.params, baseline.params)
    assert weights.moments is None
    vdvae_log(tmp_path / "small-log.jsonl", baseline, width=None)
    with pytest.raises(InputError, match="lacks the hyper-parameter 'width'"):
        importer.imported(str(tmp_path / "small-model-ema.th"))
    vdvae_log(tmp_path / "small-log.jsonl", baseline, zdim=8)
    with pytest.raises(InputError, match=r"tensor 'decoder.* has the shape .* not .* as in this VDVAE"):
        importer.imported(str(tmp_path / "small-model-ema.th"))


def test_outputs_of_the_two_layouts_are_permuted_as_recorded(golden):
    recorded = golden("vdvae/mol_logprob")
    of_flax = convert.flax_channels(3, 10)
    np.testing.assert_array_equal(recorded["jax_from_torch_channel_perm"][of_flax], np.arange(100))
    np.testing.assert_array_equal(recorded["logits_jaxlayout_nhwc"][..., of_flax], recorded["logits_nhwc"])


SPOILED = {  # of the hyper-parameters, and of the tensors
    "unknown": ({"section": "model", "use_attention": True}, "unknown hyper-parameter 'model.use_attention'"),
    "missing": ({"up_filters": None}, "lacks the hyper-parameter 'model.up_filters'"),
    "no literal": ({"up_filters": "open('x')"}, "'model.up_filters' is no value"),
    "endless": ({"up_filters": "[1] * 10 ** 9"}, "'model.up_filters' is no value"),
    "too long": ({"up_filters": "[1] * 1000000"}, "'model.up_filters' is no value"),
    "a word": ({"learning_rate": "'high'"}, "'optimizer.learning_rate' is 'high', which is not of its kind"),
    "no list": ({"down_strides": "4"}, "'model.down_strides' is 4, which is not of its kind"),
    "other cells": ({"up_n_layers": "[3] * 4"}, r"'model.up_n_layers' is \[3, 3, 3, 3\]; only"),
    "uneven": ({"down_filters": "[24, 16, 12]"}, "'model.down_filters' must be a list of 4"),
    "asymmetric": ({"up_kernel_size": "[3, 3, 1, 1]"}, "'model.up_kernel_size' must be the reverse"),
    "schedule": ({"variation_schedule": "'Logistic'"}, "'loss.variation_schedule' is 'Logistic'"),
    "optimizer": ({"type": "'Radam'"}, "'optimizer.type' is 'Radam'"),
    "another model": ({"down_latent_variates": "[5] * 4"}, r"tensor '.*' has the shape .* as in this Efficient-VDVAE"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_hyperparameters_that_are_not_known_are_refused_by_name(tensors, write, what):
    changes, message = SPOILED[what]
    with pytest.raises(InputError, match=message):
        importer.imported(str(write(of_jax(tensors), **changes)))


def test_tensors_that_are_not_the_models_are_refused_by_name_and_shape(tensors, efficient):
    name = "top_down.levels_down_upsample.1.z_projection.weight"
    from_torch = lambda tensors: convert.efficient_from_torch(tensors, efficient.model.net)
    less = {key: value for key, value in tensors.items() if key != name}
    with pytest.raises(InputError, match=rf"lacks the tensor '{name}' of shape \(16, 4, 1, 1\)"):
        from_torch(less)
    with pytest.raises(InputError, match=rf"'{name}' has the shape \(4, 16\), not \(16, 4, 1, 1\)"):
        from_torch(tensors | {name: np.ones((4, 16), np.float32)})
    with pytest.raises(InputError, match=rf"'{name}' holds other things than finite real numbers"):
        from_torch(tensors | {name: np.full((16, 4, 1, 1), np.nan, np.float32)})
    with pytest.raises(InputError, match=r"has 1 tensors that this Efficient-VDVAE has not, such as 'odd' \(3,\)"):
        from_torch(tensors | {"odd": np.zeros(3)})


def test_what_is_refused_leaves_one_line_and_no_run(tensors, write, tmp_path, monkeypatch, capsys):
    path = write(of_jax(tensors))
    path.write_bytes(path.read_bytes()[:-1000])
    cases = ((f"--checkpoint={path}", "not a whole msgpack file"), ("--checkpoint=nowhere", "are not in"))
    for flag, message in (*cases, ("--image_size=32", "--image_size is not for --family=vdvae")):
        monkeypatch.setattr("sys.argv", ["convert.py", "--family=vdvae", f"--workdir={tmp_path / 'run'}", flag])
        with pytest.raises(SystemExit) as ended:
            cli.convert()
        said = capsys.readouterr().err
        assert ended.value.code == 2 and message in said and said.count("\n") == 1
        assert not (tmp_path / "run").exists()


def test_entries_of_one_grid_become_levels_with_one_shared_skip_connection(sections):
    """The released CIFAR-10 files: at 16x16 and 32x32 the second entry has further layers."""
    down = lambda *counts: [value for value, count in counts for _ in range(count)]
    values = {f"{section}.{key}": value for section, of in sections.items() for key, value in of.items()}
    widths = down((384, 7), (192, 7), (96, 7), (48, 12))
    ratios, kernels = down((0.25, 14), (0.5, 7), (1.0, 12)), down((1, 3), (3, 30))
    strides = down((1, 3), (4, 1), (1, 3), (2, 1), (1, 6), (2, 1), (1, 6), (2, 1), (1, 11))
    further = [0] * 33
    further[15], further[22] = 4, 10
    values |= {f"model.{side}_n_blocks": [1] * 33 for side in ("up", "down")}
    values |= {"model.down_strides": strides, "model.up_strides": strides[::-1], "model.down_filters": widths}
    values |= {"model.up_filters": [*widths[::-1][1:], 384], "model.input_conv_filters": 48}
    values |= {"model.up_skip_filters": widths[::-1], "model.down_latent_variates": [16] * 33}
    values |= {"model.down_mid_filters_ratio": ratios, "model.up_mid_filters_ratio": ratios[::-1]}
    values |= {"model.down_kernel_size": kernels, "model.up_kernel_size": kernels[::-1]}
    values |= {"model.down_n_blocks_per_res": further, "model.up_n_blocks_per_res": [0] * 33}
    published = run_lib.parse(config_files.load("vdvae_cifar10:c1"))[1].model
    found = hyperparameters.efficient(values, "", decays=False).model
    for key in ("strides", "layers", "skips", "shared", "blocks", "widths", "bottlenecks", "kernels", "latents"):
        assert tuple(found[key]) == getattr(published, key)
    level = levels.levels(published, (32, 32, 3))[3]
    assert [level.skip_of(layer) for layer in range(11)] == [0, 1, 1, 1, 1, 1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_an_imported_run_is_measured_and_sampled(tensors, write, tmp_path, tfds_dir, monkeypatch):
    path = write(of_jax(tensors))
    data = [f"--config.data.data_dir={tfds_dir}", "--config.data.evaluation_split=test[:8]"]
    flags = [f"--checkpoint={path}", "--config.model.bins=published_efficient", "--config.data.cache_dir=", *data]
    monkeypatch.setattr("sys.argv", ["convert.py", "--family=vdvae", f"--workdir={tmp_path / 'run'}", *flags])
    cli.convert()
    run = run_lib.open_run(tmp_path / "run")
    assert run.config.model.bins == "published_efficient"
    measured = trainer.evaluate(run, "evaluation")
    assert measured["model"]["images"] == 8 and np.isfinite(measured["bits_per_dim"])
    monkeypatch.setattr("sys.argv", ["sample.py", f"--workdir={tmp_path / 'run'}", "--num=2"])
    cli.sample()
    assert np.load(tmp_path / "run" / "samples.npy").shape == (2, 32, 32, 3)
