"""The chain of a class-conditional run: labels of images, of codes, of samples; on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from bitsperdim import config_files, data, trainer
from bitsperdim.errors import InputError
from vqvae2 import chain, codes

GRIDS = {"top": (2, 2), "bottom": (4, 4)}


@pytest.fixture(scope="module")
def run(tmp_path_factory, untrained):
    """Three classes, layers in bfloat16; not to be changed."""
    config = config_files.load("vqvae2_photos:tiny")
    config.data = {"source": "synthetic", "image_size": 16, "synthetic_size": 16, "synthetic_classes": 3}
    config.bottom.model.reading = "auto"
    for section in (config.top, config.bottom):
        section.model.update({"class_conditional": True, "dtype": "bfloat16"})
    return untrained(tmp_path_factory.mktemp("conditional") / "run", config)


def mesh_of(num_data, num_fsdp):
    devices = jax.devices()[: num_data * num_fsdp]
    return jax.make_mesh((num_data, num_fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


@pytest.fixture(scope="module")
def one(run):
    return chain.load(run, mesh_of(1, 1))


@pytest.fixture(scope="module")
def in_turn(one):
    return one.draw(jax.random.key(1), 5)


def test_the_labels_of_codes_are_those_of_their_images(run):
    source, stored = data.open_source(run.config.data, "train"), codes.open_codes(run, "train")
    labels = stored.read(np.arange(16))["label"]
    np.testing.assert_array_equal(labels, source.read(np.arange(16))["label"])
    assert set(labels) == {0, 1, 2}


@pytest.mark.parametrize("level", GRIDS)
def test_another_label_is_another_likelihood(run, level):
    model, state = trainer.restore(run, level, mesh_of(1, 1))
    batch = codes.open_codes(run, "train").read(np.arange(4))
    nats = lambda label: model.measure(state["ema"], state["extra"], batch | {"label": label}, jax.random.key(0)).parts
    right, wrong = (nats(label)["nats_per_code"] for label in (batch["label"], (batch["label"] + 1) % 3))
    assert np.abs(right - wrong).min() > 1e-3


def test_samples_are_of_the_label_that_is_asked_for(one, in_turn):
    """Without one, of all classes in turn: sample i is what its class alone gives."""
    pictures, about = in_turn
    assert about["labels"] == [0, 1, 2, 0, 1]
    for label in range(3):
        alone, of_label = one.draw(jax.random.key(1), 5, label=label)
        assert of_label["labels"] == [label] * 5
        for i in range(5):
            assert (alone[i] == pictures[i]).all() == (i % 3 == label), (label, i)
    with pytest.raises(InputError, match=r"label must lie in 0\.\.2, not 3"):
        one.draw(jax.random.key(1), 5, label=3)


def test_samples_do_not_depend_on_the_number_of_devices(run, in_turn):
    """One on each, of weights that are kept in eight parts; five are asked for."""
    pictures, about = chain.load(run, mesh_of(1, 8)).draw(jax.random.key(1), 5)
    np.testing.assert_array_equal(pictures, in_turn[0])
    assert (about["labels"], about["batch_size"]) == ([0, 1, 2, 0, 1], 5)


def test_samples_do_not_depend_on_the_batch(one, in_turn):
    pictures, about = one.draw(jax.random.key(1), 5, batch_size=2)
    np.testing.assert_array_equal(pictures, in_turn[0])
    assert about["batch_size"] == 2
    with pytest.raises(InputError, match="batch_size must be at least 1, not 0"):
        one.draw(jax.random.key(1), 5, batch_size=0)


def test_weights_for_drawing_are_half_as_large_and_give_the_same_logits(run):
    mesh, level = mesh_of(1, 8), "bottom"
    _, state = trainer.restore(run, level, mesh)
    params, extra = chain.for_drawing(run, level, state, mesh)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    kinds = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    exact = {name for name, dtype in kinds.items() if dtype == jnp.float32}
    assert exact and all("head" in name or "norm" in name for name in exact)
    batch = codes.open_codes(run, "train").read(np.arange(4))
    net, inputs = chain.network(run, level), (batch[level], chain.upper(run, level, batch), batch["label"])
    logits = jax.jit(lambda params: net.apply({"params": params, **extra}, *inputs))
    np.testing.assert_array_equal(logits(params), logits(jax.device_get(state["ema"])))


@pytest.mark.parametrize(("field", "value"), [("label", 3), ("label", -1), ("bottom", 32)])
def test_a_label_or_a_code_out_of_range_is_refused(run, monkeypatch, field, value):
    arrays = codes.extracted.open_arrays(run, codes._extraction(run), "train")
    spoilt = {name: np.array(column[np.arange(16)]).astype(np.int32) for name, column in arrays.items()}
    spoilt[field].flat[5] = value
    monkeypatch.setattr(codes.extracted, "open_arrays", lambda *_: spoilt)
    last = {"label": 2, "bottom": 31}[field]
    message = rf"the field '{field}' of the train codes in .* holds {value}, which does not lie in 0\.\.{last}; remove"
    with pytest.raises(InputError, match=message):
        codes.open_codes(run, "train").read(np.arange(16))
