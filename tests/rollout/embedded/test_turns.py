"""What the policy says of its own turns, while it generates them, is what training says of them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, MistralConfig

from grpo_cli.algorithm.packing import pack_groups
from grpo_cli.data.prompts import Prompt
from grpo_cli.episode.driver import Driver
from grpo_cli.episode.environments import environment_kind
from grpo_cli.episode.world import World
from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.recipe.episode import EpisodeConfig
from grpo_cli.recipe.schema import GenerationConfig
from grpo_cli.rollout.embedded.engine import EmbeddedEngine, eos_token_ids
from grpo_cli.rollout.embedded.shared_prompt_memory import SharedPromptMemory
from grpo_cli.rollout.rollout import Rollout
from tests.episode.chat import chat_tokenizer
from tests.episode.small_talk import COUNTING, STOPS, SmallTalk
from tests.policy.test_logprobs import HEADS, build

QUESTIONS = [
    [{"role": "user", "content": text}] for text in ("Who?", "What is it that you see there?", "Why not?")
]
TEMPERATURE = 0.7
MODELS: dict[str, Any] = {
    "llama": LlamaConfig,
    "mistral with a sliding window": lambda **settings: MistralConfig(**settings, sliding_window=6),
    "gemma2, which cannot share prompts": lambda **settings: Gemma2Config(**settings, head_dim=8),
}


class Watched:
    """Which rows read on from their keys and values."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.extended = 0
        extend = SharedPromptMemory.extend

        def watched(memory: SharedPromptMemory, names: Any, held: Any, token_ids: Any) -> torch.Tensor:
            self.extended += len(names)
            return extend(memory, names, held, token_ids)

        monkeypatch.setattr(SharedPromptMemory, "extend", watched)


def episodes(config: Any, *, rewrites: bool) -> tuple[PackedModel, Rollout]:
    """Played by the policy against an environment that takes its time."""
    tokenizer = chat_tokenizer("qwen2_5")
    if rewrites:
        tokenizer.chat_template = COUNTING + tokenizer.chat_template
    settings = HEADS | {
        "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 512,
    }  # fmt: skip
    policy = PackedModel.checked(build(config(**settings)))
    sampling = GenerationConfig(max_completion_tokens=200, temperature=TEMPERATURE, stop=STOPS)
    engine = EmbeddedEngine(policy, tokenizer, sampling, nullcontext)
    ends = eos_token_ids(policy.model, tokenizer)
    kind = environment_kind(SmallTalk, None, params={"longest_pause_s": 0.02})
    world = World(EpisodeConfig(), [], {None: kind}, tokenizer, {}, ends)
    prompts = [
        Prompt(place, question, world._template.prompt_ids(question), {})
        for place, question in enumerate(QUESTIONS)
    ]
    driver = Driver(engine, 200, world)
    groups = driver.generate(prompts, [(3, 0, 0, place) for place in range(len(prompts))], 4)
    driver.close()
    return policy, Rollout(prompts, [completion for group in groups for completion in group], 4)


@pytest.mark.slow
@pytest.mark.parametrize("rewrites", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_of_turns_are_those_of_training(
    name: str, rewrites: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    policy, rollout = episodes(MODELS[name], rewrites=rewrites)
    shares = "gemma2" not in name
    assert policy.shares_prompts == shares
    turns = sum(completion.turns for completion in rollout.completions)
    assert turns >= 2.5 * len(rollout.completions)
    assert (watched.extended > 0) == (shares and not rewrites)
    assert (len(rollout.rows) == turns) == rewrites
    compared = 0
    with torch.no_grad():
        for pack in pack_groups(rollout.groups(), 10_000, shared_prompt=shares):
            logprobs, _ = policy.token_logprobs(pack, TEMPERATURE, entropy_gradient=False)
            for own, row in zip(logprobs, (rollout.rows[sample] for sample in pack.samples), strict=True):
                sampled = torch.tensor(row.sampled or [True] * len(row.token_ids))
                said = torch.tensor(row.logprobs)
                assert torch.equal(said.isnan(), ~sampled)
                of_row = own[: len(sampled)]
                torch.testing.assert_close(of_row[sampled], said[sampled], rtol=0, atol=1e-4)
                plain = plain_logprobs(policy.model, [*row.prompt_ids, *row.token_ids])[-len(sampled) :]
                torch.testing.assert_close(plain[sampled], said[sampled], rtol=0, atol=1e-4)
                compared += int(sampled.sum())
    assert compared == sum(completion.num_sampled for completion in rollout.completions)


def plain_logprobs(model: Any, token_ids: list[int]) -> torch.Tensor:
    """(T - 1,) of a plain forward pass without any code of ours."""
    ids = torch.tensor([token_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return (logits.float() / TEMPERATURE).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
