"""Log-probabilities and entropies of sampled tokens under a model, one pack at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from grpo_cli.algorithm.packing import Pack
from grpo_cli.policy import attention, self_check
from grpo_cli.policy.model import base_model, evaluating
from grpo_cli.policy.output_head import LogitForm, OutputHead, chosen_logprobs


class PackedModel:
    """A causal language model of transformers and the fastest right way to its log-probabilities.

    `checked` asks the model whether it computes the same from a shared-prompt pack as from plain rows, and whether
    its output head is a matrix that can be applied in chunks of tokens. Whatever fails is computed the plain way.

    Args:
        model: on its device.
        run: calls a function that computes with parts of the model, where they must be fetched for it.
        device: that it computes on, if that is not where its weights are.
    """

    def __init__(
        self, model: Any, run: Callable[..., Any] | None = None, device: torch.device | None = None
    ) -> None:
        self.model = model
        self.device: torch.device = device or next(model.parameters()).device
        self.is_whole = run is None
        """Whether this process runs the model by itself."""
        self._run = run or _call
        self.logit_form: LogitForm | None = None
        """How logits are formed, a chunk of tokens at a time; None where the model itself has to form them."""
        self.why_not_shared: str | None = "the model was not asked"

    @classmethod
    def checked(
        cls, model: Any, run: Callable[..., Any] | None = None, device: torch.device | None = None
    ) -> PackedModel:
        """Ask a model, in forward passes of twenty tokens, which of the fast ways give its own results.

        Its attention kernel is replaced where it is SDPA and prompts can be shared.
        """
        packed = cls(model, run, device)
        with evaluating(model), torch.no_grad():  # dropout would tell any two passes apart
            self_check.find_logit_form(packed)
            packed.why_not_shared = self_check.why_not_shared(packed)
        return packed

    @property
    def shares_prompts(self) -> bool:
        """Whether it takes shared-prompt packs."""
        return self.why_not_shared is None

    def take_plain_rows(self, why: str) -> None:
        """Share no prompts any more, for a reason that lies elsewhere."""
        self.why_not_shared = why
        if self.config._attn_implementation == attention.KERNEL:
            base_model(self.model).set_attn_implementation("sdpa")

    def token_logprobs(
        self,
        pack: Pack,
        temperature: float,
        *,
        entropy_gradient: bool = False,
        layout: attention.TokenLayout | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each completion token and entropy of the distribution it was drawn from.

        Both are those of softmax(logits / temperature), in float32. Logits exist only for completion tokens, and
        where the output head is a plain matrix only for a chunk of them.

        Args:
            pack: on the model's device.
            temperature: of sampling.
            entropy_gradient: let gradients flow through the entropies.
            layout: what computes the attention of a shared-prompt pack, if not `RowLayout`.

        Returns:
            Two (B, T) tensors, 0 on padding and on tokens that were not sampled.
        """
        if layout is None and pack.branches is not None:
            layout = attention.RowLayout(pack.branches)
        chosen, entropy = self._run(self._chosen, pack, temperature, entropy_gradient, layout)
        return _unflatten(chosen, pack), _unflatten(entropy, pack)

    def _chosen(
        self, pack: Pack, temperature: float, entropy_gradient: bool, layout: attention.TokenLayout | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `token_logprobs`, (N,) of the unmasked places."""
        targets = pack.targets.flatten()[pack.places]  # (N,)
        if self.logit_form is None:
            logits = self._logits(pack, layout)
            return logprobs_of_logits(logits, targets, temperature, entropy_gradient=entropy_gradient)
        hidden = self._hidden_states(pack, layout)
        # Asked for anew each time, and late: where weights are shared out, it is whole only now.
        head = OutputHead.of(self.model, self.logit_form)
        assert head is not None
        return chosen_logprobs(hidden, head, targets, temperature, entropy_gradient=entropy_gradient)

    def _hidden_states(self, pack: Pack, layout: attention.TokenLayout | None) -> torch.Tensor:
        """(N, D) of the places that predict completion tokens."""
        output = base_model(self.model).get_decoder()(**_inputs(pack, layout))
        hidden: torch.Tensor = output.last_hidden_state
        return hidden.flatten(0, 1)[pack.predictors]

    def _logits(self, pack: Pack, layout: attention.TokenLayout | None) -> torch.Tensor:
        """(N, V) of the places that predict completion tokens."""
        width = pack.input_ids.shape[1]
        output = self.model(**_inputs(pack, layout), logits_to_keep=pack.columns)
        logits: torch.Tensor = output.logits
        if logits.shape[1] == width:  # a model that takes no notice of `logits_to_keep`
            logits = logits[:, pack.columns]
        return logits[pack.predictors // width, pack.column_places]

    @property
    def config(self) -> Any:
        """Of the model, or of its part that reads text."""
        return self.model.config.get_text_config()

    @property
    def dtype(self) -> torch.dtype:
        """The precision that a forward pass runs in, autocast considered."""
        if torch.is_autocast_enabled(self.device.type):
            return torch.get_autocast_dtype(self.device.type)
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype


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


def _inputs(pack: Pack, layout: attention.TokenLayout | None) -> dict[str, Any]:
    inputs = {"input_ids": pack.input_ids, "position_ids": pack.position_ids, "use_cache": False}
    if layout is None:
        return inputs | {"attention_mask": pack.attention_mask}
    # A four-dimensional mask is handed through as it is, so transformers builds none; the layout takes its place.
    return inputs | {"attention_mask": pack.input_ids.new_ones(1, 1, 1, 1), attention.LAYOUT: layout}


def _unflatten(values: torch.Tensor, pack: Pack) -> torch.Tensor:
    """(N,) values of the unmasked places, in row order, to (B, T)."""
    return values.new_zeros(pack.mask.numel()).index_copy(0, pack.places, values).view(pack.mask.shape)
