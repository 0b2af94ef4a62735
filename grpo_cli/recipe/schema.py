"""The recipe: every setting of a run, declared once.

The CLI, the reference page (`docs/recipe.md`) and the error messages all come from these models. This module
must never import torch, so that `grpo check` and `--help` answer at once. A key exists only from the day it works.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from grpo_cli.recipe.addresses import server_url
from grpo_cli.recipe.data_config import DataConfig
from grpo_cli.recipe.episode import EnvironmentConfig, EpisodeConfig
from grpo_cli.recipe.loss_types import LOSS_TYPES, LossType, known_type
from grpo_cli.recipe.paths import possible_path
from grpo_cli.recipe.sampling import Sampling
from grpo_cli.recipe.section import LONGEST_WAIT_S, Section
from grpo_cli.recipe.strategies import StrategyName

REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What every reward function is given beside the columns; no column may have one of these names."""

Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]

MOST_EPOCHS = 1e9
"""So many times the rows of any data set is a number of steps that can be counted."""


class LoraConfig(Section):
    r: int = Field(default=16, ge=1)
    """Rank of the adapter matrices."""
    alpha: float = Field(default=32, gt=0)
    """Scale: the adapter's output is multiplied by `alpha / r`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    target_modules: str | list[str] = "all-linear"
    """Names of the modules that get an adapter, or `all-linear`."""
    modules_to_save: list[str] = []
    """Names of modules trained in full beside the adapters."""


class ModelConfig(Section):
    _paths = field_validator("name", "tokenizer", "reference")(possible_path)

    name: str = Field(min_length=1)
    """Hub id, folder, or `.gguf` file of the model to train."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the trained weights. An update of 1e-6 vanishes in bfloat16."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of forward and backward: `auto` is bfloat16 autocast where the GPU has it, else float32."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer; the model's own if empty."""
    chat_template: str | None = None
    """Jinja chat template, or a file that holds one; the tokenizer's own if empty."""
    chat_template_kwargs: dict[str, Any] = {}
    """Extra variables for the chat template, such as `enable_thinking: false`."""
    gguf_file: str | None = None
    """Name of the GGUF file inside `name`; it is dequantised to `dtype` when loaded."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention kernel: `auto` is the model's own default. Prompts are shared under `auto` and `sdpa` only."""
    trust_remote_code: bool = False
    """Allow a Hub model to run its own Python code."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights. The adapters are float32, also over `dtype: bfloat16`."""
    reference: str | None = None
    """Hub id or folder of the KL reference; the start policy if empty. Needs `loss.beta` above 0."""


class RewardConfig(Section):
    _paths = field_validator("model")(possible_path)

    path: str | None = None
    """`module:function`, or the short name of an installed reward function."""
    model: str | None = None
    """Hub id or folder of a sequence-classification reward model with one output."""
    name: str | None = None
    """Name in metrics and tables; the function's or model's own if empty."""
    weight: float = 1.0
    """Factor in the weighted sum."""
    params: dict[str, Any] = {}
    """Keyword arguments: of `__init__` for a class, otherwise bound to the function."""
    timeout_s: float | None = Field(default=None, gt=0, le=LONGEST_WAIT_S)
    """Longest time for one call, in seconds; no limit if empty."""
    on_error: Literal["raise", "none"] = "raise"
    """When a call fails: `raise` ends the run, `none` counts its completions as not scored."""
    workers: int = Field(default=0, ge=0)
    """Threads that score each group while others still generate; 0 is one call with all, on the main thread."""
    isolate: bool = False
    """Call the function in a process of its own, one per worker, that `timeout_s` ends and that may crash."""

    @property
    def metric_name(self) -> str:
        """Name in metrics: `name`, or the last part of the path or model."""
        source = self.path or self.model or ""
        return self.name or re.split(r"[:/]", source.rstrip("/"))[-1]


def reward_from_string(value: Any) -> Any:
    """`rewards.length:reward_len` is short for `{path: rewards.length:reward_len}`."""
    return {"path": value} if isinstance(value, str) else value


class ServerConfig(Section):
    _paths = field_validator("api_key_file")(possible_path)

    urls: list[Annotated[str, AfterValidator(server_url)]] = []
    """Servers that run already: `HOST[:PORT]` or URL. All get the weights, and share the prompts by load."""
    spawn: bool = False
    """Start a server on this machine, and stop it at the end."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the spawned server; a free one if empty."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs of the spawned server."""
    api_key_file: str | None = None
    """File with the key of the servers in `urls`, the same as their `--api-key-file`."""
    timeout_s: float = Field(default=600, gt=0, le=LONGEST_WAIT_S)
    """Longest time that a server may be silent or away; then the run ends with a checkpoint."""


class EngineConfig(Section):
    """The first keys of `GenerationConfig`, which come before those of `Sampling` as its last base class."""

    engine: Literal["transformers", "vllm", "vllm_server", "replay"] = "transformers"
    """What generates completions: `transformers` the policy itself, `vllm` vLLM in the training process,
    `vllm_server` one or several `grpo serve`; `replay` takes those that a run has stored."""
    num_generations: int = Field(default=8, ge=2)
    """Completions per prompt: the size of a group."""


class GenerationConfig(Sampling, EngineConfig):
    _paths = field_validator("replay")(possible_path)

    server: ServerConfig | None = None
    """The servers of `engine: vllm_server`."""
    vllm: dict[str, Any] = {}
    """vLLM's engine arguments, such as `max_model_len: 4096`, for `engine: vllm` and for a spawned server."""
    replay: str | None = None
    """Folder of the run whose completions `engine: replay` trains on again."""


class SamplerCorrectionConfig(Section):
    mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "token_truncate"
    """Weigh each token, or each completion as a whole; a weight outside the bounds is moved to the bound
    (truncate) or becomes 0 (mask)."""
    clip_min: float | None = Field(default=None, gt=0)
    """Lower bound of the weight, policy over sampler; none if empty."""
    clip_max: float | None = Field(default=3.0, gt=0)
    """Upper bound of the weight; none if empty."""


class LossConfig(Section):
    type: Annotated[str, BeforeValidator(known_type)] = Field(
        default="dapo", examples=[*LOSS_TYPES, "module:function"]
    )
    """How token losses are formed and averaged, or a function of your own; see `docs/losses.md`."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL to the reference; 0 loads no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL per token; k3 is unbiased and never negative."""
    bias_corrected_kl: bool = False
    """Multiply the KL by the importance ratio, which makes its gradient unbiased off-policy."""
    epsilon: float = Field(default=0.2, ge=0)
    """The ratio is clipped below at `1 - epsilon`."""
    epsilon_high: float | None = Field(default=None, ge=0)
    """The ratio is clipped above at `1 + epsilon_high`; `epsilon` if empty. For cispo the bound itself [5.0]."""
    delta: float | None = Field(default=None, gt=0)
    """Upper bound of the unclipped ratio as well (two-sided clipping)."""
    importance_level: Literal["token", "sequence"] = "token"
    """One importance ratio per token (GRPO) or per completion (GSPO)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group, of the whole step, or not at all."""
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Sum the weighted rewards before normalising, or normalise each function first (GDPO)."""
    mask_truncated: bool = False
    """Leave completions that hit `generation.max_completion_tokens` out of the loss."""
    off_policy_threshold: float | None = Field(default=None, gt=0)
    """Drop completions with a negative advantage that drifted further than this mean log-ratio."""
    sampler_correction: SamplerCorrectionConfig | None = None
    """Weigh the policy loss by policy over sampler, where another engine samples; `{}` takes the defaults."""
    top_entropy_quantile: float = Field(default=1.0, gt=0, le=1)
    """Train only on this fraction of tokens, those of highest entropy."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of an entropy bonus on every token that is trained on."""
    drop_zero_variance_groups: Literal[False, True, "resample"] = False
    """Leave groups whose rewards are all equal out of the step: `true` trains on fewer groups, `resample`
    generates further prompts until the step is full, at most four times."""
    sapo_temperature_pos: float = Field(default=1.0, gt=0)
    """Temperature of the soft gate where the advantage is positive."""
    sapo_temperature_neg: float = Field(default=1.05, gt=0)
    """Temperature of the soft gate elsewhere."""
    vespo_k_pos: float = Field(default=2.0, ge=0)
    """Exponent of the weight where the advantage is not negative."""
    vespo_lambda_pos: float = Field(default=3.0, gt=0)
    """Decay of the weight where the advantage is not negative."""
    vespo_k_neg: float = Field(default=3.0, ge=0)
    """Exponent of the weight where the advantage is negative."""
    vespo_lambda_neg: float = Field(default=2.0, gt=0)
    """Decay of the weight where the advantage is negative."""

    @property
    def is_function(self) -> bool:
        """Whether `type` is the path of a user's own function."""
        return ":" in self.type

    @property
    def row(self) -> LossType:
        """What `type` stands for, if it is not a user's own function."""
        assert not self.is_function, f"{self.type} is a function, not a built-in loss type"
        return LOSS_TYPES[self.type]

    @property
    def clip_high(self) -> float:
        """The upper clip range: `1 + clip_high` for clipped losses, the bound itself for cispo."""
        default = None if self.is_function else self.row.epsilon_high
        return next(value for value in (self.epsilon_high, default, self.epsilon) if value is not None)


class OptimConfig(Section):
    name: str = "adamw"
    """`adamw`, or `module:factory` called as `factory(parameters, lr=learning_rate, **params)`."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of matrices (vectors are not decayed)."""
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
    ] = (0.9, 0.999)
    """AdamW's decay rates."""
    params: dict[str, Any] = {}
    """Keyword arguments for the factory named by `name`."""
    scheduler: Scheduler = "linear"
    """Shape of the learning rate over the run's optimizer steps."""
    warmup_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of the optimizer steps over which the learning rate rises from 0."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""


class TrainConfig(Section):
    _paths = field_validator("output_dir")(possible_path)

    output_dir: str = Field(min_length=1)
    """Folder of the run: metrics, completions, checkpoints, final model."""
    max_steps: int | None = Field(default=None, ge=1)
    """Number of steps; a step is one rollout and its optimizer steps. Needed unless `epochs` is set."""
    epochs: float | None = Field(default=None, gt=0, le=MOST_EPOCHS)
    """Passes over the prompts, instead of `max_steps`."""
    prompts_per_step: int = Field(default=8, ge=1)
    """Distinct prompts in one rollout, over all processes."""
    optimizer_steps_per_rollout: int = Field(default=1, ge=1)
    """Parts that a rollout's prompts are split into, with an optimizer step for each."""
    num_iterations: int = Field(default=1, ge=1)
    """Passes over each rollout."""
    max_tokens_per_microbatch: int | None = Field(default=None, ge=1)
    """Tokens in one forward pass: memory, not results. Chosen for the device if empty."""
    max_skipped_steps: int = Field(default=3, ge=0)
    """Optimizer steps in a row that may be skipped, since their numbers are not finite; one more ends the run."""
    seed: int = Field(default=42, ge=0, le=2**32 - 1)
    """Seed of sampling, shuffling and initialisation."""
    save_every: int = Field(default=100, ge=0)
    """Steps between checkpoints; 0 writes none but the one on a signal."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Checkpoints that stay on disk."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations on `data.eval`; only at the end if empty."""
    callbacks: list[str] = []
    """`module:Class` of callbacks; see `docs/python.md`."""

    def number_of_steps(self, num_prompts: int) -> int:
        """`max_steps`, or the steps that `epochs` passes over the prompts take."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.epochs is not None
        return math.ceil(self.epochs * num_prompts / self.prompts_per_step)


class DistributedConfig(Section):
    _paths = field_validator("deepspeed_config")(possible_path)

    strategy: Literal["auto", StrategyName] = "auto"
    """What is shared out over processes: `ddp` nothing, `zero1` the optimizer's state, `zero2` gradients too,
    `zero3` and `fsdp` weights too. `auto` is what the launcher says, else `ddp` for several processes, `none`
    for one."""
    processes: int | None = Field(default=None, ge=1)
    """Processes over all nodes. If empty, what the launcher started, else one; under srun one for each GPU."""
    cpu_offload: bool = False
    """Keep the optimizer's state in the CPU's memory, with `zero3` and `fsdp` the weights too."""
    deepspeed_config: str | None = None
    """DeepSpeed JSON file to use in place of the built-in settings of `zero1`, `zero2` and `zero3`."""


class LoggingConfig(Section):
    every: int = Field(default=1, ge=1)
    """Steps between lines on the screen; `metrics.jsonl` has every step."""
    print_completions: int = Field(default=0, ge=0)
    """Steps between tables of sample completions on the screen, and of all completions of a step in wandb and
    trackio; 0 makes none."""
    trackers: list[str] = ["tensorboard"]
    """Where metrics go beside `metrics.jsonl`: any tracker of Accelerate, such as tensorboard, wandb or trackio;
    see `docs/trackers.md`."""
    project: str | None = Field(default=None, min_length=1)
    """Project that the run belongs to in trackers that have projects, under its folder's name and with its recipe.
    If empty, what WANDB_PROJECT says, or grpo-cli."""


class Recipe(Section):
    """A whole experiment."""

    model: ModelConfig
    """The model that is trained."""
    data: DataConfig = DataConfig()
    """The prompts. Can be left out where an `episode.environment` makes them."""
    rewards: list[Annotated[RewardConfig, BeforeValidator(reward_from_string)]] = []
    """The reward functions and their weights. Can be left out where an `episode.environment` has `get_reward`."""
    episode: EpisodeConfig | None = None
    """Tools and environments that the policy acts with, over several turns; see `docs/environments.md`. Without it
    a completion is one turn."""
    generation: GenerationConfig = GenerationConfig()
    """How completions are sampled."""
    loss: LossConfig = LossConfig()
    """Advantages and loss."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and learning rate."""
    train: TrainConfig
    """The schedule and the run's folder."""
    logging: LoggingConfig = LoggingConfig()
    """What is shown and where it goes."""
    distributed: DistributedConfig = DistributedConfig()
    """Processes and what they share."""

    @property
    def environments(self) -> dict[str | None, EnvironmentConfig]:
        """`episode.environments`; none without episodes."""
        return {} if self.episode is None else self.episode.environments
