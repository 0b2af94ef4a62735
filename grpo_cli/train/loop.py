"""GRPO (arXiv:2402.03300), top to bottom: sample, score, compare within groups, update, repeat.

For each prompt x the policy π_θ samples a group of G completions y_1 … y_G. Rewards give each a number r_i, and
what is better than its own group is made likelier: no value network is needed, since the group is the baseline.

A step is one rollout and its optimizer steps. Everything random in it follows from (seed, step), so that stopping
between two steps and going on elsewhere changes nothing.
"""

from __future__ import annotations

from grpo_cli.algorithm.sampler_correction import sampler_ratio
from grpo_cli.recipe.schema import Recipe
from grpo_cli.train.learner import Learner
from grpo_cli.train.recorder import Recorder
from grpo_cli.train.rollouts import Rollouts


def train_loop(recipe: Recipe, rollouts: Rollouts, learner: Learner, recorder: Recorder) -> None:
    """Train from the recorder's position to the last step.

    Args:
        recipe: of the run.
        rollouts: engine, rewards and prompts.
        learner: policy, reference and optimizer.
        recorder: position, files, screen.

    Raises:
        RewardError: a reward function failed.
        RunError: too many steps were skipped, the loss function failed, or a checkpoint could not be written.
        StoppedEarly: after the checkpoint that a signal asked for.
        ServerLost: a rollout server stays away; the recorder's position and the policy go together.
    """
    config, correction = recipe.loss, recipe.loss.sampler_correction

    for step in recorder.steps():
        # y_i ~ π_θ(· | x),  r_i = Σ_k w_k r_k(x, y_i),  A_i = (r_i - mean(r)) / (std(r) + 1e-4) over the group
        data = rollouts.collect(step, learner)

        with recorder.clock("train"):
            parts = learner.parts(data)  # the packs of each optimizer step; a pack holds whole groups
            old = learner.score(data, parts)  # log π_old, where a pack's own first pass will not give it

            for part in parts * recipe.train.num_iterations:
                learner.zero_grad()
                entropy_threshold = learner.entropy_threshold(part, data)

                for pack in map(learner.to_device, part.packs):
                    own = data.of(pack)
                    # log π_θ(y_t | x, y_<t) and the entropy H_t of π_θ(· | x, y_<t)
                    logprobs, entropies = learner.logprobs(pack)
                    old.keep(pack, logprobs)  # π_old = π_θ until the first update
                    old_logprobs = old.of(pack)
                    # π_old / π_sampler, where another engine sampled
                    ratio = None
                    if correction is not None:
                        ratio = sampler_ratio(old_logprobs, own.sampling_logprobs, own.mask, correction)
                    # ρ_t = π_θ / π_old,  L = Σ_t [-min(ρ_t A, clip(ρ_t, 1-ε, 1+ε) A) + β KL_t(π_θ || π_ref)] / Z
                    output = learner.loss(
                        logprobs,
                        old_logprobs,
                        own.advantages,
                        own.mask,
                        config,
                        normalizer=part.normalizer,
                        ref_logprobs=own.ref_logprobs,
                        sampling_logprobs=own.sampling_logprobs,
                        importance_ratio=ratio,
                        entropies=entropies,
                        entropy_threshold=entropy_threshold,
                        completion_tokens=own.completion_tokens,
                    )
                    learner.backward(output)  # += ∇_θ L of this pack
                learner.step(data)  # θ ← AdamW(θ, ∇_θ L clipped to max_grad_norm)

        recorder.finish(data, learner)  # log, evaluate, checkpoint, stop if asked to
