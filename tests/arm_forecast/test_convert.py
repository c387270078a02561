"""Published PixelCNN++ tensors: every one is placed, and nothing else passes."""

import re

import jax
import numpy as np
import pytest

from arm_forecast import convert
from bitsperdim import adopt, cli
from bitsperdim.errors import InputError


@pytest.fixture
def state(mixture):
    return dict(mixture.arrays["state"])


def test_effective_kernels_are_the_published_modules_own(mixture, state):
    params = convert.params_from_torch(state)
    effective = {name[4:]: array for name, array in mixture.arrays.items() if name.startswith("eff/")}
    kernels = lambda *path: params[path[0]][path[1]] if len(path) == 2 else params[path[0]][path[1]][path[2]]
    pairs = {
        "u_init.conv": (("stem", "u"), (2, 3, 1, 0)),
        "up_layers.2.ul_stream.0.conv_out.conv": (("up2", "ul0", "conv_out"), (2, 3, 1, 0)),
        "down_layers.1.u_stream.1.conv_input.conv": (("down1", "u1", "conv_in"), (2, 3, 1, 0)),
        "downsize_ul_stream.1.conv": (("downsize1", "ul"), (2, 3, 1, 0)),
        "upsize_u_stream.0.deconv": (("upsize1", "u"), (2, 3, 0, 1)),
        "upsize_ul_stream.1.deconv": (("upsize0", "ul"), (2, 3, 0, 1)),
    }
    for theirs, (path, axes) in pairs.items():
        expected = effective[f"{theirs}.weight"].transpose(axes)
        np.testing.assert_allclose(kernels(*path)["kernel"], expected, rtol=1e-5, atol=1e-7, err_msg=theirs)
        np.testing.assert_array_equal(kernels(*path)["bias"], effective[f"{theirs}.bias"])
    total = sum(array.size for array in effective.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == total


def test_the_network_is_read_off_the_tensors(state):
    config, channels = convert.network_from_torch(state)
    assert (config.resnets, config.filters, config.mixtures, config.output, channels) == (1, 8, 5, "dmol", 3)


def test_a_missing_unknown_or_misshapen_tensor_is_named(state):
    bias = state.pop("upsize_u_stream.1.deconv.bias")
    with pytest.raises(InputError, match=r"lacks the tensor 'upsize_u_stream.1.deconv.bias'"):
        convert.params_from_torch(state)
    state["upsize_u_stream.1.deconv.bias"] = bias[:5]
    with pytest.raises(InputError, match=r"'upsize_u_stream.1.deconv.bias' has the shape \(5,\), not \(8,\)"):
        convert.params_from_torch(state)
    state |= {"upsize_u_stream.1.deconv.bias": bias, "embedding.weight": bias}
    with pytest.raises(InputError, match=r"1 tensors that PixelCNN\+\+ has not, such as 'embedding.weight'"):
        convert.params_from_torch(state)
    with pytest.raises(InputError, match=r"lacks the tensor 'u_init.conv.weight_v'"):
        convert.params_from_torch({})


def test_outputs_that_fit_no_mixture_are_refused(state):
    state["nin_out.lin_a.weight_v"] = state["nin_out.lin_a.weight_v"][:48]
    with pytest.raises(InputError, match="48 outputs, which fit no mixture for 3 channels"):
        convert.network_from_torch(state)


V = "u_init.conv.weight_v"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: {V: v.ravel()}, r"'u_init\.conv\.weight_v' has the shape \(192,\), not one of 4 axes"),
        (lambda v: {"nin_out.lin_a.weight_v": np.float32(3)}, r"'nin_out\.lin_a\.weight_v' has the shape \(\)"),
        (lambda v: {V: np.full_like(v, np.nan)}, r"'u_init\.conv\.weight_v' holds 192 values that are not finite"),
        (lambda v: {V: np.zeros_like(v)}, r"'u_init\.conv\.weight_v' has a row of zeros"),
        (lambda v: {V: v.astype(np.int32)}, r"'u_init\.conv\.weight_v' holds int32, not real numbers"),
        (lambda v: {V: np.full(v.shape, "x")}, r"'u_init\.conv\.weight_v' holds <U1, not real numbers"),
        (lambda v: {V: v[:, :3]}, "fit no mixture for 2 channels"),
    ],
)
def test_tensors_that_are_no_weights_are_named(state, change, message):
    with pytest.raises(InputError, match=message):
        convert.params_from_torch(state | change(state[V]))


def test_a_file_without_resnets_is_refused(state):
    state = {name: value for name, value in state.items() if not name.startswith("up_layers.0.u_stream")}
    with pytest.raises(InputError, match=r"lacks the tensors 'up_layers\.0\.u_stream"):
        convert.network_from_torch(state)


def test_the_newer_names_of_weight_normalisation_are_read(state):
    newer = {
        re.sub("weight_([gv])", lambda m: f"parametrizations.weight.original{'gv'.index(m[1])}", name): value
        for name, value in state.items()
    }
    assert newer.keys() != state.keys()
    jax.tree.map(np.testing.assert_array_equal, convert.params_from_torch(newer), convert.params_from_torch(state))


@pytest.mark.parametrize("damage", ["cut short", "a bit turned", "another compression", "no zip file", "nothing"])
def test_a_damaged_file_is_refused_in_words_and_leaves_nothing(state, tmp_path, monkeypatch, capsys, damage):
    file = tmp_path / "weights.npz"
    np.savez_compressed(file, **state)
    written = bytearray(file.read_bytes())
    middle = len(written) // 2
    if damage == "cut short":
        written = written[:middle]
    elif damage == "a bit turned":
        written[middle] ^= 255
    elif damage == "another compression":
        written[written.index(b"PK\x01\x02") + 10] = 99  # a compression that there is not, in the first entry
    else:
        written = bytearray(b"hello" if damage == "no zip file" else b"")
    file.write_bytes(written)
    workdir = tmp_path / "run"
    flags = ["--family=arm_forecast", f"--checkpoint={file}", f"--workdir={workdir}", "--image_size=8"]
    monkeypatch.setattr("sys.argv", ["convert.py", *flags])
    with pytest.raises(SystemExit) as ended:
        cli.convert()
    assert ended.value.code == 2 and not workdir.exists()
    assert str(file) in capsys.readouterr().err


@pytest.mark.parametrize("exists", [False, True])
def test_what_fails_after_the_file_is_read_leaves_no_half_run(state, tmp_path, monkeypatch, exists):
    def killed(*_):
        raise KeyboardInterrupt

    file, workdir = tmp_path / "weights.npz", tmp_path / "run"
    np.savez(file, **state)
    if exists:
        workdir.mkdir()
    flags = ["--family=arm_forecast", f"--checkpoint={file}", f"--workdir={workdir}"]
    # 30 pixels are not divisible by the network's 4: told when the model is made.
    monkeypatch.setattr("sys.argv", ["convert.py", *flags, "--image_size=30"])
    with pytest.raises(SystemExit) as ended:
        cli.convert()
    assert ended.value.code == 2
    monkeypatch.setattr(adopt.trainer, "checkpoints_of", killed)
    monkeypatch.setattr("sys.argv", ["convert.py", *flags, "--image_size=8"])
    with pytest.raises(KeyboardInterrupt):
        cli.convert()
    assert workdir.exists() == exists and not (exists and list(workdir.iterdir()))
