"""Where a step's completions come from: prompts, the engine that generates, the rewards that score.

All randomness of a completion follows from (seed, stream, step, prompt, sample), so a step that is run again gives
the same completions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from grpo_cli.algorithm.advantages import compute_advantages, flat_groups
from grpo_cli.algorithm.losses import groups_to_forward
from grpo_cli.algorithm.packing import Group
from grpo_cli.data.prompts import PromptDataset
from grpo_cli.data.sampler import PromptSampler
from grpo_cli.distributed.environment import placement
from grpo_cli.distributed.ranks import Ranks
from grpo_cli.episode.environments import seconds_of_environments
from grpo_cli.errors import RunError
from grpo_cli.recipe.schema import Recipe
from grpo_cli.record.metrics import Metrics
from grpo_cli.reward.hooks import Logged, TrainerState, extra_columns, logged_metrics, state_of_run
from grpo_cli.reward.scorer import Scorer
from grpo_cli.rollout.background import BackgroundScorer, RolloutScores
from grpo_cli.rollout.engine import RolloutEngine
from grpo_cli.rollout.rollout import Rollout, generate_rollout
from grpo_cli.train.evaluate import PASS_REWARD, evaluate
from grpo_cli.train.metrics import StepClock, completion_metrics, episode_metrics, reward_metrics
from grpo_cli.train.step_data import StepData, rows_of, token_tensors, trained_completions

TRAIN_STREAM = 0
"""Rollouts draw from this stream of random numbers; evaluations have their own."""

MAX_RESAMPLE_ROUNDS = 4
"""Times that `drop_zero_variance_groups: resample` generates further prompts for one step."""


class ReferenceScorer(Protocol):
    """What a rollout needs of the learner."""

    def reference_logprobs(self, groups: Sequence[Group], shape: torch.Size) -> torch.Tensor | None:
        """(R, T) log π_ref of these groups' tokens, 0 elsewhere; None without a reference."""
        ...


@dataclass(frozen=True)
class SampledGroups:
    """The groups of a step, some of whose rewards may be on their way."""

    rollout: Rollout
    kept: list[int]
    """The groups that the step trains on."""
    rewards: Callable[[], torch.Tensor]
    """Completes the (N, K) rewards."""
    rounds: list[RolloutScores]
    """In the order of the groups; what reward functions have logged is there once the rewards are."""
    metrics: Metrics

    def logged(self) -> list[Logged]:
        """What reward functions have logged of all completions."""
        logged: list[Logged] = []
        first = 0
        for part in self.rounds:
            logged += [call.at(range(first, first + part.count)) for call in part.logged]
            first += part.count
        return logged


@dataclass
class Rollouts:
    """Generates, scores and compares completions.

    Raises:
        RewardError: from `collect` and `evaluate`: a reward function failed.
        ServerLost: from the same: a rollout server stays away.
    """

    recipe: Recipe
    ranks: Ranks
    engine: RolloutEngine
    scorer: Scorer
    dataset: PromptDataset
    eval_dataset: PromptDataset | None
    sampler: PromptSampler
    clock: StepClock = field(default_factory=StepClock)
    num_tokens: int = 0
    """Of the steps done, as the recorder counts them."""

    def __post_init__(self) -> None:
        # Rank 0 speaks with the servers, so it plays all episodes; an engine of a caller's own is each rank's.
        plays_on_main = self.ranks.world_size > 1 and self.recipe.generation.engine == "vllm_server"
        self._background = BackgroundScorer(self.scorer, self.ranks, plays_on_main=plays_on_main)

    @property
    def max_steps(self) -> int:
        return self.recipe.train.number_of_steps(len(self.dataset))

    @property
    def generates(self) -> bool:
        """Whether the engine makes completions for any prompt, and not only for those that a run has stored."""
        return self.recipe.generation.engine != "replay"

    @property
    def group_size(self) -> int:
        return self.recipe.generation.num_generations

    def state(self, step: int) -> TrainerState:
        """What reward functions on this rank are told of the run after `step` steps."""
        return replace(
            state_of_run(self.recipe, len(self.dataset), step),
            num_input_tokens_seen=self.num_tokens,
            is_local_process_zero=placement(os.environ).local_rank == 0,
            is_world_process_zero=self.ranks.is_main,
        )

    def collect(self, step: int, reference: ReferenceScorer) -> StepData:
        """Generate the groups of a step with the policy's present weights, score them and compare them.

        Reward functions with workers score a group as soon as it is finished. While the last of them are at work,
        the reference's log-probabilities are computed.
        """
        loss = self.recipe.loss
        with self.clock("sync"):
            sync_bytes = self.engine.update_weights(step)
        try:
            groups = self._sample(step)
        finally:
            self.engine.release_memory()
        rollout, kept = groups.rollout, groups.kept
        with self.clock("train"):
            trained = trained_completions(rollout, mask_truncated=loss.mask_truncated)  # (N,)
            mask, sampling_logprobs = token_tensors(rollout, trained)  # (R, T)
            needed = groups_to_forward(torch.zeros(len(trained)), trained, self.group_size, loss)  # (P,)
            packed = rollout.groups()
            ref_logprobs = reference.reference_logprobs([packed[i] for i in kept if needed[i]], mask.shape)
        with self.clock("reward"):
            rewards = groups.rewards()  # (N, K)
        logged = groups.logged()
        advantages = self._advantages(rewards, kept)  # (N,)
        forwarded = groups_to_forward(advantages, trained, self.group_size, loss)  # (P,)
        metrics = groups.metrics | completion_metrics(rollout.completions)
        if self.generates:  # a replay calls nothing
            metrics |= episode_metrics(rollout.completions)
        metrics["frac_groups_skipped"] = 1 - forwarded[kept].sum().item() / len(packed)
        metrics["sync/bytes"] = sync_bytes
        metrics |= reward_metrics(rewards, self.scorer.names, self.scorer.weights, self.group_size)
        metrics |= seconds_of_environments(self.scorer.functions) | logged_metrics(logged)
        epoch = self.sampler.epoch(step + 1)
        return StepData(
            step,
            rollout,
            kept,
            rewards,
            advantages,
            torch.tensor(rollout.row_owners),
            mask,
            sampling_logprobs,
            ref_logprobs,
            forwarded,
            epoch,
            metrics,
            extra_columns(logged, self.scorer.names, len(rewards)),
        )

    def _sample(self, step: int) -> SampledGroups:
        """Generate the groups of a step and decide which of them it trains on.

        Where zero-variance groups are dropped, this waits for the rewards. With `resample`, as many further
        prompts as groups are missing are generated, up to MAX_RESAMPLE_ROUNDS times (DAPO's dynamic sampling,
        arXiv:2503.14476).
        """
        drop, wanted = self.recipe.loss.drop_zero_variance_groups, self.recipe.train.prompts_per_step
        rollout, scores = self._generate(step, self.sampler.at(step), first=0)
        if not drop:
            kept = [index for index in range(wanted) if not rollout.is_lost(index)]
            return SampledGroups(rollout, kept, lambda: torch.from_numpy(scores.result(rollout)), [scores], {})
        rewards = self._wait(scores, rollout)
        kept = self._with_spread(rewards)
        rounds = [scores]
        while drop == "resample" and len(kept) < wanted and len(rounds) <= MAX_RESAMPLE_ROUNDS:
            first = len(rollout.prompts)
            indices = self.sampler.further(step, first - wanted, wanted - len(kept))
            more, scores = self._generate(step, indices, first=first)
            rewards = torch.cat([rewards, self._wait(scores, more)])
            rounds.append(scores)
            rollout = Rollout.joined([rollout, more])
            kept = self._with_spread(rewards)
        counts = {"resample/rounds": len(rounds) - 1, "resample/generated_groups": len(rollout.prompts)}
        return SampledGroups(rollout, kept, lambda: rewards, rounds, dict(counts) if drop == "resample" else {})

    def _generate(self, step: int, indices: Sequence[int], first: int) -> tuple[Rollout, RolloutScores]:
        key = (self.recipe.train.seed, TRAIN_STREAM, step)
        with self.clock("generate"), self._background.begin(step + 1, self.state(step)) as scores:
            prompts = [self.dataset[index] for index in indices]
            rollout = generate_rollout(
                self.engine, prompts, key, self.group_size, first=first, on_group=scores.add
            )
        if all(map(rollout.is_lost, range(len(prompts)))):
            raise RunError(f"step {step + 1}: no environment could be reset; the notes above say why")
        return rollout, scores

    def _wait(self, scores: RolloutScores, rollout: Rollout) -> torch.Tensor:
        with self.clock("reward"):
            return torch.from_numpy(scores.result(rollout))

    def _with_spread(self, rewards: torch.Tensor) -> list[int]:
        """Indices of the groups whose weighted rewards, from (N, K), are not all the same."""
        flat = flat_groups(rewards, self.scorer.weights, self.group_size)
        indices: list[int] = (~flat).nonzero().flatten().tolist()
        return indices

    def _advantages(self, rewards: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
        """(N,) from the (N, K) rewards of the kept groups alone, 0 for the others."""
        loss = self.recipe.loss
        advantages = torch.zeros(len(rewards))
        if kept:
            rows = rows_of(kept, self.group_size)
            advantages[rows] = compute_advantages(
                rewards[rows], self.scorer.weights, self.group_size, loss.scale_rewards, loss.aggregation
            )
        return advantages

    def evaluate(self, step: int, pass_at: Sequence[int] = (), pass_reward: float = PASS_REWARD) -> Metrics:
        """Mean reward, pass@k and lengths on the held-out prompts, which there must be; see `evaluate`."""
        assert self.eval_dataset is not None
        self.engine.update_weights(step)
        metrics = evaluate(
            self.engine,
            self._background,
            self.eval_dataset,
            seed=self.recipe.train.seed,
            step=step,
            num_generations=self.group_size,
            prompts_per_batch=self.recipe.train.prompts_per_step,
            pass_at=pass_at,
            pass_reward=pass_reward,
            state=self.state(step),
        )
        self.engine.release_memory()
        return metrics
