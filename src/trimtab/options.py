"""One source for what a user can set: a frozen dataclass whose fields carry their help.

YAML keys, command-line flags and saved configurations are all made from it, here. Imports no torch, so
that `--help` stays fast.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from trimtab.errors import UsageError, did_you_mean, problems_to_error

T = TypeVar("T")

LARGEST = 2**63
"""A whole number is smaller: seeds and sizes are kept in 64 bits."""


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    factory: Any = dataclasses.MISSING,
    positional: bool = False,
    least: float | None = None,
) -> Any:
    """A dataclass field with its help text. Without a default the user must give it.

    positional: on the command line it is given by its place and not by a flag. least: what a number must be at least.
    """
    about = {"help": help, "positional": positional, "least": least}
    return dataclasses.field(default=default, default_factory=factory, metadata=about)


def type_name(kind: Any) -> str:
    """How a type is written for a user: 'a whole number', 'one of a, b', 'a list of text'."""
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}
    if kind in names:
        return names[kind]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in args if a is not type(None))
    if origin is tuple:
        return "a list of " + type_name(args[0])
    if origin is dict or origin is Mapping:
        return f"a mapping of text to {type_name(args[1])}"
    return str(getattr(kind, "__name__", kind))


def convert(value: Any, kind: Any) -> Any:
    """`value`, from YAML, JSON or Python, as the field type `kind`; ValueError when it is anything else, OverflowError
    for a whole number of more than 64 bits.

    Text is read as a number only where the field is one; nothing else is coerced.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        for arm in (a for a in args if a is not type(None)):
            try:
                return convert(value, arm)
            except ValueError:
                continue
        raise ValueError
    if origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
        raise ValueError
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ValueError
        return tuple(convert(item, args[0]) for item in items)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError
        return {str(k): convert(v, args[1]) for k, v in value.items()}
    return _convert_plain(value, kind)


def _convert_plain(value: Any, kind: Any) -> Any:
    if kind is bool:
        words = {"true": True, "false": False}
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        if isinstance(value, bool):
            return value
        raise ValueError
    if isinstance(value, bool):
        raise ValueError
    if kind is int:
        if not isinstance(value, str | int) and not (isinstance(value, float) and value.is_integer()):
            raise ValueError
        if abs(int(value)) >= LARGEST:
            raise OverflowError
        return int(value)
    if kind is float and isinstance(value, str | int | float):
        number = float(value)
        if math.isnan(number):
            raise ValueError
        return number
    if kind is str and isinstance(value, str):
        return value
    if kind is Any:
        return value
    raise ValueError


def from_mapping(cls: type[T], mapping: Mapping[str, Any], what: str) -> T:
    """Build `cls` from keys and values. Every unknown key, wrong type and missing value is named at once.

    what: how the mapping is called in messages, such as a file's name.
    """
    values, problems = read_mapping(cls, mapping)
    problems_to_error(problems, what)
    return cls(**values)


def read_mapping(cls: type, mapping: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The converted values of `mapping` for the dataclass `cls`, and the list of what is wrong with it."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    problems = []
    for key, value in mapping.items():
        name = key.replace("-", "_")
        if name not in fields:
            problems.append(f"unknown key '{key}'{did_you_mean_option(name, helps(cls))}")
            continue
        try:
            values[name] = convert(value, hints[name])
        except OverflowError:
            problems.append(f"{key} is {value!r}, but must be below 2^63")
        except ValueError:
            problems.append(f"{key} is {value!r}, but must be {type_name(hints[name])}")
        else:
            least = fields[name].metadata.get("least")
            if least is not None and values[name] is not None and values[name] < least:
                problems.append(f"{key} is {value}, but must be at least {least}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in mapping and name.replace("_", "-") not in mapping:
            problems.append(f"'{name}' is missing ({type_name(hints[name])})")
    return values, problems


def helps(cls: type) -> dict[str, str]:
    """The help of each field of a dataclass."""
    return {field.name: field.metadata.get("help", "") for field in dataclasses.fields(cls)}


def did_you_mean_option(wrong: str, known: Mapping[str, str]) -> str:
    """'; did you mean X?' for the option that `wrong` describes, or else that it is spelt like; '' for none.

    known: the help of each option. learning_rate describes lr, whose help begins with those words.
    """
    words = " ".join(wrong.replace("_", " ").replace("-", " ").lower().split())
    described = [name for name, text in known.items() if words and text.lower().startswith(words)]
    return f"; did you mean {' or '.join(described)}?" if described else did_you_mean(wrong, known)


def to_mapping(options: Any) -> dict[str, Any]:
    """The fields of a dataclass as plain JSON and YAML values, in their order."""
    return {f.name: _plain(getattr(options, f.name)) for f in dataclasses.fields(options)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file. Numbers such as 2e-4, which plain YAML reads as text, are numbers."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        raise UsageError(f"{path} is empty, but must hold keys and values")
    if not isinstance(content, dict):
        what = "a list" if isinstance(content, list) else f"{content!r}"
        raise UsageError(f"{path} must hold keys and values, but holds {what}")
    return {str(k): v for k, v in content.items()}
