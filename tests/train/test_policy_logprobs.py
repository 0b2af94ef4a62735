"""What a run stores of its policy: the log-probabilities that the step was trained with last."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import grpo_cli
from grpo_cli.record.completions import StoredCompletion, completions_file, read_completions
from grpo_cli.report.tokens import token_ratios
from tests.conftest import byte_tokenizer, tiny_llama

RAGGED_EOS = [256, *range(0, 256, 8)]


def train(recipe: dict[str, Any], folder: Path, **sections: dict[str, Any]) -> Any:
    values = json.loads(json.dumps(recipe))
    values["train"] |= {"output_dir": str(folder), "max_steps": 1}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return grpo_cli.train(values, model=tiny_llama(eos_token_id=RAGGED_EOS), tokenizer=byte_tokenizer())


def stored(result: Any) -> list[StoredCompletion]:
    return read_completions(result.output_dir, 1, 4)


def recomputed(model: Any, folder: Path) -> list[list[float]]:
    """Log-probabilities of the stored tokens, one completion at a time."""
    found = []
    for row in pq.read_table(completions_file(folder, 1)).to_pylist():
        prompt, completion = row["prompt_ids"], row["completion_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0].tolist())
    return found


@pytest.mark.parametrize("budget", [None, 40])
def test_on_policy_the_ratio_is_one(tiny_recipe: dict[str, Any], tmp_path: Path, budget: int | None) -> None:
    result = train(tiny_recipe, tmp_path / "run", train={"max_tokens_per_microbatch": budget})
    ratios = [ratio for one in stored(result) for ratio in token_ratios(one) if ratio is not None]
    assert len(ratios) == sum(one.num_sampled for one in stored(result))
    assert ratios == pytest.approx([1.0] * len(ratios), abs=1e-5)


def test_of_several_iterations_the_last_one_is_stored(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    """A run with one iteration ends with the weights that the second one computes with."""
    once = train(tiny_recipe, tmp_path / "once")
    twice = train(tiny_recipe, tmp_path / "twice", train={"num_iterations": 2})
    wanted = recomputed(once.model, twice.output_dir)
    for one, logprobs in zip(stored(twice), wanted, strict=True):
        assert one.policy_logprobs == pytest.approx(logprobs, abs=1e-5)
    assert any(abs(ratio - 1) > 1e-3 for one in stored(twice) for ratio in token_ratios(one) if ratio is not None)


def test_what_was_not_trained_on_has_none(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    result = train(tiny_recipe, tmp_path / "run", loss={"mask_truncated": True})
    completions = stored(result)
    assert {one.finish_reason for one in completions} == {"stop", "length"}
    for one in completions:
        is_cut = one.finish_reason == "length"
        assert all((value is None) == is_cut for value in one.policy_logprobs)


def test_groups_without_a_gradient_have_none(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    tiny_recipe["rewards"] = ["rewards.format:think_answer_format"]  # 0 for all
    for one in stored(train(tiny_recipe, tmp_path / "run")):
        assert one.policy_logprobs == [None] * len(one.token_ids)
        assert one.token_texts
        assert not any(math.isnan(value) for value in one.logprobs if value is not None)
