"""Reads local data files and Python rows into an Arrow table, with errors that name the file and the line.

Arrow reads the files because it is fast. Where it guesses, this module corrects it: text that looks like a date
stays text, and a cell that does not fit its column is an error. `datasets` is imported only for folders that it
wrote itself. No torch import.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from grpo_cli.errors import UserError
from grpo_cli.recipe.schema import DATA_FILE_SUFFIXES

SPLIT_NAMES = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
"""Words that, at the start of a file's name, say which split the file holds."""

_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_MAX_BLOCK = 2**31 - 1
_TYPE_WORDS = {str: "text", int: "an integer", float: "a number", bool: "true/false", dict: "an object"}
_TYPE_WORDS |= {list: "a list", type(None): "null"}


def file_kinds() -> str:
    """The suffixes that can be read, as a message lists them."""
    return f"{', '.join(DATA_FILE_SUFFIXES[:-1])} or {DATA_FILE_SUFFIXES[-1]}"


def missing_file(path: Path, setting: str) -> UserError:
    """The error for a path with nothing behind it; names the closest file beside it."""
    message = f"{setting}: no such file: {path}"
    if not path.parent.is_dir():
        return UserError(f"{message} (there is no folder {path.parent} either)")
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return UserError(message + (f"; did you mean {path.parent / near[0]}?" if near else ""))


def read_file(path: Path) -> pa.Table:
    """Read one .jsonl, .json, .csv or .parquet file.

    A .json file holds an array of objects, or one object per line like .jsonl. A .csv column becomes numbers
    when every cell is one, as in `datasets`; dates stay text.

    Raises:
        UserError: the file cannot be read, is empty or malformed; names the file and, if it can, the line.
    """
    readers: dict[str, Callable[[Path], pa.Table]] = {
        ".jsonl": _read_json_lines,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty")
        table = readers[path.suffix.lower()](path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    for name in table.column_names:
        if table.column_names.count(name) > 1:
            raise UserError(f"{path}: two columns are named {name!r}; give one of them another name")
    return table


def read_folder(folder: Path, *, split: str, config: str | None, setting: str) -> pa.Table:
    """Read a folder of data files of one kind, or one written by `datasets.save_to_disk`.

    If files are named after splits (`train.jsonl`, `test-00000-of-00002.parquet`), only those of `split` are read.
    As in a clone of a Hub repository, `config` is a folder inside, and the files may lie in `data/`.

    Raises:
        UserError: there is no such configuration or split, or no file that can be read.
    """
    if config is not None:
        inside = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        if config not in inside:
            raise UserError(
                f"{setting}.config: {folder} has no folder {config!r}; it has {', '.join(inside) or 'none'}"
            )
        folder = folder / config
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _read_saved(folder, split, setting)
    files = _data_files(folder) or (_data_files(folder / "data") if (folder / "data").is_dir() else [])
    if not files:
        raise UserError(f"{setting}.name: there is no {file_kinds()} file in {folder}")
    files = _files_of_split(files, split, f"{setting}.split: {folder}")
    suffixes = sorted({file.suffix.lower() for file in files})
    if len(suffixes) > 1:
        raise UserError(
            f"{setting}.name: {folder} holds {', '.join(suffixes)} files; keep one kind, or name one file"
        )
    tables = [read_file(file) for file in files]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{folder}: the columns of {names} do not fit together: {error}") from error


def table_from_rows(rows: list[Any], where: str) -> pa.Table:
    """Turn dicts into a table; a key that a row lacks is null there.

    Raises:
        UserError: a row is not a dict, or a column holds values of several types; names `where` and the row.
    """
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{where}: row {number} is {_kind(row)}, not an object with a value per column")
    names = {str(name): name for row in rows for name in row}
    columns = {name: _column([row.get(key) for row in rows], name, where) for name, key in names.items()}
    return pa.table(columns)


def pick_split(splits: dict[str, Any], split: str, where: str) -> Any:
    """The split of that name, or an error that lists those there are."""
    if split not in splits:
        raise UserError(f"{where} has no split {split!r}; it has {', '.join(map(str, splits))}")
    return splits[split]


def _column(values: list[Any], name: str, where: str) -> pa.Array:
    def failure(count: int) -> BaseException | None:
        """Why the first `count` values make no column; None if they do."""
        try:
            pa.array(values[:count])
        except (pa.ArrowException, OverflowError, ValueError, TypeError) as error:
            return error
        return None

    error = failure(len(values))
    if error is None:
        return pa.array(values)
    good, bad = 0, len(values)
    while bad - good > 1:
        middle = (good + bad) // 2
        if failure(middle):
            bad = middle
        else:
            good = middle
    before = next((row for row, value in enumerate(values[:good]) if value is not None), None)
    if before is not None and type(values[before]) is not type(values[good]):
        kinds = f"{_kind(values[before])} in row {before + 1} and {_kind(values[good])} in row {bad}"
        raise UserError(f"{where}: column {name!r} is {kinds}; a column holds one type") from error
    raise UserError(f"{where}: column {name!r} cannot take the value in row {bad}: {failure(bad)}") from error


def _kind(value: Any) -> str:
    return _TYPE_WORDS.get(type(value), type(value).__name__)


def _read_json(path: Path) -> pa.Table:
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if not start.startswith(b"["):
        return _read_json_lines(path)
    _check_utf8(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    return table_from_rows(rows, str(path))


def _read_json_lines(path: Path) -> pa.Table:
    import pyarrow.json as arrow_json

    read = arrow_json.ReadOptions(block_size=_block_size(path))
    try:
        table = arrow_json.read_json(path, read_options=read)
        written = pa.schema([(field.name, _as_written(field.type)) for field in table.schema])
        if not written.equals(table.schema):
            parse = arrow_json.ParseOptions(explicit_schema=written)
            table = arrow_json.read_json(path, read_options=read, parse_options=parse)
        table.validate(full=True)
    except pa.ArrowException:
        # Arrow does not say where; Python does, and reads what only Arrow refuses (a key given twice).
        return table_from_rows(list(_json_objects(path)), str(path))
    return table


def _json_objects(path: Path) -> Iterator[dict[str, Any]]:
    """The object of each line, blank lines left out."""
    _check_utf8(path)
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip("\r\n"))
            except json.JSONDecodeError as error:
                hint = ""
                if number == 1 and path.suffix.lower() == ".json":
                    hint = "; a .json file holds an array of objects, or one object per line"
                raise UserError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}{hint}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: is {_kind(row)}; each line must be an object")
            yield row


def _read_csv(path: Path) -> pa.Table:
    import pyarrow.csv as arrow_csv

    read = arrow_csv.ReadOptions(block_size=_block_size(path))
    parse = arrow_csv.ParseOptions(newlines_in_values=True)
    try:
        table = arrow_csv.read_csv(path, read_options=read, parse_options=parse)
        text = {field.name: pa.string() for field in table.schema if _as_written(field.type) != field.type}
        if text:
            convert = arrow_csv.ConvertOptions(column_types=text)
            table = arrow_csv.read_csv(path, read_options=read, parse_options=parse, convert_options=convert)
    except pa.ArrowException as error:
        _check_utf8(path)
        _check_csv_fields(path)
        raise UserError(f"{path}: cannot be read as CSV: {error}") from error
    if any(pa.types.is_binary(field.type) for field in table.schema):
        _check_utf8(path)
    if path.read_bytes().count(b'"') % 2:  # Arrow takes all that follows an open quote for one field
        _check_csv_fields(path)
    return table


def _read_parquet(path: Path) -> pa.Table:
    import pyarrow.parquet as parquet

    try:
        return parquet.ParquetFile(path, memory_map=True).read()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file, or a damaged one: {error}") from error


def _block_size(path: Path) -> int:
    """Bytes to read at once: the whole file, so that a row of any size fits and all rows decide on types."""
    return min(path.stat().st_size + 1, _MAX_BLOCK)


def _as_written(kind: pa.DataType) -> pa.DataType:
    """The type with text in place of each date or time in it, since the file holds those as text."""
    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_as_written(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _as_written(field.type)) for field in kind])
    return kind


def _check_utf8(path: Path) -> None:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 ({error.reason}); save the file as UTF-8") from error


def _check_csv_fields(path: Path) -> None:
    """Raise for the first row whose number of fields differs from the header's, or whose quotes are wrong."""
    limit = csv.field_size_limit(sys.maxsize)
    start = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            header = next(rows, [])
            start += rows.line_num
            for row in rows:
                if row and len(row) != len(header):
                    raise UserError(
                        f"{path}:{start}: {len(row)} fields, but the header has {len(header)}; "
                        'put text that holds commas or line ends between double quotes, and write " as ""'
                    )
                start = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{start}: a double quote is not closed or not doubled: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _data_files(folder: Path) -> list[Path]:
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.suffix.lower() in DATA_FILE_SUFFIXES
        and entry.is_file()
        and entry.name not in _NOT_DATA
        and not entry.name.startswith((".", "_"))
    )


def _files_of_split(files: list[Path], split: str, where: str) -> list[Path]:
    """The files named after the split, or all of them when none is named after any split."""
    names = sorted({split, *SPLIT_NAMES}, key=len, reverse=True)
    pattern = re.compile(rf"({'|'.join(map(re.escape, names))})(?=[-._]|$)")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        match = pattern.match(file.name)
        if match:
            by_split.setdefault(match[1], []).append(file)
    chosen: list[Path] = pick_split(by_split, split, where) if by_split else files
    return chosen


def _read_saved(folder: Path, split: str, setting: str) -> pa.Table:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"{setting}.name: {folder} was written by datasets, which cannot read it: {error}"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        saved = pick_split(saved, split, f"{setting}.split: {folder}")
    return saved.with_format("arrow")[:]
