"""Whatever a recipe holds, it is read as it will be written, or refused in lines that name their place."""

from __future__ import annotations

import contextlib
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_cli.recipe.load import MAX_PROBLEMS, dump_recipe, load_recipe
from grpo_cli.recipe.messages import all_keys
from grpo_cli.recipe.raw import KeyPath, RecipeError
from tests.recipe.recipes import PLAIN, plain

SHIPPED = [path.read_text() for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))]
KEYS = sorted(all_keys(), key=str)

PIECES = (
    "&a ", "*a", "*a, *a", "<<: *a", "? ", "!!python/name:os.system ", "!!int ", "!!set ", "!x ", "---", "...",
    "%YAML 1.1", "[", "]", "{", "}", "- ", ": ", ", ", "|", ">", "'", '"', "#", "\t", "\n", "    ", "~", "null",
    "true", "no", ".nan", ".inf", "1e999", "0x_", "0b", "1:30", "2024-05-01", "9" * 400, "-" + "9" * 5000,
    "\\ud800", "\0", "\x85", "\u2028", "\ufeff", "\udc00", "é", "𝔘", "x" * 300, "a:b", "{{ x }}",
)  # fmt: skip
"""What means something to a YAML reader, or has made one stumble."""

WORDS = st.text(max_size=10) | st.sampled_from(
    ["a:b", "adamw", "x.jsonl", "-", "~", "é/" * 200, "\x1b[2J", "..", "/"]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63, -(2**63), 10**90, 10**4000, 1e308, -1e308, float("nan"), float("inf")])
    | st.floats()
    | WORDS
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.integers() | st.none(), inner, max_size=4)
    ),
    max_leaves=8,
) | st.integers(45, 200).map(lambda levels: yaml.safe_load("[" * levels + "]" * levels))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any") / "recipe.yaml"


def read(file: Path, content: bytes) -> None:
    """Load a file; what is refused and what is accepted are held to their promises."""
    file.write_bytes(content)
    try:
        recipe = load_recipe(file)
    except RecipeError as error:
        lines = str(error).split("\n")
        assert len(lines) <= MAX_PROBLEMS + 1
        for line in lines:
            assert re.match(rf"{re.escape(str(file))}(:[0-9]+)?: ", line)
            assert len(line) < 1300
            assert line.isprintable()
        return
    assert recipe.train.number_of_steps(1000) > 0
    file.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
    again = load_recipe(file)
    assert again == recipe or "nan" in repr(recipe), "a reward's parameter may be NaN, which is equal to nothing"


@st.composite
def mutated_texts(draw: st.DrawFn) -> bytes:
    """The text of a recipe with pieces put in, cut out, and repeated."""
    text = draw(st.sampled_from([PLAIN, *SHIPPED]))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 30)))
        piece = draw(st.sampled_from(PIECES) | st.just(text[start:end] * 2) | st.text(max_size=5))
        text = text[:start] + piece + text[end:]
    return text.encode(draw(st.sampled_from(["utf-8"] * 9 + ["utf-16", "latin-1"])), errors="replace")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(content=mutated_texts())
def test_a_text_with_anything_in_it_is_a_recipe_or_a_readable_error(file: Path, content: bytes) -> None:
    read(file, content)


def put(values: Any, key: KeyPath, value: Any) -> None:
    for part, following in itertools.pairwise(key):
        if isinstance(values, list):
            if isinstance(values[part], str):  # type: ignore[call-overload]
                values[part] = {"path": values[part]}  # type: ignore[call-overload]
            values = values[part]  # type: ignore[call-overload]
        else:
            values = values.setdefault(part, [{}] if following == 0 else {})
    values[key[-1]] = value


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=4))
def test_any_value_of_any_key_is_accepted_as_it_is_or_refused(
    file: Path, changes: list[tuple[KeyPath, Any]]
) -> None:
    values = plain()
    for key, value in sorted(changes, key=lambda change: len(change[0])):
        try:
            put(values, key, value)
        except (TypeError, AttributeError, LookupError):
            continue  # the section itself was replaced before
    with contextlib.suppress(RecipeError):
        load_recipe(values)
    read(file, yaml.safe_dump(values, sort_keys=False).encode())
