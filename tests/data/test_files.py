"""Local files come in as they are written, and a bad one is named with its line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from grpo_cli.data.files import read_file, read_folder, table_from_rows
from grpo_cli.errors import UserError

ROWS = [{"prompt": "two\nlines, a comma", "answer": 3}, {"prompt": 'say "hi" – ünïcode', "answer": 4}]
CSV = 'prompt,answer\n"two\nlines, a comma",3\n"say ""hi"" – ünïcode",4\n'


def json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", json_lines(ROWS)),
        ("blank-lines.jsonl", "\n" + json_lines(ROWS).replace("\n", "\n\n")),
        ("byte-order-mark.jsonl", "\ufeff" + json_lines(ROWS)),
        ("lines.json", json_lines(ROWS)),
        ("array.json", json.dumps(ROWS, indent=1)),
        ("array-mark.json", "\ufeff" + json.dumps(ROWS)),
        ("upper.JSONL", json_lines(ROWS)),
        ("a.csv", CSV),
        ("windows.csv", "\ufeff" + CSV),
    ],
)
def test_a_file_reads_as_the_rows_that_it_holds(tmp_path: Path, name: str, content: str) -> None:
    assert read_file(write(tmp_path / name, content)).to_pylist() == ROWS


def test_a_parquet_file_reads_as_the_rows_that_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "split=train" / "a.parquet"  # no column `split` out of the folder's name
    path.parent.mkdir()
    parquet.write_table(pa.Table.from_pylist(ROWS), path)
    assert read_file(path).to_pylist() == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_row_of_several_megabytes_reads(tmp_path: Path, name: str) -> None:
    long = "x" * 3_000_000
    content = f"prompt\nshort\n{long}\n" if name == "a.csv" else json_lines([{"prompt": "s"}, {"prompt": long}])
    assert read_file(write(tmp_path / name, content)).to_pylist()[1] == {"prompt": long}


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_text_that_looks_like_a_date_stays_text(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": "when?", "answer": day} for day in ("2020-01-01", "2021-02-03")]
    content = json_lines(rows)
    if name == "a.csv":
        content = "prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in rows)
    assert read_file(write(tmp_path / name, content)).to_pylist() == rows


def test_dates_inside_messages_stay_text(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "2020-01-01 10:00:00"}], "tags": ["2020-01-01"]}]
    assert read_file(write(tmp_path / "a.jsonl", json_lines(rows))).to_pylist() == rows


def test_numbers_get_a_type_from_all_rows_of_a_csv_column(tmp_path: Path) -> None:
    content = "prompt,answer\n" + "what?,1\n" * 200_000 + "what?,none\n"
    table = read_file(write(tmp_path / "a.csv", content))
    assert table.column("answer")[0].as_py() == "1"
    assert table.num_rows == 200_001


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl: the file is empty"),
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', "a.jsonl:3: not JSON: Expecting value at column 7"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl:2: is a list; each line must be an object"),
        ("a.jsonl", '"text"\n', "a.jsonl:1: is text; each line must be an object"),
        ("a.jsonl", b'{"a": "x"}\n{"a": "\xff"}\n', "a.jsonl:2: not UTF-8 (invalid start byte)"),
        ("a.jsonl", '{"a": "x"}\n'.encode("utf-16"), "a.jsonl:1: not UTF-8"),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": null}\n{"a": "x"}\n',
            "a.jsonl: column 'a' is an integer in row 1 and text in row 3; a column holds one type",
        ),
        ("a.jsonl", '{"a": {"b": 1}}\n{"a": {"b": "x"}}\n', "column 'a' cannot take the value in row 2: "),
        ("a.jsonl", '{"a": "\\ud800"}\n', "column 'a' cannot take the value in row 1: "),
        ("a.json", '[{"a": 1},\n {"a" 2}]', "a.json:2: not JSON: Expecting ':' delimiter at column 7"),
        ("a.json", '[{"a": 1}, 2]', "a.json: row 2 is an integer, not an object"),
        ("a.json", b'[{"a": "\xff"}]', "a.json:1: not UTF-8"),
        ("a.json", "hello", "a .json file holds an array of objects, or one object per line"),
        ("a.csv", 'q,a\n"two\nlines",1\nx,2,3\n', "a.csv:4: 3 fields, but the header has 2"),
        ("a.csv", 'q,a\nx,1\nx,"1\ny,2\n', "a.csv:3: a double quote is not closed or not doubled"),
        ("a.csv", '"q,a\nx,1\n', "a.csv:1: a double quote is not closed or not doubled"),
        ("a.csv", b"q,a\nx,1\ny,\xff\n", "a.csv:3: not UTF-8"),
        ("a.csv", "\n", "a.csv: cannot be read as CSV"),
        ("a.csv", "a,a\n1,2\n", "a.csv: two columns are named 'a'"),
        ("a.parquet", "not parquet", "a.parquet: not a Parquet file, or a damaged one: "),
    ],
)
def test_a_malformed_file_is_named_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read_file(write(tmp_path / name, content))


def test_a_truncated_parquet_file_is_an_error_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="not a Parquet file, or a damaged one"):
        read_file(path)


def test_a_key_given_twice_has_its_last_value(tmp_path: Path) -> None:
    assert read_file(write(tmp_path / "a.jsonl", '{"a": 1, "a": 2}\n')).to_pylist() == [{"a": 2}]


def test_rows_may_lack_keys_that_come_later() -> None:
    table = table_from_rows([{"a": 1}, {"b": "x"}], "data")
    assert table.to_pylist() == [{"a": 1, "b": None}, {"a": None, "b": "x"}]


def folder_prompts(folder: Path, split: str = "train", config: str | None = None) -> list[str]:
    return read_folder(folder, split=split, config=config, setting="data").column("prompt").to_pylist()


def test_a_folder_without_split_names_reads_all_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b", "c", "a"):
        write(tmp_path / f"{name}.jsonl", json_lines([{"prompt": name, "only_" + name: 1}]))
    write(tmp_path / "README.md", "# not data")
    write(tmp_path / "dataset_infos.json", "{}")
    write(tmp_path / ".hidden.csv", "x")
    assert folder_prompts(tmp_path) == ["a", "b", "c"]
    assert folder_prompts(tmp_path, split="test") == ["a", "b", "c"]


def test_a_folder_with_split_names_reads_the_split(tmp_path: Path) -> None:
    for name in ("train", "test", "notes"):
        write(tmp_path / f"{name}.jsonl", json_lines([{"prompt": name}]))
    assert folder_prompts(tmp_path) == ["train"]
    assert folder_prompts(tmp_path, split="test") == ["test"]
    with pytest.raises(UserError, match=r"^data\.split: .* has no split 'dev'; it has test, train$"):
        folder_prompts(tmp_path, split="dev")


def test_shards_of_a_split_are_read_in_order_from_a_clone_of_a_hub_repository(tmp_path: Path) -> None:
    for config in ("main", "socratic"):
        for name in ("train-00001-of-00002", "train-00000-of-00002", "test-00000-of-00001"):
            path = tmp_path / config / f"{name}.parquet"
            path.parent.mkdir(exist_ok=True)
            parquet.write_table(pa.table({"prompt": [config + name[:11]]}), path)
    assert folder_prompts(tmp_path, config="main") == ["maintrain-00000", "maintrain-00001"]
    with pytest.raises(UserError, match=r"data\.config: .* no folder 'mian'; it has main, socratic"):
        folder_prompts(tmp_path, config="mian")
    (tmp_path / "main").rename(tmp_path / "data")
    assert folder_prompts(tmp_path) == ["maintrain-00000", "maintrain-00001"]


def test_a_folder_of_several_kinds_or_of_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.name: there is no \.jsonl, \.json, \.csv or \.parquet file in"):
        folder_prompts(tmp_path)
    write(tmp_path / "a.jsonl", json_lines([{"prompt": "a"}]))
    write(tmp_path / "b.csv", "prompt\nb\n")
    with pytest.raises(UserError, match=r"holds \.csv, \.jsonl files; keep one kind, or name one file"):
        folder_prompts(tmp_path)


def test_files_of_a_folder_whose_columns_clash_are_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", json_lines([{"prompt": "a", "answer": 1}]))
    write(tmp_path / "b.jsonl", json_lines([{"prompt": "b", "answer": "x"}]))
    with pytest.raises(UserError, match=r"the columns of a\.jsonl, b\.jsonl do not fit together: .*answer"):
        folder_prompts(tmp_path)


def test_a_folder_that_datasets_saved_reads(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
    one.select([1, 0]).save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=one, test=one.select([1])).save_to_disk(str(tmp_path / "several"))
    assert folder_prompts(tmp_path / "one") == ["b", "a"]
    assert folder_prompts(tmp_path / "several", split="test") == ["b"]
    with pytest.raises(UserError, match="has no split 'dev'; it has train, test"):
        folder_prompts(tmp_path / "several", split="dev")
    for file in (tmp_path / "one").glob("*.arrow"):
        file.unlink()
    with pytest.raises(UserError, match="was written by datasets, which cannot read it"):
        folder_prompts(tmp_path / "one")


def test_a_quote_inside_a_csv_field_is_a_character(tmp_path: Path) -> None:
    table = read_file(write(tmp_path / "a.csv", 'q,a\na 5" pipe,1\nx,2\n'))
    assert table.column("q").to_pylist() == ['a 5" pipe', "x"]
