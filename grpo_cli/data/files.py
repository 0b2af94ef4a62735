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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from grpo_cli.errors import UserError, one_line
from grpo_cli.recipe.data_config import DATA_FILE_SUFFIXES

SPLIT_NAMES = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
"""Words that, at the start of a file's name, say which split the file holds."""

MAX_LEVELS = 100
"""Lists and objects inside one another in JSON."""

MAX_LISTED = 30
"""Columns that a message names."""

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
    for name, count in Counter(table.column_names).items():
        if count > 1:
            raise UserError(f"{path}: two columns are named {name!r}; give one of them another name")
    return table


def listed(names: Sequence[str]) -> str:
    """The names for a message, no more than fit into one."""
    shown = ", ".join(f"{name:.100}" for name in names[:MAX_LISTED])
    return shown + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")


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
        raise UserError(f"{folder}: the columns of {names} do not fit together: {one_line(error)}") from error


def table_from_rows(rows: list[Any], where: str) -> pa.Table:
    """Turn dicts into a table; a key that a row lacks is null there.

    Raises:
        UserError: a row is not a dict, or a column holds values of several types; names `where` and the row.
    """
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{where}: row {number} is {_kind(row)}, not an object with a value per column")
    names = {str(name): name for row in rows for name in row}
    for name in names:
        if not name.isascii() and re.search("[\ud800-\udfff]", name):
            raise UserError(
                f"{where}: {name!r:.100} has half of a surrogate pair in it; no column has such a name"
            )
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
    reason = one_line(failure(bad) or error)
    raise UserError(f"{where}: column {name!r} cannot take the value in row {bad}: {reason}") from error


def _kind(value: Any) -> str:
    return _TYPE_WORDS.get(type(value), type(value).__name__)


def _read_json(path: Path) -> pa.Table:
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if not start.startswith(b"["):
        return _read_json_lines(path)
    _check_utf8(path)
    _check_levels(path, path.read_bytes(), 1)
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:  # Python reads no number of more than 4300 digits
        raise UserError(f"{path}: holds a number of thousands of digits") from error
    return table_from_rows(rows, str(path))


def _read_json_lines(path: Path) -> pa.Table:
    import pyarrow.json as arrow_json

    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            _check_levels(path, line, number)
    read = arrow_json.ReadOptions(block_size=_block_size(path))
    try:
        table = arrow_json.read_json(path, read_options=read)
        written = pa.schema([(field.name, _as_written(field.type)) for field in table.schema])
        if not written.equals(table.schema):
            parse = arrow_json.ParseOptions(explicit_schema=written)
            table = arrow_json.read_json(path, read_options=read, parse_options=parse)
        table.validate(full=True)
        exact = not any(_may_be_rounded(column) for column in table.columns)
    except pa.ArrowException:
        exact = False
    if not exact:
        # Arrow does not say where it failed; Python does, and reads what only Arrow refuses (a key given twice).
        # Of a whole number of more than 64 bits Arrow makes the nearest fraction.
        return table_from_rows(list(_json_objects(path)), str(path))
    return table


def _may_be_rounded(column: pa.ChunkedArray | pa.Array) -> bool:
    """Whether the column holds a fraction as large as whole numbers that need more than 64 bits."""
    import pyarrow.compute as pc

    kind = column.type
    if "double" not in str(kind):
        return False
    if pa.types.is_floating(kind):
        most = pc.max(pc.abs(column)).as_py()
        return most is not None and most >= 2**63
    if pa.types.is_list(kind):
        return _may_be_rounded(pc.list_flatten(column))
    if pa.types.is_struct(kind):
        return any(_may_be_rounded(pc.struct_field(column, index)) for index in range(kind.num_fields))
    return False


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
            except ValueError as error:
                raise UserError(f"{path}:{number}: holds a number of thousands of digits") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: is {_kind(row)}; each line must be an object")
            yield row


def _check_levels(path: Path, text: bytes, line: int) -> None:
    """Raise if JSON is nested deeper than any data are. Arrow's reader crashes on some ten thousand levels."""
    if text.count(b"[") + text.count(b"{") <= MAX_LEVELS:
        return
    outside_strings = b"".join(text.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])
    level = 0
    for bracket in re.findall(rb"[][{}\n]", outside_strings):
        line += bracket == b"\n"
        level += (bracket in b"[{") - (bracket in b"]}")
        if level > MAX_LEVELS:
            raise UserError(f"{path}:{line}: more than {MAX_LEVELS} lists and objects inside one another")


def _read_csv(path: Path) -> pa.Table:
    import pyarrow.csv as arrow_csv

    read = arrow_csv.ReadOptions(block_size=_block_size(path))
    parse = arrow_csv.ParseOptions(newlines_in_values=True)
    try:
        table = arrow_csv.read_csv(path, read_options=read, parse_options=parse)
        kinds = zip(table.column_names, table.schema.types, strict=True)
        text = {name: pa.string() for name, kind in kinds if _as_written(kind) != kind}
        if text:
            convert = arrow_csv.ConvertOptions(column_types=text)
            table = arrow_csv.read_csv(path, read_options=read, parse_options=parse, convert_options=convert)
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the latter from the name of a column
        _check_csv_fields(path)
        raise UserError(f"{path}: cannot be read as CSV: {one_line(error)}") from error
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
        raise UserError(f"{path}: not a Parquet file, or a damaged one: {one_line(error)}") from error


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
    """Raise for the first line that is not UTF-8, or the first row with wrong quotes or too many or few fields."""
    _check_utf8(path)
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
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
        raise UserError(
            f"{setting}.name: {folder} was written by datasets, which cannot read it: {error}"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        saved = pick_split(saved, split, f"{setting}.split: {folder}")
    return saved.with_format("arrow")[:]
