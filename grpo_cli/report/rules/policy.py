"""Where the policy goes, and whether its updates arrive."""

from __future__ import annotations

from grpo_cli.recipe.schema import GenerationConfig
from grpo_cli.report.curves import change, known, latest
from grpo_cli.report.finding import Finding
from grpo_cli.report.rules.learning import has_learned
from grpo_cli.report.run import Run

COLLAPSED, SURE_OF_IT = 0.25, 0.1
"""Share of its first entropy under which a policy that does not learn, or whose groups have lost their spread, has
hardly a choice left; and under which that is too little for one that learns, which has found out what is rewarded:
the guessing game's keeps 0.23."""

ENOUGH = 5
"""Steps after which an entropy is not that of a few odd prompts."""

FAR = 1.0
"""Nats a token: what the policy says is then e times likelier, each token, than under the reference."""

MUCH_CLIPPED = {"token": 0.3, "sequence": 0.9}
"""Share of tokens without a gradient, by loss.importance_level. A ratio per completion clips two orders of
magnitude more than one per token, and learns (GSPO, arXiv:2507.18071)."""

FAR_OVER_LIMIT = 3.0
"""Median of gradient norm over optim.max_grad_norm from which on the length of the update is the limit's doing."""

MISMATCH = 0.05
"""Mean |log p - log p'| of sampled tokens. vLLM in bfloat16 makes 0.012 in a run that TRL's issue 4772 reports."""


def entropy_collapse(run: Run) -> Finding | None:
    """The policy says the same whenever it is asked."""
    _, entropies = run.points("entropy")
    last, learned = latest(entropies), has_learned(run)
    if len(entropies) < ENOUGH or last is None:
        return None
    flat = latest(run.series("frac_reward_zero_std")) or 0.0
    is_stuck = not learned or flat >= 0.5
    if not last < (COLLAPSED if is_stuck else SURE_OF_IT) * entropies[0]:
        return None
    beta = run.recipe.loss.beta
    kl = "loss.beta is 0, so nothing held it near the first model, and how far it went was not measured"
    if beta:
        kl = f"the KL of weight loss.beta: {beta:g} did not hold it"
    gained = "though the reward rose" if learned else "and the reward did not rise"
    return Finding(
        "entropy_collapse",
        0.85 if not learned else 0.6 if is_stuck else 0.45,
        f"The entropy fell from {entropies[0]:.3g} to {last:.2g} nats a token, {gained}; {flat:.0%} of the last "
        "groups have equal rewards.",
        f"Without other completions to compare, nothing more is learned; {kl}.",
        f"Set loss.entropy_coef: {10 * run.recipe.loss.entropy_coef or 0.001:g}, "
        + f"loss.beta: {4 * beta or 0.04:g}"
        + (", loss.epsilon_high: 0.28" if _passes(run) > 1 and _clips(run) else "")
        + f" or half of optim.learning_rate ({run.recipe.optim.learning_rate / 2:.3g}); or stop before.",
    )


def kl_running_away(run: Run) -> Finding | None:
    """The policy is far from its reference. Without a reference there is no such number."""
    kl = change(run.series("kl"))
    if kl is None or kl.last < FAR:
        return None
    beta = run.recipe.loss.beta
    return Finding(
        "kl_running_away",
        0.5 if has_learned(run) else 0.75,
        f"The KL to the reference went {kl} nats a token.",
        "The policy has left the language of its reference: rewards may rise by what no reader would call better.",
        f"Raise loss.beta from {beta:g} to {4 * beta:g}, or lower optim.learning_rate from "
        f"{run.recipe.optim.learning_rate:.3g} to {run.recipe.optim.learning_rate / 3:.2g}.",
    )


def clipped_ratio(run: Run) -> Finding | None:
    """Most tokens are clipped, so they have no gradient. CISPO's keep theirs, so their share is no reason."""
    share = latest(run.series("clip_ratio/region_mean"))
    if share is None or share < MUCH_CLIPPED[run.recipe.loss.importance_level]:
        return None
    passes = _passes(run)
    fewer = "set train.num_iterations: 1 and train.optimizer_steps_per_rollout: 1, or " if passes > 1 else ""
    return Finding(
        "clipped_ratio",
        0.4 + 0.5 * min(share, 1.0),
        f"{share:.0%} of the tokens of the last steps were clipped (clip_ratio/region_mean).",
        f"The policy moves past the clip range within the {passes} optimizer steps of a rollout, and then learns "
        "nothing from its tokens.",
        f"Have each rollout make less of a change: {fewer}lower optim.learning_rate from "
        f"{run.recipe.optim.learning_rate:.3g} to {run.recipe.optim.learning_rate / 3:.2g}.",
    )


def gradient_clipped(run: Run) -> Finding | None:
    """The gradient is scaled down in most steps."""
    limit, norms = run.recipe.optim.max_grad_norm, sorted(known(run.series("grad_norm")))
    if len(norms) < 2:
        return None
    share, middle = sum(norm > limit for norm in norms) / len(norms), norms[len(norms) // 2]
    if share < 0.5 or middle < FAR_OVER_LIMIT * limit:
        return None
    usual = norms[int(0.9 * (len(norms) - 1))]
    is_adamw = run.recipe.optim.name == "adamw"
    return Finding(
        "gradient_clipped",
        0.1 if is_adamw else 0.3,
        f"The gradient norm is over optim.max_grad_norm ({limit:g}) in {share:.0%} of the steps, {middle:.3g} at "
        "the median.",
        "Each step is scaled down, so that large gradients count no more than small ones"
        + (": AdamW divides by their size anyway, so this seldom costs much." if is_adamw else "."),
        f"Set optim.max_grad_norm: {usual:.2g}, which is over nine in ten steps, if the rewards are as they "
        "should be.",
    )


def sampler_mismatch(run: Run) -> Finding | None:
    """What sampled the completions does not agree with the policy about them."""
    apart = change(run.series("sampling/sampling_logp_difference/mean"))
    generation = run.recipe.generation
    if apart is None or apart.last < MISMATCH or generation.engine == "replay":
        return None
    corrected = run.recipe.loss.sampler_correction is not None
    grows = apart.rose and apart.last > 2 * apart.first
    return Finding(
        "sampler_mismatch",
        (0.3 if corrected else 0.55) + (0.1 if grows else 0.0),
        f"Log-probabilities of sampler and policy differ by {apart.last:.3g} on average ({apart.first:.3g} in "
        "the first steps).",
        "What is trained is not quite what sampled, so the gradient is not quite that of the reward"
        + (", and less so with every step." if grows else "."),
        ("" if corrected else "Set loss.sampler_correction: {}. ") + _closer(generation),
    )


def skipped_steps(run: Run) -> Finding | None:
    """Optimizer steps were left out, since their numbers were not finite."""
    steps, counts = run.points("train/skipped_steps")
    skipped = sum(known(counts))
    if skipped <= 0:
        return None
    total = max(len(run.rows) * _passes(run), skipped)
    when = [step for step, count in zip(steps, counts, strict=True) if count]
    return Finding(
        "skipped_steps",
        min(0.3 + skipped / total, 0.9),
        f"{skipped:g} of {total:g} optimizer steps were skipped, the first of them in step {when[0]}.",
        "Loss or gradient were not finite there, so nothing was learned from those completions.",
        f"Lower optim.learning_rate from {run.recipe.optim.learning_rate:.3g} to "
        f"{run.recipe.optim.learning_rate / 3:.2g}; {_more_exact(run)}look for rewards of a size out of "
        "proportion.",
        (when[0], when[-1]),
    )


def _clips(run: Run) -> bool:
    """Whether loss.epsilon_high bounds the ratio. It is not used by others, and of CISPO another size."""
    loss = run.recipe.loss
    return not loss.is_function and loss.row.surrogate == "clipped"


def _closer(generation: GenerationConfig) -> str:
    """What brings sampler and policy together, by who starts the sampler."""
    if generation.engine == "transformers":
        return "The gap itself comes from rounding: set model.compute_dtype: float32."
    is_ours = generation.engine == "vllm" or (generation.server is not None and generation.server.spawn)
    how = "generation.vllm: {dtype: float32}" if is_ours else "grpo serve with --dtype float32"
    return f"The gap itself comes from the engine: {how}, or a model.dtype as it uses."


def _more_exact(run: Run) -> str:
    model = run.recipe.model
    if model.dtype == "bfloat16":
        return "set model.dtype: float32; "
    return "set model.compute_dtype: float32; " if model.compute_dtype != "float32" else ""


def _passes(run: Run) -> int:
    """Optimizer steps of a rollout. In the first of them policy and old policy are the same, and nothing is
    clipped."""
    return run.recipe.train.num_iterations * run.recipe.train.optimizer_steps_per_rollout
