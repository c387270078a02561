"""From an `ml_collections.ConfigDict` to frozen dataclasses, with every key checked by name before a device is touched.

Each module owns the dataclass of its own section; `unpack` checks and builds them. Not here: reading config files
(`config_files.py`) and flags (`cli.py`), and what may differ between two starts of one run (`run.py`).
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from bitsperdim.errors import InputError

T = TypeVar("T")


def unpack(values: Mapping[str, Any], kind: type[T], path: str = "") -> T:
    """`values` as an instance of the dataclass `kind`, sections and tuples included.

    An unknown, missing or ill-typed key raises `InputError` with its full path; so does a value that `kind` itself
    refuses (its `__post_init__` raises `ValueError("key must ..., not ...")`).
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in fields:
            raise unknown_key(_join(path, key), [_join(path, name) for name in fields])
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _checked(values[name], hints[name], _join(path, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InputError(f"the config lacks the key '{_join(path, name)}'")
    try:
        return kind(**arguments)
    except ValueError as error:
        raise InputError(f"config value {_join(path, str(error))}") from error


def unknown_key(key: str, valid: list[str]) -> InputError:
    """The error for a key that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.0)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return InputError(f"unknown key '{key}' in --config{hint}")


def flatten(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """('data.source', 'photos'), ... : every leaf of a nested config with its full path, in order."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, _join(path, key))
        else:
            yield _join(path, key), value


def path_of(section: Any, config: Any) -> str:
    """Where in a config one of its sections stands, such as 'top.train'; '' where it does not."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is section:
            return field.name
        if dataclasses.is_dataclass(value) and (path := path_of(section, value)):
            return f"{field.name}.{path}"
    return ""


def to_plain(value: Any) -> Any:
    """A config (dataclass, ConfigDict, tuple, ...) as dicts, lists and scalars: what `config.json` holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _checked(value: Any, hint: Any, path: str) -> Any:
    """`value` as the annotated type; an int is accepted where a float is asked, a bool is never a number."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InputError(f"'{path}' must be a section of the config, not {value!r}")
        return unpack(value, typing.cast(type, hint), path)
    if typing.get_origin(hint) is tuple:
        return _checked_tuple(value, typing.get_args(hint), path)
    if isinstance(hint, types.UnionType):
        section, *others = (kind for kind in typing.get_args(hint) if kind is not types.NoneType)
        if others or not dataclasses.is_dataclass(section):
            raise TypeError(f"{path}: a config field has one type, or is a section that may be None, not {hint}")
        return None if value is None else _checked(value, section, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and math.isnan(value):  # which would pass every comparison of its section
        raise InputError(f"config value {path} must be a number, not nan")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise InputError(f"'{path}' must be of type {hint.__name__}, not {type(value).__name__} ({value!r})")
    return value


def _checked_tuple(value: Any, kinds: tuple[Any, ...], path: str) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise InputError(f"'{path}' must be a tuple, not {value!r}")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    elif len(kinds) != len(value):
        raise InputError(f"'{path}' must have {len(kinds)} elements, not {len(value)} ({value!r})")
    return tuple(_checked(item, kind, f"{path}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True)))


def at_least(section: object, least: float, *keys: str) -> None:
    """For a section's `__post_init__`: ValueError naming the first of `keys` whose value is below `least`."""
    for key in keys:
        if not getattr(section, key) >= least:
            raise ValueError(f"{key} must be at least {least}, not {getattr(section, key)}")


def one_of(section: object, **choices: Iterable[str]) -> None:
    """For a section's `__post_init__`: ValueError naming the first key whose value is not among its choices."""
    for key, allowed in choices.items():
        allowed = tuple(allowed)
        if getattr(section, key) not in allowed:
            names = ", ".join(choice or "''" for choice in allowed)
            raise ValueError(f"{key} must be one of {names}, not '{getattr(section, key)}'")
