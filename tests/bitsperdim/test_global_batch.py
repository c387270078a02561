"""A process that holds all devices hands its batch over in one call; the way of many processes gives the same."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bitsperdim import data


@pytest.mark.parametrize(
    ("shape", "spec"),
    [((8, 1), P(("data", "fsdp"))), ((2, 4), P(("data", "fsdp"))), ((4, 2), P("data")), ((1, 1), P("data"))],
    ids=["8 devices", "2 x 4", "rows held twice", "one device"],
)
def test_both_ways_give_the_same_arrays_on_the_same_devices(sub_mesh, assert_same_bits, monkeypatch, shape, spec):
    sharding = NamedSharding(sub_mesh(*shape), spec)
    source = data.open_source(data.DataConfig("digits"), "evaluation")
    assert sharding.is_fully_addressable
    make = {
        "train": lambda: [data.train_batch(source, 3, 7, 16, sharding)],
        "evaluation": lambda: list(data.evaluation_batches(source, 56, sharding)),  # the last one is padded
    }
    whole = {name: build() for name, build in make.items()}
    used = []
    one_host = data._from_this_host
    monkeypatch.setattr(data, "_global_batch", lambda *given: used.append(1) or one_host(*given))
    for name, build in make.items():
        for ours, theirs in zip(build(), whole[name], strict=True):
            assert_same_bits(ours, theirs)
            for field, array in theirs.items():
                assert ours[field].sharding == array.sharding == sharding
                pieces = functools.partial(sorted, key=lambda shard: shard.device.id)
                for a, b in zip(pieces(ours[field].addressable_shards), pieces(array.addressable_shards), strict=True):
                    assert a.device == b.device and a.index == b.index
                    np.testing.assert_array_equal(a.data, b.data)
    assert len(used) == 1 + 7


def test_the_batch_is_that_of_the_source(sub_mesh):
    sharding = NamedSharding(sub_mesh(8), P(("data", "fsdp")))
    source = data.open_source(data.DataConfig("digits"), "train")
    batch = jax.device_get(data.train_batch(source, 3, 7, 16, sharding))
    indices = data.train_indices(source.size, 3, 7 * 16, 16)
    for name, values in source.read(indices).items():
        np.testing.assert_array_equal(batch[name], values)
    np.testing.assert_array_equal(batch["position"], np.arange(16))
