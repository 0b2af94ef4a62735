"""What a run stores of its completions is read back as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import grpo_cli
from grpo_cli.errors import RunError
from grpo_cli.record.completions import completions_file, read_completions, stored_steps
from grpo_cli.train.stored_completions import remove_completions_after
from tests.report.run_folders import MadeUp, write_run
from tests.train.test_trackers import rollout_of, save


def test_stored_completions_are_read_group_by_group(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    tiny_recipe["train"] |= {"output_dir": str(tmp_path / "run"), "max_steps": 1}
    size = tiny_recipe["generation"]["num_generations"]
    result = grpo_cli.train(tiny_recipe)
    assert stored_steps(result.output_dir) == [1]
    read = read_completions(result.output_dir, 1, size)
    assert [(one.group, one.sample) for one in read] == [divmod(place, size) for place in range(len(read))]
    assert len({(one.group, str(one.prompt)) for one in read}) == len({one.group for one in read})
    rewards = [score for one in read for score in one.rewards.values() if score is not None]
    assert result.metrics[0]["reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert all(len(one.token_ids) == len(one.logprobs) == len(one.sampled) == one.num_sampled for one in read)


def test_files_that_are_not_a_runs_own_are_left_alone(tmp_path: Path) -> None:
    own = completions_file(tmp_path, 2)
    copies = [own.with_name("step-000002 (copy).parquet"), own.with_name("step-last.parquet")]
    own.parent.mkdir()
    for path in (own, *copies):
        path.write_bytes(b"")
    assert stored_steps(tmp_path) == [2]
    remove_completions_after(tmp_path, 1)
    assert sorted(own.parent.iterdir()) == copies


@pytest.mark.parametrize("prompt", ["[" * 100_000, '{"a":' * 100_000, "1" * 10_000, "[1]", '[{"role": 1}, 2]'])
def test_a_prompt_that_looks_like_json_is_a_text(tmp_path: Path, prompt: str) -> None:
    save(tmp_path, 1, rollout_of([prompt]), ["r"], torch.zeros(2, 1), torch.zeros(2))
    assert [one.prompt for one in read_completions(tmp_path, 1, 2)] == [prompt] * 2


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = completions_file(tmp_path, 3)
    path.parent.mkdir()
    path.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(RunError, match=r"step-000003.parquet cannot be read"):
        read_completions(tmp_path, 3, 4)


def test_a_table_of_something_else_is_told(tmp_path: Path) -> None:
    path = completions_file(tmp_path, 3)
    path.parent.mkdir()
    pq.write_table(pa.table({"something": [1]}), path)
    with pytest.raises(RunError, match=r"step-000003.parquet holds no completions of a run: it has no column"):
        read_completions(tmp_path, 3, 4)


def test_without_tokens_the_rest_is_the_same(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", MadeUp(steps=1, turns=2, rewards=("a.b", "c")))
    whole, texts = (read_completions(folder, 1, 4, with_tokens=with_tokens) for with_tokens in (True, False))
    of_tokens = ("token_ids", "token_texts", "logprobs", "policy_logprobs", "sampled")
    nothing: dict[str, Any] = {name: [] for name in of_tokens}
    assert whole[0].token_texts
    assert texts == [replace(one, **nothing) for one in whole]


def test_some_completions_of_a_step_are_read_as_among_all(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", MadeUp(steps=1))
    whole = read_completions(folder, 1, 4)
    assert read_completions(folder, 1, 4, places=[6, 1]) == [whole[6], whole[1]]
    assert read_completions(folder, 1, 4, places=[]) == []
