"""GRPO, top to bottom: generate, score, compare within groups, update, repeat.

A step is one rollout and its optimizer steps. Everything random in it follows from (seed, step), so that stopping
between two steps and going on elsewhere changes nothing.
"""

from __future__ import annotations

from grpo_cli.algorithm.losses import groups_to_forward, loss_normalizer
from grpo_cli.algorithm.packing import plan_minibatches
from grpo_cli.rollout.background import BackgroundScorer
from grpo_cli.train.collect import collect_groups, kept_advantages, rows_of
from grpo_cli.train.loss_function import resolve_loss
from grpo_cli.train.metrics import MetricMeans, StepClock, completion_metrics, reward_metrics
from grpo_cli.train.run import Run
from grpo_cli.train.session import Session
from grpo_cli.train.update import OptimizerStep, StepTensors, packs_of


def train_loop(run: Run, session: Session) -> None:
    """Train from the session's position to the last step.

    Args:
        run: the model, the data and the functions.
        session: what lasts over steps: optimizer, position, files, screen.

    Raises:
        RewardError: a reward function failed.
        RunError: a gradient was not finite, the loss function failed, or a checkpoint could not be written.
        StoppedEarly: after the checkpoint that a signal asked for.
        ServerLost: a rollout server stays away; the session's position and the policy go together.
    """
    config, loss_config = run.recipe.train, run.recipe.loss
    group_size, width = run.recipe.generation.num_generations, run.recipe.generation.max_completion_tokens
    temperature, loss_function = run.recipe.generation.temperature, resolve_loss(loss_config)
    scorer = BackgroundScorer(run.scorer, run.ranks)

    for step in range(session.position.step, run.max_steps):
        run.seed_step(step)
        clock = StepClock()

        with clock("sync"):
            sync_bytes = run.engine.update_weights(step)
        collected = collect_groups(run, scorer, step, clock)  # and scored, in part while others generate
        rollout, kept = collected.rollout, collected.kept
        with clock("train"):
            tensors = StepTensors.prepare(run, rollout, kept)  # while the last rewards are computed
        with clock("reward"):
            rewards = collected.rewards()  # (N, K)
        advantages = kept_advantages(run, rewards, kept)  # (N,)

        with clock("train"):
            means, groups = MetricMeans(), rollout.groups()
            forwarded = groups_to_forward(advantages, tensors.trained, group_size, loss_config)  # (P,)
            plan = plan_minibatches(len(kept), config.optimizer_steps_per_rollout)
            parts = [[kept[i] for i in part] for part in plan]
            minibatches = [packs_of(run, [groups[i] for i in part if forwarded[i]]) for part in parts]
            tensors.score_old(run, minibatches)
            for part, packs in list(zip(parts, minibatches, strict=True)) * config.num_iterations:
                update = OptimizerStep(run, session, packs, tensors, step)
                normalizer = loss_normalizer(tensors.mask[rows_of(part, group_size)], loss_config, width)
                for pack in map(run.to_device, packs):
                    with run.autocast():
                        logprobs, entropies = run.policy.token_logprobs(
                            pack, temperature, entropy_gradient=loss_config.entropy_coef > 0
                        )
                    output = loss_function(
                        logprobs,
                        tensors.old_logprobs_of(pack, logprobs),
                        tensors.share(advantages, pack),
                        tensors.mask_of(pack),
                        loss_config,
                        normalizer=normalizer,
                        ref_logprobs=tensors.ref_logprobs_of(pack),
                        sampling_logprobs=tensors.sampling_logprobs_of(pack),
                        importance_ratio=tensors.sampler_ratio_of(pack, logprobs, loss_config.sampler_correction),
                        entropies=entropies,
                        entropy_threshold=update.entropy_threshold,
                    )
                    update.backward(output)
                    means.add(output)
                update.apply(means)

        session.position = session.position.advance(rollout.num_tokens())
        metrics = means.result(run.ranks) | collected.metrics | completion_metrics(rollout.completions)
        metrics["frac_groups_skipped"] = 1 - forwarded[kept].sum().item() / len(groups)
        metrics["sync/bytes"] = sync_bytes
        metrics |= reward_metrics(rewards, run.scorer.names, run.scorer.weights, group_size)
        session.finish_step(metrics, clock, rollout, rewards, advantages)
        if session.state.stop:
            break
