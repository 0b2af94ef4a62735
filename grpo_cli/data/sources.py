"""Loads what `data.name` names (file, folder, `module:factory`, Hub id), or a Python object, as an Arrow table.

Only the Hub can make a run wait. So it is first asked, briefly, whether it answers. If it does not, the cache is
used at once, and not after the half a minute for which the library would try again. No torch import, and
`datasets`, which takes 1.5 s to import, only where the Hub is used.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from grpo_cli import hub
from grpo_cli.data.files import file_kinds, missing_file, pick_split, read_file, read_folder, table_from_rows
from grpo_cli.errors import UserError
from grpo_cli.plugins import load_object, origin
from grpo_cli.recipe.data_config import DATA_FILE_SUFFIXES, EvalDataConfig

HUB_TIMEOUT_S = 5.0
"""Longest wait for the Hub's first answer; it is asked twice."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_table(config: EvalDataConfig, setting: str) -> pa.Table:
    """Load what `config.name` names; `setting` (`data` or `data.eval`) is where it was written."""
    try:
        return _load(config, setting)
    except OSError as error:  # a folder on the way that may not be looked into
        raise UserError(f"{setting}.name: {config.name} cannot be read: {error.strerror or error}") from error


def _load(config: EvalDataConfig, setting: str) -> pa.Table:
    name = config.name
    path = Path(name).expanduser()
    is_path = path.suffix.lower() in DATA_FILE_SUFFIXES or name.startswith(("./", "../", "/", "~"))
    is_factory = ":" in name and "/" not in name and not is_path and not path.is_dir()
    if config.params and not is_factory:
        raise UserError(f"{setting}.params: only a module:factory has parameters, not {name}; remove it")
    if path.is_dir():
        return read_folder(path, split=config.split, config=config.config, setting=setting)
    if config.config is not None and is_factory:
        raise UserError(f"{setting}.config: only a Hub dataset or a folder has configurations; remove it")
    if is_path:
        if not path.is_file():
            raise missing_file(path, f"{setting}.name")
        if path.suffix.lower() not in DATA_FILE_SUFFIXES:
            raise UserError(f"{setting}.name: {path} is not a {file_kinds()} file")
        return read_file(path)
    if is_factory:
        return _from_factory(config, f"{setting}.name")
    if path.is_file():
        raise UserError(f"{setting}.name: {path} is not a {file_kinds()} file")
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"{setting}.name: {name!r} is not a file or folder here, and not a Hub id (owner/name)")
    return _from_hub(config, setting)


def table_from_object(data: object, config: EvalDataConfig, where: str) -> pa.Table:
    """Turn what Python code hands over into a table.

    Takes a `datasets.Dataset` (of a `DatasetDict`, `config.split`), a pyarrow Table, a pandas DataFrame, and
    a list or another iterable of dicts, of which no more than `config.limit` are drawn.
    """
    datasets, pandas = sys.modules.get("datasets"), sys.modules.get("pandas")
    if datasets is not None and isinstance(data, datasets.DatasetDict):
        data = pick_split(data, config.split, where)
    if isinstance(data, pa.Table):
        return data
    try:
        if datasets is not None and isinstance(data, datasets.Dataset):
            return data.with_format("arrow")[: config.limit]
        if pandas is not None and isinstance(data, pandas.DataFrame):
            return pa.Table.from_pandas(data, preserve_index=False)
        if hasattr(data, "__arrow_c_stream__"):
            return pa.table(data)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise UserError(f"{where}: cannot be turned into a table: {error}") from error
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes, dict)):
        raise UserError(
            f"{where}: expected a datasets.Dataset, a list of dicts, a pyarrow Table or a pandas DataFrame, "
            f"not {type(data).__name__}"
        )
    return table_from_rows(list(itertools.islice(data, config.limit)), where)


def _from_factory(config: EvalDataConfig, setting: str) -> pa.Table:
    factory = load_object(config.name, setting=setting)
    where = f"{setting}: {config.name}"
    if not callable(factory):
        raise UserError(f"{where} is not a function; it must be one that returns the rows")
    with contextlib.suppress(ValueError):  # some built-in functions have no signature
        signature = inspect.signature(factory)
        try:
            signature.bind(**config.params)
        except TypeError as error:
            key = f"{setting.removesuffix('.name')}.params"
            raise UserError(f"{key}: {config.name}{signature} cannot be called with them: {error}") from error
    try:
        return table_from_object(factory(**config.params), config, where)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{where} failed: {origin(error)}") from error


def _from_hub(config: EvalDataConfig, setting: str) -> pa.Table:
    import datasets

    try:
        answers = _hub_answers()
        if answers:
            hub.tell_download("dataset", config.name)
        with contextlib.nullcontext() if answers else _cache_only():
            loaded = datasets.load_dataset(config.name, config.config, split=config.split)
    except Exception as error:  # httpx, huggingface_hub and datasets have no common base
        raise _hub_error(error, config, setting) from error
    return loaded.with_format("arrow")[: config.limit]


def _hub_answers() -> bool:
    """Whether the Hub answers a small request, through the proxy and certificates that downloads will use."""
    from huggingface_hub import constants, get_session

    for _ in range(2):
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
        except Exception as error:
            if not hub.is_network_error(error):
                raise
        else:
            return True
    return False


@contextlib.contextmanager
def _cache_only() -> Iterator[None]:
    """Let `datasets` look only into its cache: HF_HUB_OFFLINE for the length of one call."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _hub_error(error: Exception, config: EvalDataConfig, setting: str) -> UserError:
    from datasets.exceptions import DatasetNotFoundError

    text = str(error).strip() or type(error).__name__
    if "Unknown split" in text:
        return UserError(f"{setting}.split: {config.name}: {text}")
    if "Config name is missing" in text or "BuilderConfig" in text:
        return UserError(f"{setting}.config: {config.name}: {text}")
    instead = f"set {setting}.name to a local {file_kinds()} file or folder"
    words = hub.explained(error, "dataset", config.name, instead=instead)
    if words is None:
        return UserError(f"{setting}.name: loading {config.name} failed: {type(error).__name__}: {text}")
    if isinstance(error, DatasetNotFoundError) and "gated" not in text:
        words += f"; for a local file or folder, there is none at {Path(config.name).absolute()}"
    return UserError(f"{setting}.name: {config.name}: {words}")
