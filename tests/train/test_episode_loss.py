"""An optimizer step on episodes is the step that the tokens of the policy's turns give, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo_cli
from grpo_cli.rollout.engine import Turn
from tests.episode.scripted import Scripted
from tests.episode.small_talk import save_model
from tests.episode.trl_shapes import CounterEnv, counter_reward

RATE = 0.1
STEPS = ((1, 1, 2), (4,), (2, 2), ())
"""What each completion of a group adds to the count, one call a turn."""


def script(turn: Turn) -> str:
    steps = STEPS[turn.sample]
    if turn.number < len(steps):
        arguments = {"name": "increment", "arguments": {"step": steps[turn.number]}}
        return f"<tool_call>\n{json.dumps(arguments)}\n</tool_call>"
    return f"It is {sum(steps)}."


class Noted(Scripted):
    """Keeps what was said after what."""

    def turns(self) -> list[tuple[int, list[int], list[int]]]:
        """Of each turn the completion, all that was read, and the tokens that were said."""
        eos = self.tokenizer.eos_token_id
        said = [[*self.tokenizer(script(one), add_special_tokens=False)["input_ids"], eos] for one in self.asked]
        return [(one.completion, list(one.token_ids), ids) for one, ids in zip(self.asked, said, strict=True)]


def by_hand(model: Any, engine: Noted, loss_type: str) -> torch.Tensor:
    """The loss of turns, each a forward pass of its own over all that it read; no code of ours."""
    rewards = torch.tensor([float(sum(steps)) for steps in STEPS])
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    sums, counts = torch.zeros(len(STEPS)), torch.zeros(len(STEPS))
    for completion, context, said in engine.turns():
        logits = model(input_ids=torch.tensor([[*context, *said]]), use_cache=False).logits[
            0, len(context) - 1 : -1
        ]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(said)[:, None])[:, 0]
        ratio = (logprobs - logprobs.detach()).exp()
        sums[completion] = sums[completion] - (ratio * advantages[completion]).sum()
        counts[completion] += len(said)
    return sums.sum() / counts.sum() if loss_type == "dapo" else (sums / counts).mean()


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("rewrites", [False, True])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_a_step_on_episodes_is_that_of_the_turns_alone(
    loss_type: str, rewrites: bool, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a history that is written anew, too, where each turn is a row of its own and not a completion."""
    save_model(tmp_path / "model", rewrites=rewrites)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model, copy = (AutoModelForCausalLM.from_pretrained(tmp_path / "model") for _ in range(2))
    if not shared:
        monkeypatch.setattr("grpo_cli.policy.logprobs.PackedModel.shares_prompts", False)
    engine = Noted(tokenizer, script)
    grpo_cli.train(
        {
            "episode": {"max_turns": 5},
            "generation": {"num_generations": len(STEPS), "max_completion_tokens": 400},
            "loss": {"type": loss_type},
            "optim": {"scheduler": "constant", "max_grad_norm": 1e9},
            "train": {"output_dir": str(tmp_path / "run"), "max_steps": 1, "prompts_per_step": 1},
            "logging": {"trackers": [], "print_completions": 0},
        },
        model=model,
        tokenizer=tokenizer,
        train_data=[{"prompt": [{"role": "user", "content": "Count."}], "goal": 4}],
        environment=CounterEnv,
        rewards=counter_reward,
        engine=engine,
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
    )
    before = {name: value.detach().clone() for name, value in copy.named_parameters()}
    by_hand(copy.train(), engine, loss_type).backward()
    trained = dict(model.named_parameters())
    for name, parameter in copy.named_parameters():
        assert parameter.grad is not None
        step = (before[name] - trained[name].detach()) / RATE
        floor = 1e-5 * max(parameter.grad.abs().max().item(), 1.0)
        torch.testing.assert_close(
            step, parameter.grad, rtol=1e-3, atol=floor, msg=lambda text, n=name: f"{n}: {text}"
        )
