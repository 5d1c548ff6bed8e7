# SPDX-License-Identifier: Apache-2.0
"""Names and types of what gin files and the command line set; mistakes found before a run begins.

Here a config is text as gin prints it (`gin.config_str`): first `MACRO = value` lines, then
`module.function.parameter = value` lines.
"""

import dataclasses
import difflib
import inspect
import re
import tokenize
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_STRING = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
_INSTEAD = {
    "MIXTURE_OR_TASK_NAME": "CALIBRATION_FILES=task:NAME, VALIDATION_FILES=task:NAME, or for infer "
    "PROMPTS, a file"
}


def used_names(config: str) -> set[str]:
    """Macros that a config refers to, and parameters that it binds as `function.parameter`."""
    code = _STRING.sub("''", config)
    macros = re.findall(r"%(\w+)(?![\w.])", code)  # the dot: not %gin.REQUIRED
    return {*macros, *re.findall(r"^(?:\S+\.)?(\w+\.\w+) =", code, re.MULTILINE)}


def missing_names(config: str) -> list[str]:
    """Macros and parameters that are marked as required, or referred to, but have no value."""
    bound = dict(re.findall(r"^(\S+) = (\S*)", config, re.MULTILINE))
    required = {name for name, value in bound.items() if value == "%gin.REQUIRED"}
    macros = {name for name in used_names(config) if "." not in name}
    return sorted(required | (macros - set(bound)))


def remedy(name: str, known: Iterable[str]) -> str:
    """What may have been meant by a name that nothing uses."""
    if name in _INSTEAD:
        return f"give {_INSTEAD[name]}"
    alike = sorted(other for other in known if ("." in other) == ("." in name))
    by_folded = {other.casefold(): other for other in alike}
    if close := difflib.get_close_matches(name.casefold(), by_folded):
        return f"did you mean {' or '.join(by_folded[other] for other in close)}?"
    return f"expected one of {', '.join(alike)}"


def records(configurable: Callable[..., Any]) -> Iterator[type]:
    """The dataclasses among the types of a function's parameters or a dataclass's fields."""
    for name, hint in get_type_hints(configurable).items():
        if name != "return" and isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield hint


def check_arguments(
    configurable: Callable[..., Any], written: Mapping[str, Any], values: Mapping[str, Any]
) -> None:
    """Compares arguments with the parameters and their types.

    Args:
      configurable: a function or dataclass.
      written: parameter -> its binding; a reference's `repr` is `%MACRO`.
      values: parameter -> its value.

    Raises:
      ValueError: one is missing, or does not fit; names the macro, or else the parameter.
    """
    try:
        inspect.signature(configurable).bind(**values)
    except TypeError as error:
        raise ValueError(f"{configurable.__name__} is {error}") from error
    hints = get_type_hints(configurable)
    for parameter, value in values.items():
        if fits(value, hints[parameter]):
            continue
        binding = repr(written[parameter])
        macro = binding.removeprefix("%") if binding.startswith("%") else None
        name = macro or f"{configurable.__name__}.{parameter}"
        number = isinstance(value, (int, float)) and fits(str(value), hints[parameter])
        quoted = f"; quote it: --gin.{name}=\"'{value}'\"" if number else ""
        raise ValueError(f"{name} is {value!r}; expected {described(hints[parameter])}{quoted}")


def explanation(error: Exception) -> str:
    """What an error that gin raised says to a user."""
    if isinstance(error, SyntaxError):
        where = f"{error.filename}, line {error.lineno}: " if error.filename else ""
        text = (error.text or "").strip()
        return f"{where}cannot read `{text}`; expected NAME = VALUE, text in quotes"
    if isinstance(error, tokenize.TokenError):
        return "a bracket or quote is not closed"
    # gin appends what it was calling, with an address in memory.
    return str(error).partition("\n  In call to configurable")[0]


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, where a list must hold what it should and a bool is no int."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in arguments
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if not isinstance(value, origin or hint):
        return False
    if isinstance(value, Mapping) and arguments:
        return all(fits(k, arguments[0]) and fits(v, arguments[1]) for k, v in value.items())
    if isinstance(value, Sequence) and arguments:
        return not isinstance(value, str) and all(fits(item, arguments[0]) for item in value)
    return True


def described(hint: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(map(described, arguments))
    if hint in (types.NoneType, bool):
        return "None" if hint is types.NoneType else "True or False"
    if arguments:
        return f"{origin.__name__}[{', '.join(map(described, arguments))}]"
    return hint.__name__
