"""Published PixelCNN++ tensors: every one is placed, and nothing else passes."""

import jax
import numpy as np
import pytest

from arm_forecast import convert
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
