"""What ranks save in parts, and what they gather to save it, is what one process saves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_cli.distributed.ranks import Ranks
from grpo_cli.distributed.strategies.base import part_of_state
from grpo_cli.distributed.strategies.replicated import Replicated
from grpo_cli.errors import RunError
from grpo_cli.policy.load import load_policy
from grpo_cli.recipe.schema import ModelConfig
from grpo_cli.train.checkpoint import optimizer_file, save_final
from tests.conftest import tiny_llama
from tests.train.test_checkpoint import Parts, contents


class Gathering(Replicated):
    """Has its weights gathered one at a time, and no other than those that are."""

    shards_weights = True

    def __init__(self) -> None:
        super().__init__(Ranks(), max_grad_norm=1.0)
        self.held: list[torch.Tensor] = []

    @contextmanager
    def gathered(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        self.held = list(tensors)
        yield
        self.held = []

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        assert self.held
        return tensor


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "lora",
    [
        None,
        {"r": 2},
        {"r": 2, "target_modules": ["q_proj", "embed_tokens"]},
        {"r": 2, "modules_to_save": ["norm"]},
    ],
    ids=str,
)
def test_weights_that_are_gathered_are_saved_as_those_that_are_whole(
    tmp_path: Path, lora: dict[str, Any] | None, tied: bool
) -> None:
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "start")
    parts = Parts(
        load_policy(ModelConfig.model_validate({"name": str(tmp_path / "start"), "lora": lora})), steps=2
    )
    saved = []
    for name, strategy in (("whole", parts.strategy), ("gathered", Gathering())):
        strategy.prepare(parts.model, parts.optimizer)
        parts.strategy = strategy
        parts.save(tmp_path / name, 2)
        save_final(tmp_path / name, parts.learner())
        saved.append(contents(tmp_path / name))
    assert saved[0].keys() == saved[1].keys()
    assert any(name.startswith("final/model") for name in saved[0])
    for name, whole in saved[0].items():
        if name.endswith((".safetensors", ".json")):
            assert saved[1][name] == whole, name


def test_the_parts_of_the_optimizer_s_state_are_put_together_whoever_reads_them(tmp_path: Path) -> None:
    parts = Parts(steps=2)
    path = parts.save(tmp_path, 2)
    state = torch.load(path / "optimizer.pt", weights_only=True)
    (path / "optimizer.pt").unlink()
    for rank in range(3):
        torch.save(part_of_state(state, rank, 3), path / optimizer_file(rank, 3))
    assert {file.name for file in path.glob("optimizer*")} == {
        f"optimizer-0000{rank}-of-00003.pt" for rank in range(3)
    }
    other = Parts(tiny_llama(initializer_range=0.1))
    other.load(path)
    parts.step()
    other.step()
    for name, value in parts.weights().items():
        assert torch.equal(other.weights()[name], value), name
    (path / optimizer_file(1, 3)).unlink()
    with pytest.raises(RunError, match=r"checkpoint-000002 is damaged.*2 of the files optimizer"):
        other.load(path)
