"""What the Hub refuses, and what it sends, is told in words: through the libraries, from a server on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo_cli import hub
from grpo_cli.hub import BARS, explained, without_bars
from tests.hub import serving

ROOT = Path(__file__).parents[1]

ASK = """
import contextlib, io, json, os, sys
from pathlib import Path
from grpo_cli.hub import without_bars
without_bars(os.environ)
from grpo_cli.data.rows import load_rows
from grpo_cli.errors import UserError
from grpo_cli.plan.shape import model_size
from grpo_cli.policy.load import load_policy, load_tokenizer
from grpo_cli.recipe.data_config import EvalDataConfig
from grpo_cli.recipe.schema import ModelConfig
from grpo_cli.reward.reward_model import RewardModel

DOORS = {
    "model": lambda name: load_policy(ModelConfig(name=name)),
    "tokenizer": lambda name: load_tokenizer(ModelConfig(name=name)),
    "revision": lambda name: load_policy(ModelConfig(name=name, revision="nope")),
    "reward": RewardModel,
    "size": lambda name: model_size(ModelConfig(name=name), Path(name)).source,
    "data": lambda name: load_rows(EvalDataConfig(name=name)),
}
told = {}
for case in sys.argv[1:]:
    door, name, token = case.split()
    os.environ["HF_TOKEN"] = "" if token == "-" else token
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            given = DOORS[door](name)
            said = given if isinstance(given, str) else "loaded"
        except UserError as error:
            said = str(error)
    told[case] = [said, errors.getvalue()]
print(json.dumps(told))
"""


def ask(endpoint: str, cache: Path, *cases: str, **environment: str) -> dict[str, list[str]]:
    """What a new process is told in each case, and what it writes to stderr."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()
    }
    kept |= {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-c", ASK, *cases]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, check=True, timeout=120)
    told: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return told


ASKED = ("gated -", "gated hf_known", "mising -", "mising hf_known", "tiny hf_bad")
CASES = [f"{door} owner/{asked}" for door in ("model", "tokenizer", "reward", "data") for asked in ASKED]
CASES += ["revision owner/tiny -", "size owner/gated -", "size owner/mising -", "size owner/tiny -"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_model_dir, folder / "tiny")
    with serving(folder) as endpoint:
        yield ask(endpoint, folder / "cache", *CASES) | {"endpoint": endpoint}


@pytest.mark.slow
@pytest.mark.parametrize("door", ["model", "tokenizer", "reward", "data"])
def test_what_the_hub_refuses_names_the_command_and_the_page(told: dict[str, Any], door: str) -> None:
    page = f"{told['endpoint']}/{'datasets/' if door == 'data' else ''}owner"
    gated = told[f"{door} owner/gated -"][0]
    assert f"it is gated: accept its terms at {page}/gated, then log in with `hf auth login`" in gated
    refused = told[f"{door} owner/gated hf_known"][0]
    assert f"the account of this login may not read it: accept its terms at {page}/gated" in refused
    assert "`hf auth whoami` says which account" in refused
    for token in ("-", "hf_known"):
        missing = told[f"{door} owner/mising {token}"][0]
        assert f"check the spelling ({page}/mising); if it is private, " in missing
        assert ("log in with `hf auth login`" in missing) == (token == "-")
    bad = told[f"{door} owner/tiny hf_bad"][0]
    assert "the Hub refuses the token that HF_TOKEN holds: log in again with `hf auth login`" in bad


@pytest.mark.slow
def test_each_message_says_which_setting_is_meant_and_is_short(told: dict[str, Any]) -> None:
    starts = {
        "model": "model.name: cannot load owner/", "tokenizer": "model.name: cannot load the tokenizer of owner/",
        "reward": "model owner/", "data": "data.name: owner/", "revision": "model.name: cannot load owner/tiny: ",
        "size": ("known once the model is loaded: ", "config.json on the Hub"),
    }  # fmt: skip
    for case in CASES:
        said, errors = told[case]
        assert said.startswith(starts[case.split()[0]]), said
        assert "Traceback" not in said
        assert len(said) < 500, said
        assert "it/s" not in errors


@pytest.mark.slow
def test_a_revision_that_is_not_there_is_named(told: dict[str, Any]) -> None:
    assert "owner/tiny has no branch, tag or commit nope; " in told["revision owner/tiny -"][0]


@pytest.mark.slow
def test_the_plan_of_grpo_check_says_why_it_knows_no_size(told: dict[str, Any]) -> None:
    page = f"{told['endpoint']}/owner"
    gated, missing = (told[f"size owner/{name} -"][0] for name in ("gated", "mising"))
    assert gated.startswith(f"known once the model is loaded: it is gated: accept its terms at {page}/gated, then")
    assert f"check the spelling ({page}/mising)" in missing
    assert told["size owner/tiny -"][0] == "config.json on the Hub"


@pytest.mark.slow
def test_a_download_is_told_in_one_line_without_bars_and_only_where_there_is_one(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "hub" / "tiny")
    (tmp_path / "hub" / "rows").mkdir()
    (tmp_path / "hub" / "rows" / "train.jsonl").write_text('{"prompt": "a"}\n')
    cases = [f"model owner/tiny {token}" for token in ("-", "hf_known")]
    cases += [f"data owner/rows {token}" for token in ("-", "hf_known")]
    with serving(tmp_path / "hub") as endpoint:
        first, again, data, data_again = ask(endpoint, tmp_path / "cache", *cases).values()
    line = "downloading the {} owner/{} from the Hub; the cache has none of it, or a part\n"
    assert first == ["loaded", line.format("model", "tiny")]
    assert again == ["loaded", ""]
    assert data == ["loaded", line.format("dataset", "rows")]
    assert data_again == ["loaded", ""]
    offline = ask(endpoint, tmp_path / "cache", *cases, HF_HUB_OFFLINE="1")
    assert all(said == "loaded" and "downloading" not in errors for said, errors in offline.values())


def test_a_hub_that_has_no_time_is_named_with_its_answer() -> None:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils._http import httpx2

    answer = httpx2.Response(503, request=httpx2.Request("HEAD", "http://127.0.0.1/owner/x"))
    error = LocalEntryNotFoundError("cannot locate the file")
    error.__cause__ = HfHubHTTPError("503", response=answer)
    words = explained(error, "model", "owner/x", instead="set model.name to a folder")
    assert words == "the Hub answers 503; try again later, or set model.name to a folder"


def test_an_error_that_is_not_the_hub_s_is_not_explained() -> None:
    assert explained(ValueError("a damaged file"), "model", "owner/x", instead="") is None
    assert explained(FileNotFoundError("config.json"), "model", "owner/x", instead="") is None


def test_part_of_a_model_in_the_cache_is_not_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(tmp_path / "config.json"))
    assert not hub._has_model("owner/x", None, None)
    parts = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    (tmp_path / "model-1-of-2.safetensors").touch()
    assert not hub._has_model("owner/x", None, None)
    (tmp_path / "model-2-of-2.safetensors").touch()
    assert hub._has_model("owner/x", None, None)


def test_a_user_who_wants_bars_keeps_them() -> None:
    environment = {"TQDM_DISABLE": ""}
    without_bars(environment)
    assert environment == dict.fromkeys(BARS, "1") | {"TQDM_DISABLE": ""}
