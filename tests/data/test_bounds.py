"""Whatever a file of rows holds, each row is a prompt or one message names the file and the place."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_cli.data.files import read_file
from grpo_cli.data.rows import MAX_PROMPT, PromptRows, load_rows
from grpo_cli.errors import UserError
from grpo_cli.recipe.data_config import EvalDataConfig

LONG = 10 * 2**20
"""Characters of a string that is long, but no more than a data set may hold."""


def rows_of(path: Path, **settings: Any) -> PromptRows:
    return load_rows(EvalDataConfig(**({"name": str(path)} | settings)))


def look(path: Path, **settings: Any) -> None:
    """Read every row of a file as a run would; an error is a UserError whose message is short."""
    try:
        rows = rows_of(path, **settings)
        for row in range(len(rows)):
            rows.content(row)
            rows.row_columns(row)
    except UserError as error:
        message = str(error)
    else:
        message = ""
    assert len(message) < 6000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"prompt": "a", "x": [{"y": 12345678901234567890123}]}\n',
            "column 'x' cannot take the value in row 1",
        ),
        ("a.jsonl", '{"a": 1}\n{"a": ' + "9" * 5000 + "}\n", "a.jsonl:2: holds a number of thousands of digits"),
        ("a.json", '[{"a": ' + "9" * 5000 + "}]", "a.json: holds a number of thousands of digits"),
        ("a.jsonl", '{"prompt": "a"}\n{"a": ' + "[" * 100_000, "a.jsonl:2: more than 100 lists and objects"),
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"a": ' + "[" * 50_000 + "]" * 50_000 + "}",
            "a.jsonl:2: more than 100 lists",
        ),
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"a": ' + '{"a":' * 50_000 + "1" + "}" * 50_001,
            "a.jsonl:2: more than 100 lists",
        ),
        ("a.json", '[{"a": ' + "[" * 100_000 + "]" * 100_000 + "}]", "a.json:1: more than 100 lists and objects"),
        ("a.jsonl", '{"\\ud800": 1}\n', "a.jsonl: "),
        ("a.jsonl", '{"prompt": "a", "x": "\\udc00"}\n', "a.jsonl: column 'x' cannot take the value in row 1"),
        ("a.jsonl", '{"prompt": "a", "x": ' + "9" * 400 + "}\n", "a.jsonl: column 'x' cannot take the value in"),
        ("a.csv", b"q\xff,a\nx,1\n", "a.csv:1: not UTF-8"),
        ("a.csv", b'q,a\n"say ""\xc3"\xa9""",2.5\n', "a.csv:2: not UTF-8"),
        ("a.csv", b"\0\0\0\0", "a.csv"),
        ("a.jsonl", "\0" * 10, "a.jsonl:1: not JSON"),
        ("a.jsonl", b"\x1f\x8b\x08\x00\x00\x00", "a.jsonl:1: not UTF-8"),
    ],
)
def test_what_a_reader_stumbles_over_is_named(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        rows_of(path)
    assert len(str(caught.value)) < 2000


def test_a_message_about_a_long_value_is_short(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for rows in (
        [{"prompt": "a", "x": {"y": 1}}, {"prompt": "a", "x": {"y": "z" * LONG}}],
        [{"prompt": [{"role": "user", "content": {"x": "z" * LONG}}]}],
        [{"prompt": "a"} | {f"column{n}": n for n in range(3000)}],
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(UserError) as caught:
            rows_of(path, columns={"none": "x"} if "column1" in rows[0] else {})
        assert len(str(caught.value)) < 2000


def test_rows_of_ten_megabytes_and_tables_of_many_columns_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "x" * LONG, "answer": "é" * LONG}) + "\n")
    rows = rows_of(path, prompt_template="{prompt}")
    assert (len(rows.content(0)), len(rows.row_columns(0)["answer"])) == (LONG, LONG)
    path.write_text(json.dumps({"prompt": "x"} | {f"column{n}": n for n in range(20_000)}) + "\n")
    assert rows_of(path).row_columns(0)["column19999"] == 19_999


ROW = {
    "prompt": "a",
    "n": 999_999_999,
    "long": "x" * 100_000,
    "meta": {"key": "v", "__class__": "c"},
    "tags": ["t"],
}


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{meta[key]} {tags[0]} {prompt!r} {n:,} {prompt:>4}", "v t 'a' 999,999,999    a"),
        ("{meta[__class__]}", "c"),
        ("{prompt.__class__}", "AttributeError: {prompt.__class__} asks for an attribute"),
        ("{prompt.__class__.__init__.__globals__}", "AttributeError: "),
        ("{meta[key].__class__}", "AttributeError: "),
        ("{meta.items}", "AttributeError: "),
        ("{prompt:{n.real}}", "AttributeError: "),
        ("{tags[7]}", "IndexError: "),
        ("{tags[99999999999999999999]}", "ValueError: "),
        ("{tags[-1]}", "TypeError: "),
        ("{prompt:>999999999}", "ValueError: >999999999 asks for more than 10000 characters"),
        ("{prompt:>{n}}", "ValueError: >999999999 asks for more than 10000 characters"),
        ("{prompt:>٩٩٩٩٩٩٩٩٩}", "ValueError: >٩٩٩٩٩٩٩٩٩ asks for more than 10000 characters"),
        ("{n:.999999999f}", "ValueError: "),
        ("{long}" * (MAX_PROMPT // 100_000 + 2), f"ValueError: the prompt has more than {MAX_PROMPT} characters"),
        ("{n:c}", "OverflowError: "),
        ("{surrogate:c}", "UnicodeEncodeError: "),
    ],
)
def test_a_template_reads_columns_and_their_entries_and_ends(template: str, prompt: str) -> None:
    config = EvalDataConfig(name="here", prompt_template=template)
    data = [ROW | {"surrogate": 0xD800}]
    if "Error" not in prompt:
        assert load_rows(config, data=data).content(0) == prompt
        return
    with pytest.raises(UserError, match=re.escape(f"row 1 does not fit data.prompt_template: {prompt}")):
        load_rows(config, data=data)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([2**60], pa.timestamp("s")), "row 1 has a x that Python cannot hold"),
        (pa.array([1], pa.timestamp("s", tz="Nowhere/At_All")), "row 1 has a x that Python cannot hold"),
        (pa.array([2**62], pa.duration("s")), "row 1 has a x that Python cannot hold"),
    ],
)
def test_a_value_that_python_cannot_hold_is_named_with_its_row(column: pa.Array, message: str) -> None:
    rows = PromptRows(EvalDataConfig(name="here"), table=pa.table({"prompt": ["a"], "x": column}))
    with pytest.raises(UserError, match=message):
        rows.row_columns(0)


def test_text_that_is_no_text_is_found_before_it_is_met(tmp_path: Path) -> None:
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    parquet.write_table(pa.table({"prompt": ["a"], "x": broken}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet is damaged: "):
        rows_of(tmp_path / "a.parquet")


def test_a_parquet_file_with_flipped_bits_never_shows_a_traceback(tmp_path: Path) -> None:
    """In a process with two gigabytes, since it is the library that must not fall over."""
    rows = [{"prompt": f"question {n}", "answer": n, "tags": ["a", None], "meta": {"x": n}} for n in range(50)]
    whole = tmp_path / "whole.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), whole, compression="gzip")
    content = bytearray(whole.read_bytes())
    draw = random.Random(0)
    for number in range(60):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        (tmp_path / f"{number}.parquet").write_bytes(
            damaged[: draw.choice([len(damaged), draw.randrange(len(damaged))])]
        )
    program = (
        "import sys; from pathlib import Path; from tests.data.test_bounds import look\n"
        "for path in sorted(Path(sys.argv[1]).glob('*.parquet')): look(path); print(path.name)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (2**31, 2**31)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 61


def test_a_folder_that_may_not_be_looked_into_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(UserError, match=r"^data\.name: x/a\.jsonl cannot be read: Permission denied"):
        load_rows(EvalDataConfig(name="x/a.jsonl"))


TEXTS = st.text(max_size=8) | st.sampled_from(
    ["\0", "\x85", "\u2028", "2024-01-01", "{x}", "{{ x }}", "é" * 50, "1e9"]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([2**63, -(2**63) - 1, 10**30, 1e308, float("nan"), float("inf")])
    | st.floats()
    | TEXTS
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "x"]), st.just("user") | VALUES, max_size=4)
    | st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant", ""]), "content": TEXTS})
    | VALUES,
    max_size=3,
)
NAMES = st.sampled_from(["prompt", "answer", "prompts", "completions", "self", "", "a.b", "a b", "x\0y", "𝔘"])
ROWS = st.dictionaries(NAMES, VALUES | MESSAGES, max_size=3).flatmap(
    lambda row: (TEXTS | MESSAGES | VALUES).map(lambda prompt: row | {"prompt": prompt})
)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "system_prompt": TEXTS,
        "prompt_template": st.sampled_from(
            ["{prompt}", "{answer}", "{prompt[0]}", "{answer:>{prompt}}", "{prompt:d}"]
        )
        | st.text("{}[]:.!promtx0", max_size=10),
        "columns": st.dictionaries(NAMES, NAMES, max_size=2),
        "limit": st.sampled_from([1, 2, 2**63 - 1]),
        "prompt_column": NAMES,
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(ROWS, min_size=1, max_size=4), chosen=SETTINGS, as_array=st.booleans())
def test_any_rows_are_prompts_or_an_error_of_the_user(
    folder: Path, rows: list[dict[str, Any]], chosen: dict[str, Any], as_array: bool
) -> None:
    path = folder / ("a.json" if as_array else "a.jsonl")
    path.write_text(json.dumps(rows) if as_array else "".join(json.dumps(row) + "\n" for row in rows))
    look(path, **chosen)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), name=st.sampled_from(["a.jsonl", "a.json", "a.csv"]))
def test_a_damaged_file_is_read_or_an_error_of_the_user(folder: Path, data: st.DataObject, name: str) -> None:
    text = '{"prompt": "a", "answer": [1, {"x": "é"}]}\n{"prompt": "b", "answer": [2]}\n'
    text = 'prompt,answer\n"a, b",1\n"say ""é""",2.5\n' if name == "a.csv" else text
    text = f"[{text.strip().replace(chr(10), ',')}]" if name == "a.json" else text
    content = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(start + 12, len(content))))
        content[start:end] = data.draw(
            st.binary(max_size=4) | st.sampled_from([b'"', b"\n", b"{", b"]", b",", b"NaN"])
        )
    path = folder / name
    path.write_bytes(content)
    look(path)


def test_a_file_that_is_read_twice_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "answer": NaN}\n')
    assert str(read_file(path).to_pylist()) == "[{'prompt': 'a', 'answer': nan}]"
