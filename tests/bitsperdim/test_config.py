"""Configs as people mistype them: every wrong key is named in full, before a device is touched."""

import dataclasses
import json
import math

import pytest

from bitsperdim import config as config_lib
from bitsperdim.errors import InputError


@dataclasses.dataclass(frozen=True)
class Optim:
    learning_rate: float
    name: str = "adam"
    nesterov: bool = False

    def __post_init__(self):
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate must be positive, not {self.learning_rate}")


@dataclasses.dataclass(frozen=True)
class Model:
    strides: tuple[int, ...] = (4, 2)
    range: tuple[float, float] = (0.0, 1.0)
    rules: tuple[tuple[str, tuple[str, ...]], ...] = (("kernel$", ("fsdp",)),)


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int
    optim: Optim
    model: Model = dataclasses.field(default_factory=Model)


GOOD = {"seed": 3, "optim": {"learning_rate": 0.1}, "model": {"strides": (2, 2, 2)}}


def replaced(key, value):
    values = json.loads(json.dumps(GOOD))
    *sections, name = key.split(".")
    section = values
    for part in sections:
        section = section[part]
    section[name] = value
    return values


def refusal(values):
    with pytest.raises(InputError) as caught:
        config_lib.unpack(values, Config)
    return str(caught.value)


def test_given_values_are_taken_and_the_rest_are_the_defaults():
    expected = Config(3, Optim(0.1, "adam", False), Model((2, 2, 2), (0.0, 1.0), (("kernel$", ("fsdp",)),)))
    assert config_lib.unpack(GOOD, Config) == expected


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optim.lerning_rate", "optim.learning_rate"),
        ("optim.nestrov", "optim.nesterov"),
        ("model.stride", "model.strides"),
        ("sead", "seed"),
    ],
)
def test_an_unknown_key_is_named_in_full_with_the_nearest_valid_one(key, nearest):
    assert refusal(replaced(key, 1)) == f"unknown key '{key}' in --config; did you mean '{nearest}'?"


@pytest.mark.parametrize("key", ["seed", "optim", "optim.learning_rate"])
def test_a_missing_key_is_named_in_full(key):
    values = replaced(key, None)
    section = values if "." not in key else values["optim"]
    del section[key.split(".")[-1]]
    assert refusal(values) == f"the config lacks the key '{key}'"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", "3", "'seed' must be of type int, not str ('3')"),
        ("seed", 3.0, "'seed' must be of type int, not float (3.0)"),
        ("seed", True, "'seed' must be of type int, not bool (True)"),
        ("seed", None, "'seed' must be of type int, not NoneType (None)"),
        ("optim.learning_rate", True, "'optim.learning_rate' must be of type float, not bool (True)"),
        ("optim.nesterov", 1, "'optim.nesterov' must be of type bool, not int (1)"),
        ("optim.name", 5, "'optim.name' must be of type str, not int (5)"),
        ("optim", "adam", "'optim' must be a section of the config, not 'adam'"),
        ("model.strides", 4, "'model.strides' must be a tuple, not 4"),
        ("model.strides", "42", "'model.strides' must be a tuple, not '42'"),
        ("model.strides", (4, 2.5), "'model.strides[1]' must be of type int, not float (2.5)"),
        ("model.range", (0.0, "1"), "'model.range[1]' must be of type float, not str ('1')"),
        ("model.range", (0.0,), "'model.range' must have 2 elements, not 1 ((0.0,))"),
        ("model.rules", (("kernel$", "fsdp"),), "'model.rules[0][1]' must be a tuple, not 'fsdp'"),
        ("model.rules", (("kernel$", (1,)),), "'model.rules[0][1][0]' must be of type str, not int (1)"),
    ],
)
def test_a_value_of_another_type_is_named_down_to_the_element_of_a_tuple(key, value, message):
    assert refusal(replaced(key, value)) == message


@pytest.mark.parametrize("key", ["optim.learning_rate", "model.range"])
def test_what_is_not_a_number_is_refused_where_one_is_asked(key):
    nan = math.nan if key == "optim.learning_rate" else (0.0, math.nan)
    where = key if key == "optim.learning_rate" else f"{key}[1]"
    assert refusal(replaced(key, nan)) == f"config value {where} must be a number, not nan"


def test_an_infinite_value_is_left_to_its_section():
    assert config_lib.unpack(replaced("optim.learning_rate", math.inf), Config).optim.learning_rate == math.inf


def test_an_integer_is_a_number_where_a_float_is_asked():
    values = replaced("model.range", [0, 1])
    values["optim"]["learning_rate"] = 2
    config = config_lib.unpack(values, Config)
    assert [type(value) for value in (config.optim.learning_rate, *config.model.range)] == [float] * 3


def test_a_value_out_of_range_is_named_in_full():
    assert refusal(replaced("optim.learning_rate", -1.0)) == (
        "config value optim.learning_rate must be positive, not -1.0"
    )


def test_a_config_survives_json():
    config = config_lib.unpack(GOOD, Config)
    assert config_lib.unpack(json.loads(json.dumps(config_lib.to_plain(config))), Config) == config


def test_flatten_names_every_leaf_once():
    assert list(config_lib.flatten(GOOD)) == [("seed", 3), ("optim.learning_rate", 0.1), ("model.strides", (2, 2, 2))]
