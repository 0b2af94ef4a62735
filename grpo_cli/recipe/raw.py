"""A recipe as it is written: plain values, read from YAML together with the line of every key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from grpo_cli.errors import UserError

KeyPath = tuple[str | int, ...]
"""The keys that lead to a value; an `int` is the index of a list item."""


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


def dotted(key: KeyPath) -> str:
    """The path as users write it: `rewards.0.weight`."""
    return ".".join(str(part) for part in key)


def key_path(text: str) -> KeyPath:
    """What `dotted` was made from; a part of digits alone is an index."""
    return tuple(int(part) if re.fullmatch("[0-9]{1,9}", part) else part for part in text.split("."))


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
                raise RecipeError(f"{path}:{line}: {dotted(key)} is set twice (first at {places[key]})")
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
