"""GRPO, top to bottom: generate, score, compare within groups, update, repeat.

A step is one rollout and its optimizer steps. Everything random in it follows from (seed, step), so that stopping
between two steps and going on elsewhere changes nothing.
"""

from __future__ import annotations

import torch

from grpo_cli.algorithm.advantages import compute_advantages
from grpo_cli.algorithm.losses import loss_normalizer, policy_loss
from grpo_cli.algorithm.packing import pack_groups, plan_minibatches
from grpo_cli.policy.logprobs import token_logprobs
from grpo_cli.rollout.rollout import generate_rollout
from grpo_cli.train.metrics import MetricMeans, StepClock, completion_metrics, reward_metrics
from grpo_cli.train.run import TRAIN_STREAM, Run
from grpo_cli.train.session import Session
from grpo_cli.train.update import OptimizerStep, StepTensors


def train_loop(run: Run, session: Session) -> None:
    """Train from the session's position to the last step.

    Args:
        run: the model, the data and the functions.
        session: what lasts over steps: optimizer, position, files, screen.

    Raises:
        RewardError: a reward function failed.
        RunError: a gradient was not finite, or a checkpoint could not be written.
        StoppedBySignal: after the checkpoint that a signal asked for.
    """
    config, loss_config = run.recipe.train, run.recipe.loss
    group_size, width = run.recipe.generation.num_generations, run.recipe.generation.max_completion_tokens
    temperature = run.recipe.generation.temperature

    for step in range(session.position.step, run.max_steps):
        run.seed_step(step)
        clock = StepClock()

        with clock("generate"):
            prompts = [run.dataset[index] for index in run.sampler.at(step)]
            rollout = generate_rollout(run.engine, prompts, (config.seed, TRAIN_STREAM, step), group_size)

        with clock("reward"):
            scores = run.scorer.score(rollout.scoring_batch(), step=step + 1)
            rewards = torch.from_numpy(scores)  # (N, K)
        advantages = compute_advantages(
            rewards, run.scorer.weights, group_size, loss_config.scale_rewards, loss_config.aggregation
        )  # (N,)

        with clock("train"):
            means = MetricMeans()
            groups = rollout.groups()
            minibatches = [
                pack_groups([groups[i] for i in part], run.token_budget, shared_prompt=run.shared_prompt)
                for part in plan_minibatches(len(groups), config.optimizer_steps_per_rollout)
            ]
            tensors = StepTensors.prepare(run, rollout, advantages, minibatches)
            for packs in minibatches * config.num_iterations:
                update = OptimizerStep(run, session, packs, tensors, step)
                normalizer = sum(loss_normalizer(tensors.mask_of(pack), loss_config, width) for pack in packs)
                for pack in map(run.to_device, packs):
                    with run.autocast():
                        logprobs, entropies = token_logprobs(
                            run.model, pack, temperature, entropy_gradient=loss_config.entropy_coef > 0
                        )
                    output = policy_loss(
                        logprobs,
                        tensors.old_logprobs_of(pack, logprobs),
                        tensors.advantages_of(pack),
                        tensors.mask_of(pack),
                        loss_config,
                        normalizer=normalizer,
                        ref_logprobs=tensors.ref_logprobs_of(pack),
                        sampling_logprobs=tensors.sampling_logprobs_of(pack),
                        entropies=entropies,
                        entropy_threshold=update.entropy_threshold,
                    )
                    update.backward(output)
                    means.add(output)
                update.apply(means)

        session.position = session.position.advance(rollout.num_tokens())
        metrics = means.result() | completion_metrics(rollout.completions)
        metrics |= reward_metrics(rewards, run.scorer.names, run.scorer.weights, group_size)
        session.finish_step(metrics, clock, rollout, rewards, advantages)
        if session.state.stop:
            break
