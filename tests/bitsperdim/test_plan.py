"""What a run will take, before it runs: against the state and the program that the run would have."""

import pytest

from bitsperdim import config_files, plan
from bitsperdim.data import DataConfig
from bitsperdim.errors import InputError
from bitsperdim.plan import Chip

GIB = 2**30
ROOMY = Chip(flops=1e15, memory=80 * GIB, link=1e11)


@pytest.fixture(scope="module")
def record():
    """Of a prior of codes that nobody has extracted, its weights over four devices."""
    values = config_files.load("vqvae2_cifar10:tiny")
    values.mesh = {"data": -1, "fsdp": 4, "smallest": 0}
    (found,) = plan.plan(values, "bottom")
    return found


def test_a_plan_counts_what_a_run_would_hold(record):
    assert record["devices"] == {"data": 2, "fsdp": 4}
    held, whole = record["bytes"], 4 * record["parameters"]
    assert whole / 4 <= held["weights"] < whole / 2
    assert held["average"] == held["weights"]
    assert 2 * held["weights"] <= held["optimizer"] < 2.1 * held["weights"]
    assert held["temporary"] > 0
    # 8x8 and 4x4 codes, a label and a position, int32, of two of the 16 examples
    assert held["batch"] == 4 * 2 * (64 + 16 + 1 + 1)


def test_a_plan_counts_arithmetic_and_traffic(record):
    # Every weight of the prior is met at every one of 64 cells, forward and twice backward; conditioning has 16.
    at_most = 6 * record["parameters"] * 64 * record["batch_size"]
    assert at_most / 10 < record["flops"] < 2 * at_most
    # Sharded weights are gathered, gradients of all weights are summed, and no activations are sent around: they would
    # be ten times as much.
    whole, kinds = 4 * record["parameters"], record["traffic"]
    assert 0.9 * whole < kinds["all-gather"]["bytes"] <= whole
    assert whole <= kinds["all-reduce"]["bytes"] < 1.3 * whole
    assert sum(kind["bytes"] for kind in kinds.values()) < 2.3 * whole


def test_seconds_are_arithmetic_and_traffic(record):
    record = record | {"flops": int(8e15), "traffic": {"all-gather": {"bytes": 8 * 10**9, "count": 1}}}
    times = plan.on_chip(record, ROOMY)
    assert times["arithmetic"] == pytest.approx(1.0 / 0.4)
    assert times["traffic"] == pytest.approx(0.07)
    assert times["step"] == pytest.approx(2.57)


def test_what_fits_and_what_does_not(record):
    assert "  fits: " in plan.lines(record, ROOMY, "roomy")[-1]
    assert plan.lines(record, None, "")[-1].startswith("  traffic")
    held = record["bytes"] | {"weights": 30 * GIB, "temporary": 5 * GIB}
    text = "\n".join(plan.lines(record | {"bytes": held}, Chip(1e15, 30 * GIB, 1e11), "small"))
    assert "does NOT fit" in text
    assert "--config.mesh.fsdp=8" in text
    assert "--config.bottom.model.remat=true or --config.bottom.train.accumulation=2" in text


def test_weak_scaling_is_the_time_of_one_device_over_that_of_all(benchmark):
    devices = benchmark("devices")
    one = {"count": 1, "devices": {"data": 1}, "flops": 2.75e14, "product_bytes": 1.2e12, "traffic": {}}
    moved = {"all-reduce": {"bytes": 64 * 150e9 / 63, "count": 1}}
    all_of_it = {"count": 64, "devices": {"data": 64}, "flops": 64 * 2.75e14, "product_bytes": 0, "traffic": moved}
    # 2.5 s of arithmetic, which hide 1.25 s of memory traffic; then a second of sums, twice 150 GB at 300 GB/s.
    assert devices.seconds(all_of_it, one, "v4") == pytest.approx((2.5, 1.0))
    assert devices.efficiency(all_of_it, one, "v4") == pytest.approx((2.5 / 3.5, 1.0))


def test_chips():
    assert plan.chip("h100").memory == 80 * GIB
    assert plan.chip("100:16:50") == Chip(1e14, 16 * GIB, 5e10)
    for wrong in ("h200x", "1:2", "1:0:3", "1:nan:3"):
        with pytest.raises(InputError, match=r"chip must be v3, v4, .* or figures as TFLOPS:GIB:GB_PER_SECOND"):
            plan.chip(wrong)


@pytest.mark.parametrize(
    ("config", "shape", "levels", "classes"),
    [
        (DataConfig(source="tfds", name="imagenet2012", image_size=256), (256, 256, 3), 256, 1000),
        (DataConfig(source="tfds", name="cifar10", bits=5), (32, 32, 3), 32, 10),
        (DataConfig(source="tfds", name="binarized_mnist"), (28, 28, 1), 2, 0),
        (DataConfig(source="tfds", name="mnist", binarize="dynamic"), (28, 28, 1), 2, 10),
        (DataConfig(source="folder", path="nowhere", image_height=24, image_width=40), (24, 40, 3), 256, 0),
    ],
)
def test_images_need_not_be_at_hand(config, shape, levels, classes, tmp_path):
    from bitsperdim import data

    config = plan.stand_in(config)
    source = data.open_source(config, "train")
    assert (source.shape, source.levels, source.num_classes) == (shape, levels, classes)


def test_what_nobody_knows_is_asked_for(tmp_path):
    with pytest.raises(InputError, match=r"images of imagenet2012 have no size of their own; set data\.image_size"):
        plan.stand_in(DataConfig(source="tfds", name="imagenet2012", data_dir=str(tmp_path)))
    with pytest.raises(InputError, match="data set 'of_mine' is not in"):
        plan.stand_in(DataConfig(source="tfds", name="of_mine", data_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "stage", "changes", "message"),
    [
        ("vqvae2_photos", "top", {"top.train.batch_size": 12}, r"^top\.train\.batch_size=12 .* use a multiple of 8$"),
        (
            "vdvae_digits",
            "model",
            {"train.accumulation": 4},
            r"^train\.batch_size=16 in 4 .* use --config\.train\.accumulation=2 or a multiple of 32$",
        ),
        ("vqvae2_photos", "codes", {}, "^stage 'codes' trains no model, so there is nothing to plan$"),
    ],
)
def test_what_would_not_be_trained_is_not_planned(name, stage, changes, message):
    values = config_files.load(f"{name}:tiny")
    values.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=message):
        list(plan.plan(values, stage))


def test_devices_in_use_are_not_taken():
    with pytest.raises(InputError, match=r"devices are in use already .*; plan in a process of its own"):
        plan.use_devices(64)
