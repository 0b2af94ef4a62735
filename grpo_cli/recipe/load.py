"""YAML and `--set` in, a valid `Recipe` out, or every error at once with its file and line."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from grpo_cli.errors import UserError
from grpo_cli.recipe.contradictions import contradictions
from grpo_cli.recipe.schema import Recipe

KeyPath = tuple[str | int, ...]

PLACEHOLDERS: dict[str, Any] = {
    "model": {"name": "?"},
    "data": {"name": "?"},
    "rewards": ["?:?"],
    "train": {"output_dir": "?", "max_steps": 1},
}
"""Stand-ins for required values that are missing, so that the rest of a broken recipe is checked as well."""


class RecipeError(UserError):
    """A recipe that cannot be used; the message has a line for each problem."""


class YamlLoader(yaml.SafeLoader):
    """YAML as its readers mean it: `1e-6` is a number; `no`, `on`, `1:30` and `2024-05-01` are words."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The node's value; one that its tag (`!!int x`) does not fit is an error with a line, like any other."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            shown = str(node.value)[:50]
            raise yaml.constructor.ConstructorError(
                None, None, f"{shown!r} is not a value of {node.tag.rpartition(':')[2]}", node.start_mark
            ) from error


NUMBERS_AND_BOOLEANS = {
    "bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "int": (r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$", "-+0123456789"),
    "float": (
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
}
"""How they are written in a recipe: pattern, and the characters that one begins with."""

YamlLoader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag.rpartition(":")[2] not in (*NUMBERS_AND_BOOLEANS, "timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class YamlDumper(yaml.SafeDumper):
    """Quotes every string that `YamlLoader` or a plain YAML loader would take for something else."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Line ends other than a newline are escaped: a reader would turn them into one."""
        style = '"' if any(character in data for character in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


YamlDumper.add_representer(str, YamlDumper.represent_str)
for _tag, (_pattern, _first) in NUMBERS_AND_BOOLEANS.items():
    YamlLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))
    YamlDumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


@dataclass
class RawRecipe:
    """A recipe as written: plain values, and where each key stands."""

    values: dict[str, Any]
    source: str
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, key: KeyPath) -> str:
        """Where `key`, or the nearest part of its path that was written, stands: `recipe.yaml:12`."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.places:
                return self.places[key[:end]]
        return self.source


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """Return the validated recipe.

    Args:
        recipe: path of a YAML file, a mapping of the same shape, or a `Recipe`.
        overrides: `key.path=value` strings, the value in YAML; list items by index (`rewards.0.weight=2`).

    Raises:
        RecipeError: with one line for every problem found, in the order of the file.
    """
    raw = read_recipe(recipe)
    for override in overrides:
        apply_override(raw, override)
    return validate(raw)


def read_recipe(recipe: str | Path | Mapping[str, Any] | Recipe) -> RawRecipe:
    """A recipe of any kind as plain values, not yet validated.

    Raises:
        RecipeError: a file that cannot be read as a recipe.
    """
    if isinstance(recipe, Recipe):
        return RawRecipe(recipe.model_dump(mode="json"), "recipe")
    if isinstance(recipe, Mapping):
        return RawRecipe(copy.deepcopy(dict(recipe)), "recipe")
    return read_yaml(Path(recipe))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that loads back to an equal one."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=YamlDumper, sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> RawRecipe:
    """Read a recipe file, keeping the line of every key.

    Raises:
        RecipeError: if the file is missing, is not YAML, repeats a key, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"{path}: cannot read the recipe: {reason}") from error
    try:
        loader = YamlLoader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"{path}: a recipe is a mapping of sections (model, data, rewards, train, ...)")
        places: dict[KeyPath, str] = {}
        for key, line in _key_lines(node, ()):
            if key in places:
                raise RecipeError(f"{path}:{line}: {_dotted(key)} is set twice (first at {places[key]})")
            places[key] = f"{path}:{line}"
        values = loader.construct_document(node)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{path}:{line}: not valid YAML: the character {chr(error.character)!r}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{place}: not valid YAML: {getattr(error, 'problem', error)}") from error
    except RecursionError as error:
        raise RecipeError(f"{path}: nested too deeply, or an anchor (&) that contains itself") from error
    return RawRecipe(values, str(path), places)


def _key_lines(node: yaml.Node, prefix: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = (*prefix, str(key_node.value))
            yield key, key_node.start_mark.line + 1
            yield from _key_lines(value_node, key)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*prefix, index), item.start_mark.line + 1
            yield from _key_lines(item, (*prefix, index))


def server_overrides(servers: Sequence[str]) -> list[str]:
    """`--server HOST[:PORT]` as overrides: these servers, in place of one that the recipe would start."""
    if not servers:
        return []
    urls = yaml.dump(list(servers), default_flow_style=True, width=2**31).strip()
    own = ("spawn=false", "port=null", "tensor_parallel_size=1", f"urls={urls}")
    return ["generation.engine=vllm_server", "generation.vllm={}", *(f"generation.server.{key}" for key in own)]


def apply_override(raw: RawRecipe, override: str) -> None:
    """Set one `key.path=value` in `raw`, creating sections on the way; an index may append to its list."""
    dotted, separator, text = override.partition("=")
    if not separator or not dotted.strip():
        raise RecipeError(f"--set {override}: write --set key.path=value")
    try:
        value = yaml.load(text, YamlLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"--set {override}: the value is not valid YAML") from error
    key = _key_path(dotted.strip())
    if "" in key:
        raise RecipeError(f"--set {override}: write --set key.path=value")
    target: Any = raw.values
    created: list[KeyPath] = []
    for position, part in enumerate(key):
        is_last = position == len(key) - 1
        parent = _dotted(key[:position])
        if isinstance(target, list):
            if not isinstance(part, int) or part > len(target):
                raise RecipeError(
                    f"--set {override}: {parent} has {len(target)} entries; write {parent}.0 and so on, or "
                    f"{parent}.{len(target)} to append one"
                )
            if part == len(target):
                target.append({})
                created.append(key[: position + 1])
        elif isinstance(target, dict):
            if target.get(part) is None:
                target[part] = {}
                created.append(key[: position + 1])
        else:
            raise RecipeError(f"--set {override}: {parent} has no keys of its own")
        if is_last:
            target[part] = value
        elif key[0] == "rewards" and isinstance(target[part], str):
            target[part] = {"path": target[part]}
        target = target[part]
    raw.places = {place: where for place, where in raw.places.items() if place[: len(key)] != key}
    raw.places |= dict.fromkeys([*created, key], f"--set {override}")


def _key_path(dotted: str) -> KeyPath:
    return tuple(int(part) if re.fullmatch("[0-9]{1,9}", part) else part for part in dotted.split("."))


def validate(raw: RawRecipe) -> Recipe:
    """Validate `raw` against the schema and its contradictions.

    Raises:
        RecipeError: with one line for each problem.
    """
    problems: list[tuple[KeyPath, str]] = []
    recipe: Recipe | None
    try:
        recipe = Recipe.model_validate(raw.values)
    except ValidationError as error:
        problems = [_describe(detail) for detail in error.errors()]
        recipe = _salvage(raw.values, [key for key, _ in problems])
    if recipe is not None:
        broken = {key for key, _ in problems}
        for dotted, message in contradictions(recipe):
            key = _key_path(dotted)
            if not any(key[: len(b)] == b[: len(key)] for b in broken):
                problems.append((key, f"{dotted} {message}"))
    if recipe is None or problems:
        order = {place: index for index, place in enumerate(raw.places.values())}
        problems.sort(key=lambda problem: order.get(raw.place(problem[0]), len(raw.places)))
        lines = dict.fromkeys(f"{raw.place(key)}: {message}" for key, message in problems)
        raise RecipeError("\n".join(lines))
    return recipe


def _salvage(values: dict[str, Any], broken: list[KeyPath]) -> Recipe | None:
    """The recipe with its broken keys left out, or None where that cannot stand."""
    values = copy.deepcopy(values)
    # A section inside a section that lacks a required key goes as a whole.
    incomplete = [key[:-1] for key in broken if len(key) > 2]
    for key in sorted([*broken, *incomplete], key=len, reverse=True):
        target: Any = values
        for part in key[:-1]:
            try:
                target = target[part]
            except (KeyError, IndexError, TypeError):
                target = None
        if isinstance(target, dict):
            target.pop(key[-1], None)
        elif isinstance(target, list) and isinstance(key[-1], int) and key[-1] < len(target):
            target[key[-1]] = f"?:broken{key[-1]}"
    for section, placeholder in PLACEHOLDERS.items():
        given = values.get(section)
        if isinstance(given, dict) and isinstance(placeholder, dict):
            required = {k: v for k, v in placeholder.items() if (section, k) in broken}
            values[section] = required | given
        elif not given:
            values[section] = placeholder
    try:
        return Recipe.model_validate(values)
    except ValidationError:
        return None


def _describe(detail: Any) -> tuple[KeyPath, str]:
    """One pydantic error as (key path, message)."""
    key: KeyPath = detail["loc"]
    if "target_modules" in key[:-1]:  # of a union pydantic reports each branch: (..., "list[str]", 0)
        key = key[: key.index("target_modules") + 1]
        return key, f"{_dotted(key)} must be a string or a list of strings"
    name, given = _dotted(key), detail["input"]
    context = detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            suggestion = _nearest_key(key)
            hint = f"did you mean {suggestion}?" if suggestion else _choices(key)
            return key, f"{name} is not a setting; {hint}"
        case "invalid_key":
            return (*key[:-1], str(key[-1])), f"{name} is not a setting; keys are words"
        case "missing":
            return key, f"{name} is missing"
        case "literal_error":
            choices = context["expected"].replace("False", "false").replace("True", "true")  # as YAML writes them
            return key, f"{name} is {given!r}; it must be one of {choices}"
        case "model_type":
            return key, f"{name} must be a section with keys of its own, not {_kind(given)}"
        case kind if kind.endswith("_type"):
            return key, f"{name} must be {_expected(kind, detail['msg'])}, not {_kind(given)}"
        case "too_short":
            return (
                key,
                f"{name} has {context['actual_length']} entries; it needs at least {context['min_length']}",
            )
        case "too_long":
            return key, f"{name} has more than {context['max_length']} entries"
    message = re.sub(r"^(Input|String|List|Value error,)( should)?", "", detail["msg"]).strip()
    return key, f"{name} is {given!r}; it should {message}"


def _choices(key: KeyPath) -> str:
    """The keys of the section that an unknown key was written in."""
    parent = tuple(0 if isinstance(part, int) else part for part in key[:-1])
    names = ", ".join(str(path[-1]) for path in all_keys() if path[:-1] == parent)
    return f"{_dotted(key[:-1]) or 'a recipe'} has {names}"


def _expected(kind: str, message: str) -> str:
    names = {
        "bool_type": "true or false",
        "int_type": "a whole number",
        "float_type": "a number",
        "string_type": "a string",
        "list_type": "a list",
        "dict_type": "a mapping",
        "tuple_type": "a list",
    }
    return names.get(kind, message.removeprefix("Input should be "))


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
            return f"the string {value!r}"
    return f"{value!r}"


def _dotted(key: KeyPath) -> str:
    return ".".join(str(part) for part in key)


def _nearest_key(key: KeyPath) -> str | None:
    """The right key that an unknown one was probably meant to be, in its section first, then anywhere."""
    known = [_dotted(path) for path in all_keys()]
    normalised = re.sub(r"\.\d+\.", ".0.", _dotted(key))
    parent, _, last = normalised.rpartition(".")
    by_last: dict[str, str] = {}
    for path in known:
        by_last.setdefault(path.rpartition(".")[2], path)
    if last in by_last:
        return by_last[last]
    siblings = {path.rpartition(".")[2]: path for path in known if path.rpartition(".")[0] == parent}
    if close := difflib.get_close_matches(last, siblings, n=1, cutoff=0.6):
        return siblings[close[0]].replace(".0.", f".{next((p for p in key if isinstance(p, int)), 0)}.")
    if close := difflib.get_close_matches(last, by_last, n=1, cutoff=0.8):
        return by_last[close[0]]
    return None


def all_keys(model: type[BaseModel] = Recipe, prefix: KeyPath = ()) -> Iterator[KeyPath]:
    """Every key path of the schema; items of a list of sections stand under index 0."""
    for name, info in model.model_fields.items():
        key = (*prefix, name)
        yield key
        for section, is_list in _sections_in(info.annotation):
            yield from all_keys(section, (*key, 0) if is_list else key)


def _sections_in(annotation: Any, is_list: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, is_list
        return
    inside_list = is_list or getattr(annotation, "__origin__", None) is list
    for argument in get_args(annotation):
        yield from _sections_in(argument, inside_list)
