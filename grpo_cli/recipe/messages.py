"""What pydantic finds wrong with a recipe, in words that say what to write instead."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from grpo_cli.recipe.episode import ONE, SEVERAL
from grpo_cli.recipe.raw import KeyPath, dotted, key_path, readable
from grpo_cli.recipe.schema import Recipe

TYPES = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "a mapping",
    "tuple_type": "a list",
}
"""What pydantic's errors about types ask for."""

MAX_SHOWN = 200
"""Characters of a wrong value that a message repeats."""


@dataclass(frozen=True)
class Problem:
    key: KeyPath
    """Where it stands."""
    message: str
    about: KeyPath | None = None
    """The key whose explanation helps, if that is not `key`; () if there is none."""


def describe(detail: Any) -> Problem:
    """One entry of pydantic's `ValidationError.errors()`."""
    key: KeyPath = detail["loc"]
    if "target_modules" in key[:-1]:  # of a union pydantic reports each branch: (..., "list[str]", 0)
        key = key[: key.index("target_modules") + 1]
        return Problem(key, f"{dotted(key)} must be a string or a list of strings")
    key = tuple(part for part in key if part not in (ONE, SEVERAL))
    name, given = dotted(key), detail["input"]
    context = detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            suggestion = _nearest_key(key)
            hint = f"did you mean {suggestion}?" if suggestion else _choices(key)
            return Problem(key, f"{name} is not a setting; {hint}", key_path(suggestion) if suggestion else ())
        case "invalid_key":
            return Problem((*key[:-1], str(key[-1])), f"{name} is not a setting; keys are words", ())
        case "missing":
            return Problem(key, f"{name} is missing")
        case "literal_error":
            choices = context["expected"].replace("False", "false").replace("True", "true")  # as YAML writes them
            return Problem(key, f"{name} is {_shown(given)}; it must be one of {choices}")
        case "model_type":
            return Problem(key, f"{name} must be a section with keys of its own, not {_kind(given)}")
        case kind if kind.endswith("_type"):
            expected = TYPES.get(kind, detail["msg"].removeprefix("Input should be "))
            return Problem(key, f"{name} must be {expected}, not {_kind(given)}")
        case "too_short":
            count, least = context["actual_length"], context["min_length"]
            return Problem(key, f"{name} has {count} entries; it needs at least {least}")
        case "too_long":
            return Problem(key, f"{name} has more than {context['max_length']} entries")
    message = re.sub(r"^(Input|String|List|Value error,)( should)?", "", detail["msg"]).strip()
    return Problem(key, f"{name} is {_shown(given)}; it should {message}")


def _choices(key: KeyPath) -> str:
    """The keys of the section that an unknown key was written in."""
    parent = tuple(0 if isinstance(part, int) else part for part in key[:-1])
    names = ", ".join(str(path[-1]) for path in all_keys() if path[:-1] == parent)
    return f"{dotted(key[:-1]) or 'a recipe'} has {names}"


def _kind(value: Any) -> str:
    match value:
        case None:
            return "empty"
        case bool():
            return str(value).lower()
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case str():
            return f"the string {_shown(value)}"
    return _shown(value)


def _shown(value: Any) -> str:
    """The value as Python writes it, cut."""
    if isinstance(value, (str, bytes)):
        value = value[: MAX_SHOWN + 1]
    try:
        return readable(repr(value), MAX_SHOWN)
    except ValueError:  # Python does not write out a number of more than 4300 digits
        return "a number of thousands of digits"


def _nearest_key(key: KeyPath) -> str | None:
    """The right key that an unknown one was probably meant to be, in its section first, then anywhere."""
    known = [dotted(path) for path in all_keys()]
    normalised = re.sub(r"\.\d+\.", ".0.", dotted(key))
    parent, _, last = normalised.rpartition(".")
    by_last = {path.rpartition(".")[2]: path for path in reversed(known)}  # of several the first
    if last in by_last:
        return by_last[last]
    siblings = {path.rpartition(".")[2]: path for path in known if path.rpartition(".")[0] == parent}
    if close := difflib.get_close_matches(last, siblings, n=1, cutoff=0.6):
        return siblings[close[0]].replace(".0.", f".{next((p for p in key if isinstance(p, int)), 0)}.")
    if close := difflib.get_close_matches(last, by_last, n=1, cutoff=0.8):
        return by_last[close[0]]
    return None


def all_keys() -> Iterator[KeyPath]:
    """Every key path of the schema; items of a list of sections stand under index 0."""
    return (key for key, _ in all_fields())


def all_fields(model: type[BaseModel] = Recipe, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, FieldInfo]]:
    """Every key path of the schema, as `all_keys`, and what is declared for it."""
    for name, info in model.model_fields.items():
        key = (*prefix, name)
        yield key, info
        if (found := section_of(info.annotation)) is not None:
            section, is_list = found
            yield from all_fields(section, (*key, 0) if is_list else key)


def section_of(annotation: Any, is_list: bool = False) -> tuple[type[BaseModel], bool] | None:
    """The section that a field of this type holds, and whether it holds a list of them; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, is_list
    is_list = is_list or get_origin(annotation) is list
    return next(filter(None, (section_of(argument, is_list) for argument in get_args(annotation))), None)
