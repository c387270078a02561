"""One program on one device and on eight: the same batches, noise, losses and state, wherever the arrays live."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_family
from jax.sharding import PartitionSpec as P

from bitsperdim import config as config_lib
from bitsperdim import data, optim, program, sharding, state
from bitsperdim import step as step_lib
from bitsperdim.errors import InputError
from bitsperdim.sharding import MeshConfig

STEPS = 5


@pytest.fixture(scope="module")
def train(toy_config, sub_mesh):
    """`train(data, fsdp, accumulation, model)` -> the state on its devices and the reports after five steps."""

    @functools.cache
    def run(num_data, num_fsdp=1, accumulation=1, num_model=1):
        changes = {"mesh.fsdp": num_fsdp, "train.accumulation": accumulation}
        config = config_lib.unpack(toy_config(changes).to_dict(), toy_family.Config)
        mesh, model = sub_mesh(num_data, num_fsdp, num_model), toy_family.make(config)
        optimizer = optim.optimizer(config.optim, config.train.steps)
        like = state.abstract(model, optimizer, jax.random.key(0), mesh, config.mesh)
        step = step_lib.compiled(model, config.optim, config.train, 0, mesh, like)
        current, reports = state.create(model, optimizer, jax.random.key(0), like), []
        source = data.open_source(config.data, "train")
        for index in range(STEPS):
            batch = data.train_batch(source, 0, index, config.train.batch_size, sharding.over_batch(mesh))
            current, report = step(current, batch)
            reports.append(jax.device_get(report))
        return current, reports

    return run


@pytest.fixture(scope="module")
def on_one(train):
    return train(1)


@pytest.mark.parametrize(
    ("num_data", "num_fsdp", "accumulation", "num_model"),
    [(8, 1, 1, 1), (1, 8, 1, 1), (2, 4, 1, 1), (2, 1, 4, 1), (2, 2, 2, 2)],
    ids=["8 devices", "fsdp 8", "2 x 4", "2 devices, 4 micro-batches", "model 2, 2 micro-batches"],
)
def test_devices_shards_and_micro_batches_change_nothing_but_rounding(
    train, on_one, num_data, num_fsdp, accumulation, num_model
):
    (expected, reports), (got, others) = on_one, train(num_data, num_fsdp, accumulation, num_model)
    for report, other in zip(reports, others, strict=True):
        # Adam's first updates magnify rounding: a gradient near zero decides a sign. The losses do not feel it.
        np.testing.assert_allclose(other.figures["objective"], report.figures["objective"], rtol=1e-5)
        np.testing.assert_allclose(other.parts["nats"], report.parts["nats"], rtol=1e-5)
        assert other.tallies["black"] == report.tallies["black"]
    # The examples that the step chose, and the average of flipped images: the noise itself is the same.
    np.testing.assert_array_equal(got["extra"]["chosen"], expected["extra"]["chosen"])
    np.testing.assert_allclose(got["extra"]["pixel_mean"], expected["extra"]["pixel_mean"], rtol=1e-5, atol=1e-7)
    for name in ("params", "ema"):
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)
        jax.tree.map(close, jax.device_get(got[name]), jax.device_get(expected[name]))


def test_dropout_is_in_those_losses(train, on_one, monkeypatch):
    """Guards the test above: with other noise the losses would differ by far more than its tolerance."""
    per_example = toy_family.rng.per_example
    monkeypatch.setattr(toy_family.rng, "per_example", lambda key, position: per_example(key, position + 1))
    _, others = train.__wrapped__(1)
    gaps = [abs(a.figures["objective"] / b.figures["objective"] - 1) for a, b in zip(others, on_one[1], strict=True)]
    assert min(gaps) > 1e-4


def test_fsdp_leaves_each_device_an_eighth_of_every_kernel_and_of_its_moments(train):
    current, _ = train(1, 8, 1)
    kernels = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(current):
        held = [shard.data.size for shard in leaf.addressable_shards]
        sharded = jax.tree_util.keystr(path, simple=True, separator="/").endswith("kernel")
        assert held == [leaf.size // 8 if sharded else leaf.size] * 8, path
        kernels += sharded
    assert kernels == 2 * 4  # encoder and decoder, in params, ema and Adam's two moments


def test_a_model_axis_leaves_each_device_a_part_of_every_kernel_of_which_fsdp_takes_another(train):
    current, _ = train(2, 2, 2, 2)
    for path, leaf in jax.tree_util.tree_leaves_with_path(current):
        held = [shard.data.size for shard in leaf.addressable_shards]
        sharded = jax.tree_util.keystr(path, simple=True, separator="/").endswith("kernel")
        assert held == [leaf.size // 4 if sharded else leaf.size] * 8, path


def test_a_kernel_is_gathered_over_fsdp_and_used_as_it_lies_over_model(sub_mesh):
    mesh = sub_mesh(2, 2, 2)
    config = MeshConfig(
        fsdp=2, model=2, smallest=0, model_rules=(("out/kernel$", ("model", "")), ("kernel$", ("model",)))
    )
    kernels = {name: {"kernel": jax.ShapeDtypeStruct((6, 8), jnp.float32)} for name in ("in", "out")}
    kernels["odd"] = {"kernel": jax.ShapeDtypeStruct((6, 6), jnp.float32)}
    places = sharding.for_state(kernels, config, mesh)
    spec = lambda name, of=lambda place: place: of(places[name]["kernel"]).spec
    assert spec("in") == P(None, ("model", "fsdp")) and spec("in", sharding.in_use) == P((), ("model",))
    assert spec("out") == P("model", "fsdp") and spec("out", sharding.in_use) == P(("model",), ())
    assert spec("odd") == P(None, "model")  # six cannot be divided by four


@pytest.fixture(scope="module")
def compiled(toy_config, sub_mesh):
    """`compiled(accumulation)` -> the state's shapes, a step of the toy under FSDP as traced, and its program."""

    @functools.cache
    def make(accumulation):
        config = config_lib.unpack(
            toy_config({"mesh.fsdp": 8, "train.accumulation": accumulation}).to_dict(), toy_family.Config
        )
        mesh, model = sub_mesh(1, 8), toy_family.make(config)
        optimizer = optim.optimizer(config.optim, config.train.steps)
        like = state.abstract(model, optimizer, jax.random.key(0), mesh, config.mesh)
        step = step_lib.compiled(model, config.optim, config.train, 0, mesh, like)
        source, over_batch = data.open_source(config.data, "train"), sharding.over_batch(mesh)
        batch = data.train_batch(source, 0, 0, config.train.batch_size, over_batch)
        lowered = step.lower(like, batch)
        return like, lowered.as_text(), lowered.compile().as_text()

    return make


def test_gradients_are_placed_as_their_parameters_in_each_micro_batch_and_in_their_sum(compiled):
    """What the compiler is told; without it, it may keep whole gradients on every device."""
    told = [line for line in compiled(2)[1].splitlines() if "sharding_constraint" in line]
    for kernel in ("tensor<64x16xf32>", "tensor<16x64xf32>"):
        assert sum(kernel in line and '[{}, {"fsdp"}]' in line for line in told) == 2


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_gathers_weights_once_sums_gradients_and_sends_no_activations(compiled, accumulation):
    like, _, hlo = compiled(accumulation)
    num_bytes = lambda leaves: sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    params = jax.tree.leaves(like["params"])
    sharded = [leaf for leaf in params if not leaf.sharding.is_fully_replicated]
    traffic = program.traffic(hlo)
    # Gradients of every micro-batch are summed; the rest is a few numbers for each of its 32 examples.
    expected = {"all-gather": num_bytes(sharded), "all-reduce": accumulation * num_bytes(params)}
    assert set(traffic) == set(expected)
    for kind, size in expected.items():
        assert size <= traffic[kind]["bytes"] < size + 2000 * accumulation


def placed(shape, config, mesh, name="kernel"):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    return sharding.for_state({"layer": {name: leaf}}, config, mesh)["layer"][name].spec


def test_a_dimension_that_the_axis_does_not_divide_stays_whole(sub_mesh):
    config = MeshConfig(fsdp=4, smallest=0)
    assert placed((3, 3, 6, 8), config, sub_mesh(2, 4)) == P(None, None, None, "fsdp")
    assert placed((3, 3, 8, 6), config, sub_mesh(2, 4)) == P(None, None, None, None)
    assert placed((8,), config, sub_mesh(2, 4), "bias") == P(None)


def test_a_small_parameter_stays_whole(sub_mesh):
    at = functools.partial(placed, config=MeshConfig(fsdp=4), mesh=sub_mesh(2, 4))
    assert at((3, 3, 64, 32)) == P(None, None, None, "fsdp") and at((3, 3, 64, 28)) == P(None, None, None, None)
    # But not over `model`, whose rules say how a layer is computed.
    assert placed((8, 8), MeshConfig(fsdp=2, model=2), sub_mesh(2, 2, 2)) == P(None, "model")


def test_tables_are_sharded_as_kernels_are(sub_mesh):
    """Those of a thousand classes in twenty layers are a tenth of a prior."""
    assert placed((20, 1000, 16), MeshConfig(fsdp=4), sub_mesh(2, 4), "table") == P(None, None, "fsdp")


def test_the_first_rule_that_matches_decides_and_names_the_last_dimensions(sub_mesh):
    config = MeshConfig(
        fsdp=4, smallest=0, rules=(("^layer/kernel$", ("fsdp", "")), ("kernel$", ("fsdp",)), ("scale", ("data",)))
    )
    assert placed((3, 8, 8), config, sub_mesh(2, 4)) == P(None, "fsdp", None)
    assert placed((8,), config, sub_mesh(2, 4)) == P(None)
    assert placed((2, 2), config, sub_mesh(2, 4), "scale") == P(None, "data")


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1)),
        (MeshConfig(data=1, fsdp=-1), (1, 8)),
        (MeshConfig(data=2, fsdp=4), (2, 4)),
        (MeshConfig(data=-1, fsdp=2), (4, 2)),
        (MeshConfig(data=-1, fsdp=2, model=2), (2, 2, 2)),
        (MeshConfig(data=-1, spatial=4), (2, 1, 4)),
    ],
)
def test_the_mesh_uses_every_device(config, shape):
    mesh = sharding.make_mesh(config)
    assert tuple(mesh.shape.values()) == shape
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(data=4), MeshConfig(data=16), MeshConfig(fsdp=3)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused_with_their_number(config):
    with pytest.raises(InputError, match=rf"mesh.data={config.data} x mesh.fsdp={config.fsdp} .* 8 devices present"):
        sharding.make_mesh(config)


def test_what_remains_for_data_is_advised_where_it_is_not_asked_for_yet():
    with pytest.raises(InputError, match=r"set --config\.mesh\.data=-1 or sizes whose product is 8$"):
        sharding.make_mesh(MeshConfig(data=3))
    with pytest.raises(InputError, match=r"present; set sizes whose product is 8$"):
        sharding.make_mesh(MeshConfig(data=-1, fsdp=3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": 0}, "data must be a number of devices or -1"),
        ({"data": -1, "fsdp": -1}, "data and fsdp must not both be -1"),
        ({"rules": (("kernel", ("model",)),)}, r"rules must name the axes 'data', 'fsdp' or '', not \['model'\]"),
        ({"model_rules": (("kernel", ("fsdp",)),)}, r"model_rules must name the axes 'model' or '', not \['fsdp'\]"),
        ({"model": 0}, "model must be a number of devices, not 0"),
        ({"spatial": -1}, "spatial must be a number of devices, not -1"),
    ],
)
def test_mesh_settings_out_of_range_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**values)
