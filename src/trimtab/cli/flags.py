"""Command-line flags made from dataclasses: one field, one flag, the same checks as in YAML."""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

from trimtab.errors import UsageError
from trimtab.options import did_you_mean_option, type_name


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def parse(
    command: str,
    summary: str,
    groups: Sequence[tuple[str, type]],
    argv: Sequence[str],
    notes: str = "",
    refused: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The values given on the command line, by field name, unconverted; prints the help and exits on --help.

    groups: a title and a dataclass each. Fields that were not given are absent, so that a recipe file can
    supply them. A flag of several values takes them at once or is given again, and takes one at a time where
    the command has arguments without a flag. refused: why a flag that is not among them is not. UsageError for an
    unknown flag, naming the nearest known ones.
    """
    parser = _Parser(
        f"trimtab {command}", description=summary, epilog=notes, allow_abbrev=False, usage=_usage(command, groups),
        formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    placed = any(_is_placed(field) for _, cls in groups for field in dataclasses.fields(cls))
    flags: dict[str, str] = {}
    for title, cls in groups:
        group = parser.add_argument_group(title)
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            name = _add(group, field, hints[field.name], None if placed else "+")
            flags[name] = field.metadata.get("help", "")
    group.add_argument("-h", "--help", action="help", help="show this and leave")
    known, unknown = parser.parse_known_intermixed_args(_joined(argv))
    if unknown:
        raise UsageError(_unknown(unknown, command, flags, refused or {}))
    return {name: _value(value) for name, value in vars(known).items()}


def _joined(argv: Sequence[str]) -> list[str]:
    """The arguments, a value that begins as a negative number joined to its flag: -1,5 is no flag of its own."""
    found: list[str] = []
    for word in argv:
        flag = found[-1] if found else ""
        if re.match(r"-\.?\d", word) and re.fullmatch(r"--\w[\w-]*", flag):
            found[-1] = f"{flag}={word}"
        else:
            found.append(word)
    return found


def _unknown(words: Sequence[str], command: str, flags: Mapping[str, str], refused: Mapping[str, str]) -> str:
    """What is wrong with the first of the arguments that nothing takes."""
    wrong = next((word for word in words if word.startswith("-")), words[0]).split("=")[0]
    if not wrong.startswith("-"):
        return f"'{wrong}' is one argument too many for trimtab {command} (see --help)"
    if wrong in refused:
        return f"{wrong} {refused[wrong]}"
    return f"unknown flag {wrong}{did_you_mean_option(wrong, flags)} (see trimtab {command} --help)"


def _value(value: Any) -> Any:
    """Pairs given as key=value become a mapping; everything else stays as it was typed."""
    if isinstance(value, _Pairs):
        pairs = {}
        for item in value:
            key, equals, text = item.partition("=")
            if not equals:
                raise UsageError(f"'{item}' must be written key=value")
            pairs[key] = text
        return pairs
    return value


class _Pairs(list[str]):
    """Items of the form key=value."""


class _Extend(argparse.Action):
    """Collects the values of a flag that is given several times, or with several values."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        kind = _Pairs if self.const == "pairs" else list
        new = values if isinstance(values, list) else [values]
        setattr(namespace, self.dest, kind([*getattr(namespace, self.dest, []), *new]))


def _is_placed(field: dataclasses.Field[Any]) -> bool:
    return bool(field.metadata.get("positional"))


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _usage(command: str, groups: Sequence[tuple[str, type]]) -> str:
    """What a command cannot do without, in one line; all of it stands below."""
    words = ["trimtab", command]
    for _, cls in groups:
        for field in dataclasses.fields(cls):
            flag, name = "--" + field.name.replace("_", "-"), field.name.upper()
            if _is_placed(field):
                words.append(name if _is_required(field) else f"[{name} ...]")
            elif _is_required(field):
                words.append(f"{flag} {name}")
    return " ".join([*words, "[flags]"])


def _add(group: Any, field: dataclasses.Field[Any], kind: Any, count: str | None) -> str:
    name = "--" + field.name.replace("_", "-")
    origin = typing.get_origin(kind)
    text = field.metadata.get("help", "") + _default(field)
    options: dict[str, Any] = {"help": text.replace("%", "%%")}
    several = origin is tuple or origin in (dict, Mapping)
    if several:
        options |= {"action": _Extend, "nargs": count, "const": "pairs" if origin is not tuple else None}
    if _is_placed(field):
        required = _is_required(field)
        options["nargs"] = ("+" if required else "*") if several else (None if required else "?")
        group.add_argument(field.name, metavar=field.name.upper(), **options)
        return field.name
    if kind is bool:
        # --no-NAME is there for what a recipe turns on, and not worth a line of the help.
        group.add_argument(name, action="store_const", const=True, **options)
        no = "--no-" + name[2:]
        group.add_argument(no, dest=field.name, action="store_const", const=False, help=argparse.SUPPRESS)
    else:
        group.add_argument(name, metavar=_metavar(kind), **options)
    return name


def _metavar(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _metavar(next(a for a in args if a is not type(None)))
    if origin is Literal:
        return "{" + ",".join(str(a) for a in args) + "}"
    if origin is tuple:
        return _metavar(args[0])
    if origin in (dict, Mapping):
        return "KEY=VALUE"
    return {"a whole number": "N", "a number": "X", "text": "TEXT"}.get(type_name(kind), "VALUE")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "" if field.default_factory is not dataclasses.MISSING else " (required)"
    if field.default is None or field.default is False or field.default == () or field.default == "":
        return ""
    shown = " ".join(field.default) if isinstance(field.default, tuple) else field.default
    return f" (default: {'yes' if shown is True else shown})"
