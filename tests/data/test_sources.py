"""`data.name` finds files, folders, factories and the Hub, and a Hub that does not answer is no wait."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from grpo_cli.data import sources
from grpo_cli.data.rows import PromptRows, load_rows
from grpo_cli.errors import UserError
from grpo_cli.recipe.data_config import EvalDataConfig

ROWS = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}]
FACTORIES = """
import pyarrow as pa
ROWS = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}]
def rows(): return ROWS
def endless():
    while True: yield from ROWS
def table(): return pa.Table.from_pylist(ROWS)
def dataset():
    import datasets
    return datasets.Dataset.from_list(ROWS[::-1]).select([1, 0])
def number(): return 3
def columns(): return {"prompt": ["a"]}
def texts(): return ["a"]
def breaks(): return 1 / 0
def breaks_late():
    yield ROWS[0]
    raise RuntimeError("no more")
def needs(argument): return ROWS
"""


def config(name: str | Path, **settings: Any) -> EvalDataConfig:
    return EvalDataConfig(name=str(name), **settings)


def contents(rows: PromptRows) -> list[Any]:
    return [rows.content(row) for row in range(len(rows))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a module of factories and a data file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "factories_of_test.py").write_text(FACTORIES)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (tmp_path / "notes.txt").write_text("a")
    yield tmp_path
    sys.modules.pop("factories_of_test", None)


@pytest.mark.parametrize("name", ["data/rows.jsonl", "./data/rows.jsonl", "~/data/rows.jsonl", "data", "~/data"])
def test_a_path_is_read_wherever_it_starts(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert contents(load_rows(config(name))) == ["a", "b"]


@pytest.mark.parametrize("name", ["rows", "table", "dataset"])
def test_a_factory_may_return_rows_a_table_or_a_dataset(folder: Path, name: str) -> None:
    rows = load_rows(config(f"factories_of_test:{name}"))
    assert contents(rows) == ["a", "b"]
    assert rows.row_columns(1) == {"answer": 2}


def test_no_more_rows_than_the_limit_are_drawn_from_a_generator(folder: Path) -> None:
    assert contents(load_rows(config("factories_of_test:endless", limit=3))) == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data/row.jsonl", "data.name: no such file: data/row.jsonl; did you mean data/rows.jsonl?"),
        (
            "nowhere/rows.jsonl",
            "data.name: no such file: nowhere/rows.jsonl (there is no folder nowhere either)",
        ),
        ("./data/other", "data.name: no such file: data/other"),
        ("notes.txt", "data.name: notes.txt is not a .jsonl, .json, .csv or .parquet file"),
        ("./notes.txt", "data.name: notes.txt is not a .jsonl, .json, .csv or .parquet file"),
        ("a/b/c", "data.name: 'a/b/c' is not a file or folder here, and not a Hub id (owner/name)"),
        ("factories_of_test:row", "data.name: factories_of_test has no row; did you mean rows?"),
        ("factories_of_test:ROWS", "factories_of_test:ROWS is not a function"),
        (
            "factories_of_test:number",
            "expected a datasets.Dataset, a list of dicts, a pyarrow Table or a pandas",
        ),
        ("factories_of_test:columns", "or a pandas DataFrame, not dict"),
        ("factories_of_test:texts", "factories_of_test:texts: row 1 is text, not an object"),
        ("factories_of_test:breaks", "factories_of_test.py:14: ZeroDivisionError: division by zero"),
        ("factories_of_test:breaks_late", "factories_of_test.py:17: RuntimeError: no more"),
        (
            "factories_of_test:needs",
            "data.params: factories_of_test:needs(argument) cannot be called with them: missing a required arg",
        ),
    ],
)
def test_a_name_that_leads_nowhere_says_why(folder: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_rows(config(name))


def test_a_factory_is_called_with_its_parameters(folder: Path) -> None:
    rows = load_rows(config("factories_of_test:needs", params={"argument": 1}))
    assert contents(rows) == ["a", "b"]
    wrong = config("factories_of_test:needs", params={"argument": 1, "size": 2})
    message = r"^data\.eval\.params: .*:needs\(argument\) cannot be called.*unexpected keyword argument 'size'"
    with pytest.raises(UserError, match=message):
        load_rows(wrong, setting="data.eval")


@pytest.mark.parametrize("name", ["data/rows.jsonl", "data", "owner/name"])
def test_parameters_of_what_is_no_factory_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.params: only a module:factory has parameters, not {name}; rem"):
        load_rows(config(name, params={"size": 2}))
    with pytest.raises(UserError, match=r"^data\.params: the data are an object"):
        load_rows(config(name, params={"size": 2}), data=ROWS)


def test_a_configuration_of_a_factory_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.eval\.config: only a Hub dataset or a folder"):
        load_rows(config("factories_of_test:rows", config="main"), setting="data.eval")


def test_a_file_may_stand_in_for_a_hub_dataset_with_a_configuration(folder: Path) -> None:
    assert len(load_rows(config("data/rows.jsonl", config="main"))) == len(load_rows(config("data/rows.jsonl")))


def as_dataset(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(rows)


def as_dataset_dict(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("datasets").DatasetDict(train=as_dataset(rows), test=as_dataset(rows[:1]))


def as_frame(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("pandas").DataFrame(rows).set_index(pytest.importorskip("numpy").array([7, 8]))


@pytest.mark.parametrize("make", [list, tuple, iter, pa.Table.from_pylist, as_dataset, as_dataset_dict, as_frame])
def test_objects_from_python_replace_what_the_name_says(make: Callable[[Any], object]) -> None:
    rows = load_rows(config("not/there"), data=make(ROWS))
    assert contents(rows) == ["a", "b"]
    assert rows.columns == ["answer"]
    assert rows.row_columns(0) == {"answer": 1}


@pytest.mark.parametrize(("data", "message"), [(3, "not int"), ("rows.jsonl", "not str"), ([], " has no rows")])
def test_other_objects_are_refused(data: object, message: str) -> None:
    with pytest.raises(UserError, match=f"^data.*{message}"):
        load_rows(config("not/there"), data=data)


def test_columns_that_datasets_keeps_as_json_are_objects_again() -> None:
    datasets = pytest.importorskip("datasets")
    calls = [[{"arguments": {"a": 1}}, {"arguments": {"a": "x"}}]]
    chats = [[{"role": "user", "content": "hi"}, {"role": "user", "content": [{"type": "text", "text": "x"}]}]]
    data = datasets.Dataset.from_dict({"prompt": chats, "calls": calls}, on_mixed_types="use_json")
    assert "Json" in str(data.features)
    rows = load_rows(config("not/there"), data=data)
    assert rows.content(0) == chats[0]
    assert rows.row_columns(0) == {"calls": calls[0]}


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`datasets.load_dataset` that serves `owner/name` out of local folders, errors and all."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.setattr(sources, "_hub_answers", lambda: True)
    for repository in ("repository", "configured"):
        (folder / repository).mkdir()
        for split in ("train", "test"):
            row = json.dumps({"prompt": split})
            (folder / repository / f"{split}.jsonl").write_text(f"{row}\n{row}\n{row}\n")
    (folder / "configured" / "README.md").write_text(
        "---\nconfigs:\n- {config_name: one, data_files: train.jsonl}\n"
        "- {config_name: two, data_files: test.jsonl}\n---\n"
    )
    load = datasets.load_dataset

    def load_dataset(name: str, *args: Any, **kwargs: Any) -> Any:
        return load(str(folder / name.split("/")[1]), *args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return datasets


def test_a_split_of_a_hub_dataset_loads(hub: Any) -> None:
    assert contents(load_rows(config("owner/repository", split="test", limit=2))) == ["test", "test"]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "owner/repository",
            {"split": "dev"},
            r"^data\.split: owner/repository: Unknown split .*train.*test",
        ),
        ("owner/configured", {}, r"^data\.config: owner/configured: Config name is missing.*one.*two"),
        (
            "owner/configured",
            {"config": "three"},
            r"^data\.config: owner/configured: BuilderConfig.*one.*two",
        ),
    ],
)
def test_an_unknown_split_or_configuration_lists_those_there_are(
    hub: Any, name: str, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=re.compile(message, re.DOTALL)):
        load_rows(config(name, **settings))


def test_a_dataset_that_is_not_on_the_hub_is_not_called_a_network_failure(
    hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        raise hub.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.")

    monkeypatch.setattr(hub, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"^data\.name: a/b: the Hub has no such dataset, .* check the spelling"):
        load_rows(config("a/b"))


LOAD = """
import sys
from grpo_cli.data.rows import load_rows
from grpo_cli.errors import UserError
from grpo_cli.recipe.data_config import EvalDataConfig
try:
    print(load_rows(EvalDataConfig(name="owner/name")).content(0))
except UserError as error:
    print(error)
"""


def load_in_a_new_process(cache: Path, **environment: str) -> str:
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()
    }
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        env=kept | {"HF_HOME": str(cache), "PYTHONPATH": str(Path(__file__).parents[2])} | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.strip().splitlines()[-1]


NOBODY = "http://127.0.0.1:9"


def test_a_hub_that_cannot_be_reached_fails_within_seconds_and_says_what_to_do(tmp_path: Path) -> None:
    start = time.monotonic()
    said = load_in_a_new_process(tmp_path, HF_ENDPOINT=NOBODY)
    assert said.startswith("data.name: owner/name: the Hugging Face Hub cannot be reached")
    assert (
        "so that it is cached, or set data.name to a local .jsonl, .json, .csv or .parquet file or folder" in said
    )
    assert time.monotonic() - start < 15  # the library alone retries for 23 s


def test_a_hub_switched_off_by_the_environment_says_so(tmp_path: Path) -> None:
    assert "HF_HUB_OFFLINE is set" in load_in_a_new_process(tmp_path, HF_HUB_OFFLINE="1")


def test_a_dataset_in_the_cache_loads_when_the_hub_cannot_be_reached(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    cached = tmp_path / "datasets" / "owner___name" / "default" / "0.0.0" / ("0" * 40)
    cached.mkdir(parents=True)
    (tmp_path / "a.jsonl").write_text('{"prompt": "from the cache"}\n')
    built = datasets.load_dataset(
        "json", data_files=str(tmp_path / "a.jsonl"), split="train", cache_dir=str(tmp_path / "built")
    )
    for file in Path(built.cache_files[0]["filename"]).parent.iterdir():
        target = file.name.replace("json-", "name-")
        (cached / target).write_bytes(
            file.read_bytes().replace(b'"dataset_name": "json"', b'"dataset_name": "name"')
        )
    assert load_in_a_new_process(tmp_path, HF_ENDPOINT=NOBODY) == "from the cache"
