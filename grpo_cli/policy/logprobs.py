"""Log-probabilities and entropies of sampled tokens under a model, one pack at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from grpo_cli.algorithm.packing import Group, Pack, pack_groups
from grpo_cli.policy import attention
from grpo_cli.policy.model import base_model, evaluating
from grpo_cli.policy.output_head import OutputHead, chosen_logprobs

logger = logging.getLogger("grpo_cli")

SELF_CHECK_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.15}
"""Largest difference in log-probability that rounding may cause between two ways to compute it."""

SHARED_LAYERS = {"full_attention", "sliding_attention", "global"}
"""Kinds of layers, as configurations name them, that can compute a shared-prompt row."""


class PackedModel:
    """A causal language model of transformers and the fastest right way to its log-probabilities.

    Found out once, on a few tokens: whether the model computes the same from a shared-prompt pack as from plain
    rows, and whether its output head is a matrix that can be applied in chunks of tokens. Whatever fails there is
    computed the plain way.

    Args:
        model: on its device; its attention kernel is replaced where it is SDPA.
        run: calls a function that computes with parts of the model, where they must be fetched for it.
        device: that it computes on, if that is not where its weights are.
    """

    def __init__(
        self, model: Any, run: Callable[..., Any] | None = None, device: torch.device | None = None
    ) -> None:
        self.model = model
        self.device: torch.device = device or next(model.parameters()).device
        self.has_plain_head = False
        self.shares_prompts = False
        self._is_whole = run is None
        self._run = run or _call
        with evaluating(model), torch.no_grad():  # dropout would tell any two passes apart
            self._check_head()
            self._check_shared_prompts()

    def token_logprobs(
        self, pack: Pack, temperature: float, *, entropy_gradient: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each completion token and entropy of the distribution it was drawn from.

        Both are those of softmax(logits / temperature), in float32. Logits exist only for completion tokens, and
        where the output head is a plain matrix only for a chunk of them.

        Args:
            pack: on the model's device.
            temperature: of sampling.
            entropy_gradient: let gradients flow through the entropies.

        Returns:
            Two (B, T) tensors, 0 on padding.
        """
        chosen, entropy = self._run(self._chosen, pack, temperature, entropy_gradient)
        return _unflatten(chosen, pack.mask), _unflatten(entropy, pack.mask)

    def _chosen(self, pack: Pack, temperature: float, entropy_gradient: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """As `token_logprobs`, (N,) of the unmasked places."""
        layout = None if pack.branches is None else attention.RowLayout(pack.branches)
        targets = pack.targets[pack.mask]  # (N,)
        if self.has_plain_head:
            hidden = self._hidden_states(pack, layout)
            # Asked for anew each time, and late: where weights are shared out, it is whole only now.
            head = OutputHead.of(self.model)
            assert head is not None
            chosen, entropy = chosen_logprobs(
                hidden, head, targets, temperature, entropy_gradient=entropy_gradient
            )
        else:
            logits = self._logits(pack, layout)
            chosen, entropy = logprobs_of_logits(logits, targets, temperature, entropy_gradient=entropy_gradient)
        return chosen, entropy

    def _hidden_states(self, pack: Pack, layout: attention.RowLayout | None) -> torch.Tensor:
        """(N, D) of the places that predict completion tokens."""
        output = base_model(self.model).get_decoder()(**_inputs(pack, layout))
        hidden: torch.Tensor = output.last_hidden_state
        return hidden.flatten(0, 1)[pack.predictors]

    def _logits(self, pack: Pack, layout: attention.RowLayout | None) -> torch.Tensor:
        """(N, V) of the places that predict completion tokens."""
        width = pack.input_ids.shape[1]
        columns, places = torch.unique(pack.predictors % width, return_inverse=True)
        output = self.model(**_inputs(pack, layout), logits_to_keep=columns)
        logits: torch.Tensor = output.logits
        if logits.shape[1] == width:  # a model that takes no notice of `logits_to_keep`
            logits = logits[:, columns]
        return logits[pack.predictors // width, places]

    def _check_head(self) -> None:
        """Take the chunked head if it gives what the model itself gives."""
        groups, _ = _self_check_groups(self._config.vocab_size)
        (pack,) = pack_groups(groups, 64, shared_prompt=False)
        pack = pack.to(self.device)
        expected, _ = self.token_logprobs(pack, 1.0)
        self.has_plain_head = OutputHead.of(self.model) is not None
        try:
            actual, _ = self.token_logprobs(pack, 1.0)
        except (RuntimeError, ValueError, TypeError, AttributeError):
            self.has_plain_head = False
            return
        if (actual - expected).abs().max() > self._tolerance:
            self.has_plain_head = False

    def _check_shared_prompts(self) -> None:
        config = self._config
        kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or []
        if config._attn_implementation not in ("sdpa", attention.KERNEL) or not SHARED_LAYERS.issuperset(kinds):
            return
        attention.install(base_model(self.model))
        try:
            self.shares_prompts = self._computes_shared_prompts()
        except Exception as error:  # of any kind: the model's code, its hooks and a GPU's compiler run in there
            logger.debug(f"prompts are not shared: {type(error).__name__}: {error}")
        if not self.shares_prompts:
            base_model(self.model).set_attn_implementation("sdpa")

    def _computes_shared_prompts(self) -> bool:
        """Ask the model: a layer that drops the layout, the positions or its window gives itself away."""
        groups, changed = _self_check_groups(self._config.vocab_size)

        def logprobs(groups: list[Group], shared_prompt: bool) -> torch.Tensor:
            (pack,) = pack_groups(groups, 64, shared_prompt=shared_prompt)
            logprobs, _ = self.token_logprobs(pack.to(self.device), 1.0)
            return logprobs[pack.samples.argsort()]

        packed = logprobs(groups, True)
        difference = (packed - logprobs(groups, False)).abs().max().item()
        # Where one completion's tokens move another's log-probabilities, however little, something leaks.
        moved = (packed - logprobs(changed, True)).abs()
        leak, effect = moved[1:].max().item(), moved[0].max().item()
        same = difference < self._tolerance and leak < 1e-3 * effect and self._windows_arrive(groups)
        return same and self._has_gradient(groups)

    def _windows_arrive(self, groups: list[Group]) -> bool:
        """Whether every layer with a sliding window tells the kernel so; these rows are too short to show it."""
        config = self._config
        (pack,) = pack_groups(groups, 64)
        pack = pack.to(self.device)
        assert pack.branches is not None
        layout = attention.RowLayout(pack.branches)
        self._run(self._hidden_states, pack, layout)
        window = getattr(config, "sliding_window", None)
        if not window or not getattr(config, "use_sliding_window", True):
            return not layout.windows
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        sliding = {layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"}
        return layout.windows == dict.fromkeys(sliding, window)

    def _has_gradient(self, groups: list[Group]) -> bool:
        """Whether the kernel's backward pass runs, rather than fail after a whole rollout.

        Not asked where others run the model: their bookkeeping of gradients is for optimizer steps.
        """
        trained = next((p for p in self.model.parameters() if p.requires_grad), None)
        if trained is None or not self._is_whole:
            return True
        (pack,) = pack_groups(groups, 64)
        with torch.enable_grad():
            logprobs, _ = self.token_logprobs(pack.to(self.device), 1.0)
            (gradient,) = torch.autograd.grad(logprobs.sum(), trained, allow_unused=True)
        return gradient is None or bool(gradient.isfinite().all())

    @property
    def _config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def _tolerance(self) -> float:
        return SELF_CHECK_TOLERANCE.get(forward_dtype(self.model, self.device), 0.15)


def _call(compute: Callable[..., Any], *arguments: Any) -> Any:
    return compute(*arguments)


def logprobs_of_logits(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float, *, entropy_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) log-probabilities of the targets and (N,) entropies from (N, V) logits, in float32."""
    scaled = logits.float() / temperature
    log_total = scaled.logsumexp(-1)  # (N,)
    chosen = scaled.gather(1, targets[:, None]).squeeze(1) - log_total
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        probabilities = (scaled - log_total[:, None]).exp()
        entropy = log_total - (probabilities * scaled).sum(-1)
    return chosen, entropy


def forward_dtype(model: Any, device: torch.device) -> torch.dtype:
    """The precision that a forward pass of `model` on `device` runs in, autocast considered."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    dtype: torch.dtype = next(model.parameters()).dtype
    return dtype


def steady_positions(model: Any) -> int | None:
    """Positions below which rotary embeddings do not depend on the longest sequence of a forward pass.

    `longrope` and `dynamic` scaling choose their frequencies by it, so beyond this a completion's
    log-probabilities would depend on what is computed beside it. None where there is no such limit.
    """
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    limits = [
        part.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for part in kinds
        if part.get("rope_type") in ("longrope", "dynamic")
    ]
    return min(limits, default=None)


def _inputs(pack: Pack, layout: attention.RowLayout | None) -> dict[str, Any]:
    inputs = {"input_ids": pack.input_ids, "position_ids": pack.position_ids, "use_cache": False}
    if layout is None:
        return inputs | {"attention_mask": pack.attention_mask}
    # A four-dimensional mask is handed through as it is, so transformers builds none; the layout takes its place.
    return inputs | {"attention_mask": pack.input_ids.new_ones(1, 1, 1, 1), attention.LAYOUT: layout}


def _unflatten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(N,) values of the unmasked places, in row order, to (B, T)."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def _self_check_groups(vocab_size: int) -> tuple[list[Group], list[Group]]:
    """Two groups of random tokens, and the same with another first completion."""
    tokens = torch.randint(vocab_size, (15,), generator=torch.Generator().manual_seed(0)).tolist()
    other = Group(tokens[8:9], [tokens[9:12]], [2])
    groups = [Group(tokens[:3], [tokens[3:6], tokens[6:8]], [0, 1]), other]
    changed = [Group(tokens[:3], [tokens[12:], tokens[6:8]], [0, 1]), other]
    return groups, changed
