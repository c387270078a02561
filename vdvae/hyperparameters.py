"""Configs of released checkpoints, from the hyper-parameters that are saved beside them.

Efficient-VDVAE saves `logs-RUN/hparams-RUN.cfg`: sections of Python literals such as `[48] * 11 + [96]`. VDVAE's log,
in lines of JSON, begins with its hyper-parameters. Keys that change what is computed are read or must have the value
that all released ones have; an unknown one is refused by name. Not here: the arrays (`convert.py`).
"""

import ast
import configparser
import json
import operator
import pathlib
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from bitsperdim import config_files
from bitsperdim.errors import InputError
from vdvae.levels import from_block_strings

Values = dict[str, Any]  # 'model.up_strides' -> [1, 2, ...]
# Of Efficient-VDVAE: what is read, and what must be as in all released files.
READ = (
    *(f"data.{key}" for key in ("dataset_source", "target_res", "channels", "num_bits", "random_horizontal_flip")),
    *(f"model.{key}" for key in ("stable_init", "initialize_prior_weights_as_zero", "use_residual_distribution")),
    *("model.distribution_base", "model.output_distribution_base", "model.num_output_mixtures"),
    *("model.gradient_smoothing_beta", "model.output_gradient_smoothing_beta", "model.input_conv_filters"),
    *(f"model.up_{key}" for key in ("strides", "n_blocks_per_res", "n_blocks", "filters", "mid_filters_ratio")),
    *("model.up_kernel_size", "model.up_skip_filters"),
    *(f"model.down_{key}" for key in ("strides", "n_blocks_per_res", "n_blocks", "filters", "mid_filters_ratio")),
    *("model.down_kernel_size", "model.down_latent_variates"),
    *("loss.min_mol_logscale", "loss.variation_schedule", "loss.vae_beta_anneal_start", "loss.vae_beta_anneal_steps"),
    *("loss.vae_beta_min", "loss.use_gamma_schedule", "loss.gamma_max_steps", "loss.use_weight_decay"),
    "loss.l2_weight",
    *(f"optimizer.{key}" for key in ("type", "learning_rate_scheme", "learning_rate", "warmup_steps", "decay_steps")),
    *(f"optimizer.{key}" for key in ("decay_start", "min_learning_rate", "beta1", "beta2", "epsilon")),
    *("optimizer.clip_gradient_norm", "optimizer.gradient_clip_norm_value", "optimizer.gradient_skip"),
    *("optimizer.gradient_skip_threshold", "train.batch_size", "train.ema_decay"),
)
FIXED: dict[str, tuple[Any, ...]] = {
    "model.use_1x1_conv": (True,),
    "model.input_kernel_size": ((1, 1), [1, 1], 1),
    "model.output_kernel_size": ((1, 1), [1, 1], 1),
    "loss.scaled_gamma": (True,),
}
WORDS = (
    *("data.dataset_source", "model.distribution_base", "model.output_distribution_base", "loss.variation_schedule"),
    *("optimizer.type", "optimizer.learning_rate_scheme"),
)
SWITCHES = (
    *("data.random_horizontal_flip", "model.stable_init", "model.initialize_prior_weights_as_zero"),
    *("model.use_residual_distribution", "loss.use_gamma_schedule", "loss.use_weight_decay"),
    *("optimizer.clip_gradient_norm", "optimizer.gradient_skip"),
)
OF_CELLS = ("model.up_n_layers", "model.down_n_layers")  # 2 throughout
# Of no effect on the model or its training here: places, machines, other schedules, and how often something is done.
UNUSED = (
    *("data.train_data_path", "data.val_data_path", "data.synthesis_data_path", "train.total_train_steps"),
    *("loss.vae_beta_activation_steps", "loss.vae_beta_growth_rate", "optimizer.decay_rate", "train.resume_from_ema"),
    *("train.logging_interval_in_steps", "train.checkpoint_and_eval_interval_in_steps"),
)
UNUSED_SECTIONS = ("run", "metrics", "init", "val", "synthesis")
LONGEST = 10_000  # elements of a list
# VDVAE's: those that change what is computed.
OF_BASELINE = (
    *("dataset", "dec_blocks", "enc_blocks", "width", "custom_width_str", "zdim", "bottleneck_multiple"),
    *("no_bias_above", "num_mixtures", "n_batch", "mpi_size", "ema_rate", "grad_clip", "skip_threshold", "lr", "wd"),
    *("adam_beta1", "adam_beta2", "warmup_iters"),
)
WORDS_OF_BASELINE = ("dataset", "dec_blocks", "enc_blocks", "custom_width_str")


def read_cfg(path: pathlib.Path) -> Values:
    """The hyper-parameters of an Efficient-VDVAE run. Raises InputError where one is missing, unknown or no literal."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (configparser.Error, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} is no file of hyper-parameters ({str(error).splitlines()[0]})") from error
    found = {
        f"{section}.{key}": _literal(text, f"{section}.{key}", path)
        for section in parser.sections()
        if section not in UNUSED_SECTIONS
        for key, text in parser.items(section)
    }
    known = {*READ, *FIXED, *OF_CELLS, *UNUSED}
    if unknown := sorted(found.keys() - known):
        raise InputError(f"{path} has the unknown hyper-parameter '{unknown[0]}'; what it changes is not known here")
    if missing := [key for key in (*READ, *FIXED, *OF_CELLS) if key not in found]:
        raise InputError(f"{path} lacks the hyper-parameter '{missing[0]}'")
    for key in READ:
        if not _is_of_kind(key, found[key]):
            raise InputError(f"{path}: '{key}' is {found[key]!r}, which is not of its kind")
    expected = FIXED | {key: ([2] * len(found[key]),) for key in OF_CELLS if isinstance(found[key], list)}
    for key, values in expected.items():
        if found[key] not in values:
            raise InputError(
                f"{path}: '{key}' is {found[key]!r}; only {values[0]!r}, as in all released runs, is known"
            )
    return found


def _is_of_kind(key: str, value: Any) -> bool:
    if key in WORDS:
        return value is None or isinstance(value, str)
    if key in SWITCHES:
        return isinstance(value, bool)
    if key.startswith(("model.up_", "model.down_")):
        return isinstance(value, list) and value != [] and all(map(_is_number, value))
    return _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _literal(text: str, key: str, path: pathlib.Path) -> Any:
    """A Python literal with sums and products, such as '[48] * 11 + [96]'; a bare word is a string. Nothing is run."""
    operations: dict[type, Callable[[Any, Any], Any]] = {ast.Add: operator.add, ast.Mult: operator.mul}

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, ast.List | ast.Tuple):
            items = [value(item) for item in node.elts]
            return items if isinstance(node, ast.List) else tuple(items)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in operations:
            left, right = value(node.left), value(node.right)
            sizes = [x if isinstance(x, int) else len(x) for x in (left, right) if isinstance(x, int | list | tuple)]
            if isinstance(node.op, ast.Mult) and len(sizes) == 2 and sizes[0] * sizes[1] > LONGEST:
                raise ValueError("too long")
            return operations[type(node.op)](left, right)
        raise ValueError("neither a literal nor a sum or product of literals")

    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: '{key}' is no value: {text.strip()[:60]!r} ({error})") from error


def efficient(values: Values, path: pathlib.Path, decays: bool) -> ConfigDict:
    """The config of an Efficient-VDVAE run; `decays`: its weights did, as in the released JAX code alone."""
    config = _data_of(values, path)
    config.model = ConfigDict(_hierarchy(values, path) | _distributions(values, path))
    loss = lambda key: values[f"loss.{key}"]
    schedule = loss("variation_schedule")
    if schedule not in ("Linear", "None", None):
        raise InputError(f"{path}: 'loss.variation_schedule' is {schedule!r}; known are 'Linear' and 'None'")
    warms = schedule == "Linear"
    config.objective = ConfigDict(
        {
            "kl_start": loss("vae_beta_anneal_start"),
            "kl_steps": loss("vae_beta_anneal_steps") if warms else 0,
            "kl_least": loss("vae_beta_min"),
            "gamma_steps": loss("gamma_max_steps") if loss("use_gamma_schedule") else 0,
        }
    )
    _set_optimizer(config, values, path, loss("l2_weight") if decays and loss("use_weight_decay") else 0.0)
    return config


def _data_of(values: Values, path: pathlib.Path) -> ConfigDict:
    """The published config of the data set, for its data and temperatures."""
    data = lambda key: values[f"data.{key}"]
    edge, source = data("target_res"), data("dataset_source")
    large = "vdvae_faces1024:" if edge == 1024 else ""
    names = {
        "cifar-10": "vdvae_cifar10:released",
        "binarized_mnist": "vdvae_binary_mnist:released",
        "imagenet": f"vdvae_imagenet{edge}:released" if edge in (32, 64) else "vdvae_folder",
        "celebA": "vdvae_celeba64:released",
        "celebAHQ": f"{large}celebahq" if large else "vdvae_celebahq256:released_8bit",
        "ffhq": f"{large}ffhq" if large else "vdvae_ffhq256:released_8bit",
    }
    config: Any = config_files.load(names.get(source, "vdvae_folder"))
    if source == "binarized_mnist":
        return config
    bits = data("num_bits")
    if bits not in range(1, 9):
        raise InputError(f"{path}: 'data.num_bits' is {bits!r}, not 1 to 8")
    config.data.update({"image_size": edge, "bits": int(bits)})
    if data("channels") != 3:
        config.data.channels = data("channels")
    return config


def _hierarchy(values: Values, path: pathlib.Path) -> Values:
    """The levels: entries of one grid whose layers are alike become one, as long as at most one skip connection is
    shared and further bottom-up blocks come before the first of them."""
    count = len(values["model.down_strides"])
    names = [key for key in READ if key.startswith(("model.up_", "model.down_"))]
    for name in names:
        if len(values[name]) != count:
            raise InputError(f"{path}: '{name}' must be a list of {count} values as 'model.down_strides'")
    down = lambda key: values[f"model.down_{key}"]
    up = lambda key: values[f"model.up_{key}"][::-1]
    widths = [values["model.input_conv_filters"], *values["model.up_filters"][:-1]][::-1]
    both = {"strides": up("strides"), "filters": widths, "kernel_size": up("kernel_size")}
    both |= {"n_blocks": up("n_blocks"), "mid_filters_ratio": up("mid_filters_ratio")}
    for key, of_up in both.items():
        if of_up != down(key):
            raise InputError(f"{path}: 'model.up_{key}' must be the reverse of 'model.down_{key}'")
    found: list[Values] = []
    last_up = 0
    for i in range(count):
        entry = {
            "widths": down("filters")[i],
            "bottlenecks": float(down("mid_filters_ratio")[i]),
            "kernels": down("kernel_size")[i],
            "latents": down("latent_variates")[i],
            "cells": down("n_blocks")[i],
            "skip_widths": up("skip_filters")[i],
        }
        further_down, further_up = down("n_blocks_per_res")[i], up("n_blocks_per_res")[i]
        level = found[-1] if found else {}
        alike = all(level.get(key) == value for key, value in entry.items())
        if down("strides")[i] > 1 or not alike or last_up or (further_down and level["layers"] > level["skips"]):
            level = entry | {"strides": down("strides")[i], "layers": 0, "skips": 0, "blocks": 0, "shared": 0}
            found.append(level)
        if further_down:
            level["shared"] = level["skips"]
        level["layers"] += 1 + further_down
        level["skips"] += 1
        level["blocks"] += 1 + further_up
        last_up = further_up
    return {key: tuple(level[key] for level in found) for key in found[0]}


def _distributions(values: Values, path: pathlib.Path) -> Values:
    model = lambda key: values[f"model.{key}"]
    bases = {"std": "std", "logstd": "log_std"}
    for key in ("distribution_base", "output_distribution_base"):
        if model(key) not in bases:
            raise InputError(f"{path}: 'model.{key}' is {model(key)!r}; known are 'std' and 'logstd'")
    is_binary = values["data.dataset_source"] == "binarized_mnist"
    return {
        "scale_last_convolutions": model("stable_init"),
        "zero_prior": model("initialize_prior_weights_as_zero"),
        "residual_posterior": model("use_residual_distribution"),
        "latent": bases[model("distribution_base")],
        "latent_beta": float(model("gradient_smoothing_beta")),
        "output": "bernoulli" if is_binary else "logistic_mixture",
        "output_scale": bases[model("output_distribution_base")],
        "output_beta": float(model("output_gradient_smoothing_beta")),
        "mixtures": model("num_output_mixtures"),
        "min_log_scale": float(values["loss.min_mol_logscale"]),
        "flip": values["data.random_horizontal_flip"] and not is_binary,
    }


def _set_optimizer(config: Any, values: Values, path: pathlib.Path, weight_decay: float) -> None:
    of = lambda key: values[f"optimizer.{key}"]
    if of("type") not in ("Adamax", "Adam"):
        raise InputError(f"{path}: 'optimizer.type' is {of('type')!r}; known are 'Adamax' and 'Adam'")
    if of("learning_rate_scheme") not in ("cosine", "constant"):
        raise InputError(f"{path}: 'optimizer.learning_rate_scheme' is not known: {of('learning_rate_scheme')!r}")
    config.optim.update(
        {
            "name": "adamax" if of("type") == "Adamax" else "adamw",
            "learning_rate": of("learning_rate"),
            "schedule": of("learning_rate_scheme"),
            "warmup_steps": int(of("warmup_steps")),
            "cosine_start": int(of("decay_start")),
            "cosine_steps": int(of("decay_steps")),
            "final_fraction": of("min_learning_rate") / of("learning_rate"),
            "b1": of("beta1"),
            "b2": of("beta2"),
            "eps": of("epsilon"),
            "weight_decay": weight_decay,
        }
    )
    config.train.update(
        {
            "batch_size": values["train.batch_size"],
            "clip_norm": float(of("gradient_clip_norm_value")) if of("clip_gradient_norm") else 0.0,
            "skip_norm": float(of("gradient_skip_threshold")) if of("gradient_skip") else 0.0,
            "ema_decay": values["train.ema_decay"],
            "ema_ramp": False,
        }
    )


def read_log(path: pathlib.Path) -> tuple[Values, int]:
    """The hyper-parameters of a VDVAE run and its last step, from its log. Raises InputError where some are missing."""
    found: Values = {}
    step = number = 0
    try:
        for line in path.read_text().splitlines():
            number += 1
            entry = json.loads(line)
            if entry.get("type") == "hparam":
                found[entry["key"]] = entry["value"]
            elif entry.get("type") == "train_loss":
                step = max(step, int(entry["step"]))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise InputError(f"{path} is no log of VDVAE: line {number} ({error})") from error
    if missing := [key for key in OF_BASELINE if key not in found]:
        raise InputError(f"{path} lacks the hyper-parameter '{missing[0]}'")
    for key in OF_BASELINE:
        if not (isinstance(found[key], str) if key in WORDS_OF_BASELINE else _is_number(found[key])):
            raise InputError(f"{path}: '{key}' is {found[key]!r}, which is not of its kind")
    return found, step


def baseline(values: Values, path: pathlib.Path) -> ConfigDict:
    """The config of a VDVAE run."""
    names = {
        "cifar10": "vdvae_cifar10",
        "imagenet32": "vdvae_imagenet32",
        "imagenet64": "vdvae_imagenet64",
        "ffhq_256": "vdvae_ffhq256",
        "ffhq_1024": "vdvae_faces1024",
    }
    if values["dataset"] not in names:
        raise InputError(f"{path}: 'dataset' is {values['dataset']!r}; known are {', '.join(names)}")
    config: Any = config_files.load(f"{names[values['dataset']]}:vdvae")
    try:
        pairs = [part.split(":") for part in values["custom_width_str"].split(",") if part]
        widths = {int(edge): int(width) for edge, width in pairs}
    except ValueError as error:
        raise InputError(
            f"{path}: 'custom_width_str' is no list of EDGE:WIDTH: {values['custom_width_str']!r}"
        ) from error
    sizes = {"width": values["width"], "latent": values["zdim"], "bottleneck": float(values["bottleneck_multiple"])}
    config.model.update(from_block_strings(values["dec_blocks"], values["enc_blocks"], **sizes, widths=widths))
    config.model.update({"mixtures": values["num_mixtures"], "constants_up_to": values["no_bias_above"]})
    rate = {"learning_rate": values["lr"], "warmup_steps": int(values["warmup_iters"]), "weight_decay": values["wd"]}
    config.optim.update(rate | {"b1": values["adam_beta1"], "b2": values["adam_beta2"]})
    config.train.update(
        {
            "batch_size": values["n_batch"] * values["mpi_size"],
            "clip_norm": float(values["grad_clip"]),
            "skip_norm": max(float(values["skip_threshold"]), 0.0),  # -1: none
            "ema_decay": values["ema_rate"],
            "ema_ramp": False,
        }
    )
    return config
