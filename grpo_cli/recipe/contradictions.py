"""Pairs of settings that cannot both be meant.

Each finding names the key to change and what to write instead. Types and ranges are the schema's business;
this module only sees values that are valid one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from grpo_cli.recipe.data_config import DATA_FILE_SUFFIXES
from grpo_cli.recipe.episode import EpisodeConfig
from grpo_cli.recipe.loss_types import types_reading
from grpo_cli.recipe.schema import (
    LossConfig,
    OptimConfig,
    Recipe,
    TrainConfig,
)
from grpo_cli.recipe.section import Section
from grpo_cli.recipe.strategies import STRATEGIES, names_of
from grpo_cli.recipe.vllm_arguments import refused_vllm_arguments

Finding = tuple[str, str]
"""Dotted key, message."""


def contradictions(recipe: Recipe) -> Iterator[Finding]:
    """Yield every contradiction in a recipe as (dotted key, message)."""
    yield from _model_contradictions(recipe)
    yield from _reward_contradictions(recipe)
    yield from _loss_contradictions(recipe.loss)
    yield from _sampler_contradictions(recipe)
    yield from _engine_contradictions(recipe)
    yield from _replay_contradictions(recipe)
    yield from _optim_contradictions(recipe.optim)
    yield from _train_contradictions(recipe.train)
    yield from _distributed_contradictions(recipe)
    yield from _data_contradictions(recipe)
    if recipe.episode is not None:
        yield from _episode_contradictions(recipe.episode)


def _is_set(section: Section, key: str) -> bool:
    """Whether the recipe gives `key` a value of its own (repeating the default is no contradiction)."""
    return getattr(section, key) != type(section).model_fields[key].get_default(call_default_factory=True)


def _model_contradictions(recipe: Recipe) -> Iterator[Finding]:
    model = recipe.model
    if model.reference is not None and recipe.loss.beta == 0:
        yield (
            "model.reference",
            "is used only with loss.beta above 0; set loss.beta, or remove model.reference",
        )
    if model.reference is None and recipe.loss.beta > 0 and model.lora and model.lora.modules_to_save:
        yield (
            "model.lora.modules_to_save",
            "with loss.beta above 0 needs model.reference: switching the adapter off restores all weights",
        )
    if model.dtype == "bfloat16" and model.compute_dtype == "float32":
        yield "model.compute_dtype", "weights in bfloat16 are computed with in bfloat16; write dtype: float32 too"
    if model.gguf_file is not None and model.name.endswith(".gguf"):
        yield "model.gguf_file", "names a second GGUF file: model.name is one already; keep one of them"


OF_ROWS = ("params", "config", "split", "prompt_column", "columns", "prompt_template", "limit")
"""Keys of `data` that mean nothing without rows."""


def _data_contradictions(recipe: Recipe) -> Iterator[Finding]:
    for key, data in (("data", recipe.data), ("data.eval", recipe.data.eval)):
        if data is None:
            continue
        if data.split != "train" and data.name.endswith(DATA_FILE_SUFFIXES):
            yield f"{key}.split", f"{data.name} is a file and has no splits; remove it"
        if data.long_prompts != "drop" and data.max_prompt_tokens is None:
            yield f"{key}.long_prompts", f"does nothing without {key}.max_prompt_tokens; set it too"
        if data.long_prompts != "drop" and recipe.environments:
            yield f"{key}.long_prompts", "must be drop with an environment, which adds to prompts; remove it"
    if recipe.train.eval_every is not None and recipe.data.eval is None:
        yield "train.eval_every", "needs data.eval; add it, or remove train.eval_every"
    if recipe.data.name:
        return
    if not recipe.environments:
        yield "data.name", "is missing"
    elif None not in recipe.environments:
        yield "data.name", "is missing: each row's column environment says which of episode.environment it is for"
    elif recipe.train.epochs is not None:
        yield "train.epochs", "are passes over data, and there are none; write train.max_steps instead"
    for name in OF_ROWS:
        if recipe.environments and _is_set(recipe.data, name):
            yield f"data.{name}", "does nothing without data.name; set it too, or remove it"


def _episode_contradictions(episode: EpisodeConfig) -> Iterator[Finding]:
    if episode.environment == {}:
        yield "episode.environment", "names none; add one, or remove it"
    elif not episode.tools and episode.environment is None:
        yield "episode", "has neither tools nor an environment, so a completion is one turn; add one, or remove it"
    repeated = sorted({tool for tool in episode.tools if episode.tools.count(tool) > 1})
    if repeated:
        yield "episode.tools", f"names {', '.join(repeated)} twice; remove one"


def _reward_contradictions(recipe: Recipe) -> Iterator[Finding]:
    if not recipe.rewards and not recipe.environments:
        yield "rewards", "is missing or empty; name a reward function"
    names: dict[str, int] = {}
    for index, reward in enumerate(recipe.rewards):
        key = f"rewards.{index}"
        if (reward.path is None) == (reward.model is None):
            yield key, "needs exactly one of path (module:function) and model (a reward model)"
            continue
        name = reward.metric_name
        if name in names:
            yield (
                f"{key}.name",
                f"is {name!r}, as for rewards.{names[name]}; give one of them another name, "
                "or their metrics would be mixed",
            )
        names.setdefault(name, index)
        for setting in ("workers", "isolate"):
            if reward.model is not None and getattr(reward, setting):
                yield (
                    f"{key}.{setting}",
                    "is for functions: a reward model needs the device that generates; remove it",
                )
    if recipe.rewards and not recipe.environments and all(reward.weight == 0 for reward in recipe.rewards):
        yield "rewards", "every weight is 0, so nothing would be learned; set a weight"


def _loss_contradictions(loss: LossConfig) -> Iterator[Finding]:
    if loss.is_function:
        if loss.top_entropy_quantile < 1:
            yield (
                "loss.top_entropy_quantile",
                f"is taken over a whole step, and {loss.type} sees a micro-batch of it; remove it",
            )
    else:
        yield from _contradictions_of_type(loss)
    if loss.aggregation == "normalize_then_sum" and _is_set(loss, "scale_rewards"):
        yield (
            "loss.scale_rewards",
            "aggregation normalize_then_sum scales by group and then by step; remove scale_rewards",
        )
    if loss.aggregation == "normalize_then_sum" and loss.drop_zero_variance_groups:
        yield (
            "loss.drop_zero_variance_groups",
            "looks at the weighted sum of the rewards, but with aggregation normalize_then_sum a group can have "
            "advantages where that is the same for all; remove one of them",
        )


def _contradictions_of_type(loss: LossConfig) -> Iterator[Finding]:
    """Keys that a built-in type has no use for; a user's own function may read any."""
    for key in type(loss).model_fields:
        readers = types_reading(key)
        if not readers or loss.type in readers or not _is_set(loss, key):
            continue
        if len(readers) == 1:
            yield f"loss.{key}", f"is used only by type {readers[0]} (type is {loss.type}); remove it"
        else:
            yield f"loss.{key}", f"is not used by type {loss.type}; remove it"
    if loss.row.weighs_completions and loss.importance_level == "sequence":
        yield "loss.importance_level", f"{loss.type} weighs whole completions already; remove it"
    if loss.delta is not None and "delta" in loss.row.reads and loss.delta <= 1 + loss.clip_high:
        yield "loss.delta", f"must lie above 1 + epsilon_high = {1 + loss.clip_high:g}; raise it or remove it"
    if loss.beta == 0:
        for key in ("bias_corrected_kl", "kl_estimator"):
            if _is_set(loss, key):
                yield f"loss.{key}", "needs loss.beta above 0; set loss.beta, or remove it"


def _sampler_contradictions(recipe: Recipe) -> Iterator[Finding]:
    loss, correction = recipe.loss, recipe.loss.sampler_correction
    if correction is not None:
        key = "loss.sampler_correction"
        if not loss.is_function and loss.row.weighs_completions and correction.mode.startswith("sequence"):
            mode = correction.mode.replace("sequence", "token")
            yield f"{key}.mode", f"weighs whole completions, as type {loss.type} does by itself; write {mode}"
        low, high = correction.clip_min or 0.0, correction.clip_max or math.inf
        if correction.clip_min is None and correction.clip_max is None:
            yield f"{key}.clip_max", "is empty, as clip_min is, so nothing bounds the weights; write 3.0"
        elif low >= high:
            yield f"{key}.clip_min", f"must lie below clip_max = {high:g}; lower it, or raise clip_max"
        elif not low <= 1 <= high:
            yield (
                key,
                f"bounds weights to {low:g}..{high:g}, but where nothing is to correct they are 1; include it",
            )
    users = " and ".join(
        f"loss.{key}" for key in ("sampler_correction", "off_policy_threshold") if getattr(loss, key) is not None
    )
    if users and recipe.generation.engine in ("vllm", "vllm_server"):
        for key in recipe.generation.filters:
            yield (
                f"generation.{key}",
                f"changes the distribution whose log-probabilities {recipe.generation.engine} reports, and "
                f"{users} would compare it with the policy's unchanged one; remove {key}, or {users}",
            )


def _engine_contradictions(recipe: Recipe) -> Iterator[Finding]:
    generation = recipe.generation
    server, engine = generation.server, generation.engine
    if engine != "vllm_server" and server is not None:
        yield "generation.server", f"is for engine: vllm_server (it is {engine}); remove it, or change the engine"
    elif engine == "vllm_server" and (server is None or bool(server.urls) == server.spawn):
        yield (
            "generation.server",
            "needs exactly one of urls (servers that run) and spawn: true (one that this run starts)",
        )
    elif server is not None and server.urls:
        for key in ("port", "tensor_parallel_size"):
            if _is_set(server, key):
                yield f"generation.server.{key}", "is for spawn: true; the servers in urls have their own"
        if len(set(server.urls)) < len(server.urls):
            yield "generation.server.urls", "names a server twice; remove one"
    elif server is not None and server.api_key_file is not None:
        yield "generation.server.api_key_file", "is for urls; a spawned server has a key of its own"
    if generation.vllm and (engine in ("transformers", "replay") or (server is not None and not server.spawn)):
        yield "generation.vllm", "has no server or engine to go to; pass the options to grpo serve, or remove it"
    for name, reason in refused_vllm_arguments(generation.vllm, recipe.model.trust_remote_code):
        yield f"generation.vllm.{name}", reason


def _replay_contradictions(recipe: Recipe) -> Iterator[Finding]:
    generation = recipe.generation
    if generation.engine != "replay":
        if generation.replay is not None:
            yield "generation.replay", f"is for engine: replay (it is {generation.engine}); remove it"
        return
    if generation.replay is None:
        yield "generation.replay", "is missing: the folder of the run whose completions are to be trained on"
    if recipe.data.eval is not None:
        yield "data.eval", "engine replay generates nothing, so nothing can be evaluated; remove data.eval"


def _optim_contradictions(optim: OptimConfig) -> Iterator[Finding]:
    if optim.name == "adamw":
        if optim.params:
            yield "optim.params", "is for a factory; adamw takes betas and weight_decay"
    elif ":" not in optim.name:
        yield "optim.name", f"must be adamw or module:factory, not {optim.name!r}"
    else:
        for key in ("betas", "weight_decay"):
            if _is_set(optim, key):
                yield f"optim.{key}", f"is for adamw; write it into optim.params for {optim.name}"
    if optim.warmup_ratio and optim.scheduler == "constant":
        yield "optim.scheduler", "constant has no warm-up; write constant_with_warmup, or remove warmup_ratio"
    if optim.scheduler == "constant_with_warmup" and not optim.warmup_ratio:
        yield (
            "optim.warmup_ratio",
            "constant_with_warmup needs it above 0; set it, or write scheduler: constant",
        )


def _train_contradictions(train: TrainConfig) -> Iterator[Finding]:
    if train.max_steps is None and train.epochs is None:
        yield "train.max_steps", "is missing; set it, or train.epochs"
    if train.max_steps is not None and train.epochs is not None:
        yield "train.max_steps", "says how long to train, and so does train.epochs; remove one of them"
    if train.optimizer_steps_per_rollout > train.prompts_per_step:
        yield (
            "train.optimizer_steps_per_rollout",
            f"is {train.optimizer_steps_per_rollout}, more than train.prompts_per_step "
            f"({train.prompts_per_step}); a group is never split, so lower it or raise prompts_per_step",
        )


def _distributed_contradictions(recipe: Recipe) -> Iterator[Finding]:
    distributed, key = recipe.distributed, "distributed"
    strategy, processes = distributed.strategy, distributed.processes or 1
    traits = None if strategy == "auto" else STRATEGIES[strategy]
    if traits and traits.for_one_process and processes > 1:
        yield (
            f"{key}.strategy",
            f"{strategy} is for one process (processes is {processes}); write auto, or processes: 1",
        )
    if distributed.deepspeed_config is not None and traits and not traits.uses_deepspeed:
        which = names_of(lambda row: row.uses_deepspeed, "and")
        yield f"{key}.deepspeed_config", f"is for {which} (strategy is {strategy}); remove it"
    if distributed.cpu_offload and distributed.deepspeed_config is not None:
        yield f"{key}.cpu_offload", "is set in deepspeed_config; remove it here"
    elif distributed.cpu_offload and not (traits and traits.can_offload):
        which = names_of(lambda row: row.can_offload, "or")
        yield f"{key}.cpu_offload", f"needs {which} (strategy is {strategy}); set strategy"
    if recipe.generation.engine == "vllm" and processes > 1:
        yield (
            "generation.engine",
            f"vllm is for one process (distributed.processes is {processes}); write vllm_server",
        )
