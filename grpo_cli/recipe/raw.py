"""A recipe as it is written: plain values, read from YAML together with the line of every key."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.scanner import ScannerError

from grpo_cli.errors import UserError

KeyPath = tuple[str | int, ...]
"""The keys that lead to a value; an `int` is the index of a list item."""


class RecipeError(UserError):
    """A recipe that cannot be used; the message has a line for each problem.

    Args:
        message: lines.
        about: for each line, from the first, the key whose explanation helps; () where there is none.
    """

    def __init__(self, message: str, about: Sequence[KeyPath] = ()) -> None:
        super().__init__(message)
        self.about = about


MAX_BYTES = 512 * 1024
"""Size of a recipe. The longest chat templates have 20 KiB; PyYAML reads a file of this size within a second."""

MAX_VALUES = 20_000
"""Values in a recipe: keys, lists and mappings count, and an alias (`*`) as all that it stands for."""

MAX_LEVELS = 50
"""Lists and mappings inside one another."""

MAX_NUMBER = 100
"""Characters of a number. Python takes seconds for a hexadecimal one that fills the file, and cannot print it."""


class YamlLoader(yaml.SafeLoader):
    """YAML as its readers mean it: `1e-6` is a number; `no`, `on`, `1:30` and `2024-05-01` are words.

    What a document may hold is bounded while it is composed, before any value is made: eight lines of anchors can
    stand for a billion values.
    """

    def __init__(self, text: str) -> None:
        self._values = self._characters = self._level = self._deepest = 0
        self._anchored: dict[str, tuple[int, int, int]] = {}  # values, characters and levels of what it names
        super().__init__(text)

    def fetch_more_tokens(self) -> None:
        """Scan on; what PyYAML fails on without a line, such as `"\\U00110000"`, is an error with a line."""
        try:
            super().fetch_more_tokens()
        except (ValueError, OverflowError) as error:
            raise ScannerError(
                None, None, f"found a number that is too large: {error}", self.get_mark()
            ) from error

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node, counted."""
        event: Any = self.peek_event()
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if event.anchor not in self._anchored:
                raise ComposerError(None, None, f"the anchor &{event.anchor} contains itself", event.start_mark)
            values, characters, levels = self._anchored[event.anchor]
            self._count(values, characters, self._level + levels, event.start_mark)
            return node
        text = event.value if self.check_event(yaml.ScalarEvent) else ""
        if re.search("[\ud800-\udfff]", text):
            raise ComposerError(None, None, "half of a surrogate pair is not a character", event.start_mark)
        values, characters, deepest = self._values, self._characters, self._deepest
        self._level += 1
        self._deepest = 0
        self._count(1, len(text), self._level, event.start_mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        if event.anchor is not None:
            levels = self._deepest - self._level
            self._anchored[event.anchor] = (self._values - values, self._characters - characters, levels)
        self._deepest = max(deepest, self._deepest)
        return node

    def _count(self, values: int, characters: int, level: int, mark: yaml.Mark) -> None:
        self._values += values
        self._characters += characters
        self._deepest = max(self._deepest, level)
        problem = ""
        if self._values > MAX_VALUES:
            problem = f"more than {MAX_VALUES} values"
        elif self._characters > MAX_BYTES:
            problem = f"more than {MAX_BYTES} characters"
        elif self._deepest > MAX_LEVELS:
            problem = f"more than {MAX_LEVELS} lists and mappings inside one another"
        if problem:
            raise ComposerError(None, None, f"{problem} (an alias counts as what it stands for)", mark)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The node's value; one that its tag (`!!int x`) does not fit is an error with a line, like any other."""
        kind = node.tag.rpartition(":")[2]
        try:
            if kind in ("int", "float") and len(node.value) > MAX_NUMBER:
                raise ValueError(f"a number has at most {MAX_NUMBER} characters")
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            shown = str(node.value)[:50]
            raise ConstructorError(None, None, f"{shown!r} is not a value of {kind}", node.start_mark) from error


YamlLoader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
}
"""Others make sets, bytes and dates, which the run's own `recipe.yaml` could not hold."""

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
        if tag.rpartition(":")[2] not in (*NUMBERS_AND_BOOLEANS, "timestamp", "value")
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


KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
"""What the key of a mapping may be: a word, or `<<`."""


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
        RecipeError: if the file is missing, too large, is not YAML, repeats a key, or is not a mapping.
    """
    text = _read_text(path)
    try:
        values, places = parse(text, lambda line: f"{path}:{line}")
    except yaml.YAMLError as error:
        line, problem = explain(error, text)
        raise RecipeError(f"{path}:{line}: not valid YAML: {problem}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections (model, data, rewards, train, ...)")
    return RawRecipe(values, str(path), places)


def is_pipe_or_device(path: Path) -> bool:
    """Whether reading from there could wait for ever, or never end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _read_text(path: Path) -> str:
    try:
        if is_pipe_or_device(path):
            raise RecipeError(f"{path}: cannot read the recipe: it is a pipe or a device, not a file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise RecipeError(f"{path}: cannot read the recipe: it has more than {MAX_BYTES // 1024} KiB")
        return content.decode("utf-8")
    except (OSError, ValueError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        reason = error.strerror or reason if isinstance(error, OSError) else reason
        raise RecipeError(f"{path}: cannot read the recipe: {reason}") from error


def parse(text: str, place: Callable[[int], str]) -> tuple[Any, dict[KeyPath, str]]:
    """The value that a YAML document stands for, and the place of every key in it.

    No two parts of the value are one object, so that one of them can be changed.

    Args:
        text: the document.
        place: how messages name a line, counted from 1.

    Raises:
        yaml.YAMLError: the text is not one YAML document of plain values, or is too large.
        RecipeError: a key is given twice, or is not a word.
    """
    loader = YamlLoader(text)
    node = loader.get_single_node()
    if node is None:
        return None, {}
    places: dict[KeyPath, str] = {}
    for key, written in _keys(node, ()):
        here = place(written.start_mark.line + 1)
        if key in places:
            raise RecipeError(f"{here}: {readable(dotted(key))} is set twice (first at {places[key]})")
        if isinstance(key[-1], str) and written.tag not in KEY_TAGS:
            raise RecipeError(f"{here}: {readable(dotted(key))} is not a setting; keys are words")
        places[key] = here
    return _unshared(loader.construct_document(node)), places


def explain(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    """The line, counted from 1, and the reason why `text` is not valid YAML."""
    if isinstance(error, yaml.reader.ReaderError):
        return text.count("\n", 0, error.position) + 1, f"the character {chr(error.character)!r}"
    mark = getattr(error, "problem_mark", None)
    return mark.line + 1 if mark else 1, readable(str(getattr(error, "problem", error)))


def readable(text: str, limit: int = 1000) -> str:
    """`text` as one line of about `limit` characters, for a message; what a screen cannot show is escaped."""
    cut = text if len(text) <= limit else f"{text[:limit]} ..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def _keys(node: yaml.Node, prefix: KeyPath) -> Iterator[tuple[KeyPath, yaml.Node]]:
    """Every key with the node that stands where it is written."""
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConstructorError(None, None, "found unhashable key", key_node.start_mark)
            key = (*prefix, key_node.value)
            yield key, key_node
            yield from _keys(value_node, key)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*prefix, index), item
            yield from _keys(item, (*prefix, index))


def _unshared(value: Any) -> Any:
    """A copy in which nothing is shared, as the parts that an anchor and its aliases stand for are."""
    if isinstance(value, dict):
        return {key: _unshared(entry) for key, entry in value.items()}
    return [_unshared(entry) for entry in value] if isinstance(value, list) else value
