"""Log-probabilities and entropies of sampled tokens straight from hidden states.

The logits of all tokens are by far the largest tensor of a training step: for 512 tokens of a 150,000-word
vocabulary 300 MB, and autograd holds several such. Here they never exist at once. The output head is multiplied
with a chunk of tokens at a time, forward and backward, in one buffer that all chunks share: the extra memory is
that buffer and a few blocks of it, whatever the number of tokens. Where the cuts are changes nothing but rounding.

With z = logits / temperature, log p = log softmax(z) and H = -sum p log p, the derivatives are
    d log p[y] / dz = onehot(y) - p        d H / dz = -p (log p + H)
and the chain goes on through the soft cap, c tanh(u / c), whose derivative is 1 - tanh^2, to hidden states, weight
and bias. On a CPU the matrix products take over nine tenths of the time, provided that all the rest is done block
by block in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from grpo_cli.policy.model import base_model
from grpo_cli.recipe.limits import HEAD_BLOCK_BYTES, HEAD_CHUNK_BYTES

FACTORS = {
    "logit_scale": 1,  # Cohere
    "lm_head_multiplier": 1,  # Falcon-H1
    "output_multiplier": 1,  # Muse
    "logits_scaling": -1,  # Granite; MiniCPM3, which divides the hidden states
    "logits_mup_width_multiplier": -1,  # Inkling, likewise
}
"""Settings of transformers' configurations that most models multiply logits by (1) or divide them by (-1)."""

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Settings that cap logits: Gemma and those after it, RecurrentGemma, xLSTM."""


class LogitForm(NamedTuple):
    """What a model makes of the products of hidden states and the output head's weight.

    Logits are softcap tanh(scale products / softcap), or scale products without a cap.
    """

    scale: float = 1.0
    softcap: float | None = None


def possible_forms(model: Any) -> list[LogitForm]:
    """What the settings of a model may mean, by the conventions of transformers 5.23, the usual meaning first.

    Some models pay no attention to a setting, and some multiply by what others divide by. Only a comparison with
    the logits that the model itself gives tells which form is right.
    """
    config = model.config.get_text_config()
    values = {name: getattr(config, name, None) for name in (*FACTORS, *SOFTCAPS)}
    set_ones = {name: float(value) for name, value in values.items() if isinstance(value, int | float) and value}
    factors = (value ** FACTORS[name] for name, value in set_ones.items() if name in FACTORS)
    scale = math.prod(factors, start=1.0)
    softcap = next((value for name, value in set_ones.items() if name in SOFTCAPS), None)
    return list(dict.fromkeys([LogitForm(scale, softcap), LogitForm(), LogitForm(1 / scale, softcap)]))


@dataclass(frozen=True)
class OutputHead:
    """What turns hidden states into logits: softcap tanh(scale (hidden weight^T + bias) / softcap)."""

    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None  # (V,)
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any, form: LogitForm) -> OutputHead | None:
        """The head of a transformers causal language model or of a PeftModel around one, with logits of `form`.

        None where it is no plain nn.Linear over the whole vocabulary: wrapped by LoRA, quantised, padded.
        """
        layer = base_model(model).get_output_embeddings()
        if type(layer) is not nn.Linear:  # a subclass may compute something else
            return None
        config = model.config.get_text_config()
        if getattr(config, "unpadded_vocab_size", None) not in (None, layer.out_features):
            return None
        return cls(layer.weight, layer.bias, *form)


def chosen_logprobs(
    hidden: torch.Tensor,
    head: OutputHead,
    targets: torch.Tensor,
    temperature: float,
    *,
    entropy_gradient: bool = False,
    chunk_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target under softmax(logits / temperature), and that distribution's entropy.

    The product runs in autocast's precision where there is one, else in the wider of hidden states' and weight's;
    everything after it, and the sum of the weight's gradient over chunks, in float32 (float64 where both are).

    Args:
        hidden: (N, D), what the output head is applied to.
        head: gradients reach its weight and bias where they ask for one.
        targets: (N,) token ids.
        temperature: of sampling.
        entropy_gradient: let gradients flow through the entropies.
        chunk_tokens: tokens whose logits exist at a time; None for what HEAD_CHUNK_BYTES holds.

    Returns:
        Two (N,) tensors.
    """
    device = hidden.device.type
    dtype = torch.promote_types(head.weight.dtype, hidden.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    trained = any(tensor is not None and tensor.requires_grad for tensor in (head.weight, head.bias))
    gradient = torch.is_grad_enabled() and (trained or hidden.requires_grad)
    if chunk_tokens is None:
        chunk_tokens = HEAD_CHUNK_BYTES.get(device, HEAD_CHUNK_BYTES["cuda"]) // (4 * len(head.weight))
        if gradient and entropy_gradient and not trained:
            chunk_tokens //= 2  # the forward pass then forms two derivatives from the same logits
    plan = _Plan(
        scale=head.scale,
        softcap=head.softcap,
        temperature=temperature,
        matmul_dtype=dtype,
        dtype=torch.float64 if dtype == hidden.dtype == torch.float64 else torch.float32,
        chunk_rows=max(1, chunk_tokens),
        block_rows=max(1, HEAD_BLOCK_BYTES.get(device, HEAD_BLOCK_BYTES["cuda"]) // (4 * len(head.weight))),
        gradient=gradient,
        entropy_gradient=entropy_gradient,
    )
    function = _FrozenHead if gradient and not trained else _TrainedHead
    logprobs, entropies = function.apply(hidden, head.weight, head.bias, targets, plan)
    return logprobs, entropies


@dataclass(frozen=True)
class _Plan:
    """All that is not a tensor."""

    scale: float
    softcap: float | None
    temperature: float
    matmul_dtype: torch.dtype
    dtype: torch.dtype  # of softmax, sums and results
    chunk_rows: int
    block_rows: int
    gradient: bool
    entropy_gradient: bool

    def results(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for log-probabilities and entropies."""
        return hidden.new_empty(len(hidden), dtype=self.dtype), hidden.new_empty(len(hidden), dtype=self.dtype)

    def states_like(self, hidden: torch.Tensor) -> torch.Tensor:
        """Room for (N, D) products with the weight, row after row in memory."""
        return hidden.new_empty(hidden.shape, dtype=self.matmul_dtype)

    def chunks(self, count: int) -> list[slice]:
        """`count` tokens cut for the matrix product: as few chunks as possible, of as equal length."""
        rows = math.ceil(count / max(1, math.ceil(count / self.chunk_rows)))
        return [slice(start, start + rows) for start in range(0, count, max(1, rows))]

    def blocks(self, count: int) -> Iterator[slice]:
        return (slice(start, start + self.block_rows) for start in range(0, count, self.block_rows))

    def scaled(self, products: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """logits / temperature from a block of products, and tanh of the soft cap. May be `products` itself."""
        products = products.to(self.dtype)
        if self.softcap is not None:
            capped = torch.mul(products, self.scale / self.softcap).tanh_()
            return capped * (self.softcap / self.temperature), capped
        factor = self.scale / self.temperature
        return (products if factor == 1 else products * factor), None


class _TrainedHead(torch.autograd.Function):
    """Forms the derivatives in the backward pass, from products computed again.

    Those of the last chunk are kept, and backward starts with them: they cost no more than the one chunk that the
    forward pass needed, and nothing is computed twice where one chunk is all. Also what runs without gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        plan: _Plan,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, entropies = plan.results(hidden)
        buffer = None
        with torch.autocast(hidden.device.type, enabled=False):
            head = _cast(weight, bias, plan)
            for chunk in plan.chunks(len(hidden)):
                products, buffer = _multiply(hidden[chunk], *head, plan, buffer)
                _measure(products, targets[chunk], plan, logprobs[chunk], entropies[chunk])
        if plan.gradient:
            ctx.plan, ctx.kept = plan, buffer
            ctx.save_for_backward(hidden, weight, bias, targets)
        if not plan.entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor, grad_entropies: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        plan: _Plan = ctx.plan
        hidden, weight, bias, targets = ctx.saved_tensors
        buffer, ctx.kept = ctx.kept, None  # overwritten below: a second backward pass starts from nothing
        computed = buffer is not None
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = plan.states_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=plan.dtype) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=plan.dtype) if wants_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            head = _cast(weight, bias, plan)
            for chunk in reversed(plan.chunks(len(hidden))):
                if computed:
                    products, computed = buffer[: len(hidden[chunk])], False
                else:
                    products, buffer = _multiply(hidden[chunk], *head, plan, buffer)
                a, b = grad_logprobs[chunk], grad_entropies[chunk] if plan.entropy_gradient else None
                _differentiate(products, targets[chunk], plan, a, b, out=products, grad_bias=grad_bias)
                if grad_hidden is not None:
                    torch.mm(products, head[0], out=grad_hidden[chunk])
                if grad_weight is not None:
                    _accumulate(grad_weight, products, hidden[chunk].to(plan.matmul_dtype), plan)
        gradients = zip((grad_hidden, grad_weight, grad_bias), (hidden, weight, bias), strict=True)
        return *(None if grad is None else grad.to(tensor.dtype) for grad, tensor in gradients), None, None


class _FrozenHead(torch.autograd.Function):
    """Forms the derivatives in the forward pass, while it has the products.

    Where only hidden states want a gradient (LoRA), backward needs but two vectors of each token, the gradients
    of its log-probability and of its entropy with respect to its hidden state. It scales and adds them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        plan: _Plan,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, entropies = plan.results(hidden)
        by_logprob = plan.states_like(hidden)
        by_entropy = plan.states_like(hidden) if plan.entropy_gradient else None
        buffer = second = None
        with torch.autocast(hidden.device.type, enabled=False):
            head = _cast(weight, bias, plan)
            for chunk in plan.chunks(len(hidden)):
                products, buffer = _multiply(hidden[chunk], *head, plan, buffer)
                _measure(products, targets[chunk], plan, logprobs[chunk], entropies[chunk])
                ones = torch.ones_like(logprobs[chunk])
                if by_entropy is not None:
                    second = torch.empty_like(buffer) if second is None else second
                    derivative = second[: len(products)]
                    _differentiate(products, targets[chunk], plan, 0 * ones, ones, out=derivative)
                    torch.mm(derivative, head[0], out=by_entropy[chunk])
                _differentiate(products, targets[chunk], plan, ones, None, out=products)
                torch.mm(products, head[0], out=by_logprob[chunk])
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(by_logprob, by_entropy)
        if not plan.entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor, grad_entropies: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        by_logprob, by_entropy = ctx.saved_tensors
        gradient = by_logprob * grad_logprobs[:, None]
        if by_entropy is not None:
            gradient += by_entropy * grad_entropies[:, None]
        return gradient.to(ctx.dtype), None, None, None, None


def _cast(
    weight: torch.Tensor, bias: torch.Tensor | None, plan: _Plan
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return weight.to(plan.matmul_dtype), None if bias is None else bias.to(plan.matmul_dtype)


def _multiply(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    plan: _Plan,
    buffer: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden (n, D) weight^T (D, V) + bias (V,), in the first n rows of a buffer; and the buffer."""
    states = hidden.to(plan.matmul_dtype)
    if buffer is None or len(buffer) < len(states):
        buffer = states.new_empty(len(states), len(weight))
    out = buffer[: len(states)]
    if bias is None:
        torch.mm(states, weight.t(), out=out)
    else:
        torch.addmm(bias, states, weight.t(), out=out)
    return out, buffer


def _measure(
    products: torch.Tensor, targets: torch.Tensor, plan: _Plan, logprobs: torch.Tensor, entropies: torch.Tensor
) -> None:
    """log p[target] and -sum p log p of a chunk, (n, V), into (n,) and (n,)."""
    for block in plan.blocks(len(products)):
        log_p = plan.scaled(products[block])[0].log_softmax(-1)
        logprobs[block] = log_p.gather(1, targets[block][:, None]).squeeze(1)
        entropies[block] = log_p.exp().mul_(log_p).sum(-1).neg_()


def _differentiate(
    products: torch.Tensor,
    targets: torch.Tensor,
    plan: _Plan,
    grad_logprobs: torch.Tensor,
    grad_entropies: torch.Tensor | None,
    *,
    out: torch.Tensor,
    grad_bias: torch.Tensor | None = None,
) -> None:
    """d sum(a log p[target] + b H) / d products with the gradients a and b, (n,), into `out`, (n, V).

    `out` may be `products`. Rounded to the products' precision only at the end: 1 - p is far from 0 where p is
    not quite 1.
    """
    factor = plan.scale / plan.temperature
    for block in plan.blocks(len(products)):
        scaled, capped = plan.scaled(products[block])
        a = (grad_logprobs[block] * factor)[:, None]
        if grad_entropies is None:
            derivative = scaled.softmax(-1).mul_(-a)
        else:  # -p (a + b (log p + H))
            b = (grad_entropies[block] * factor)[:, None]
            log_p = scaled.log_softmax(-1)
            p = log_p.exp()
            entropy = (p * log_p).sum(-1, keepdim=True).neg_()
            derivative = torch.addcmul(-(a + b * entropy), log_p, -b).mul_(p)
        derivative[torch.arange(len(a), device=a.device), targets[block]] += a.squeeze(1)
        if capped is not None:
            derivative.mul_(capped.square_().neg_().add_(1))
        if grad_bias is not None:
            grad_bias += derivative.sum(0)
        out[block] = derivative


def _accumulate(total: torch.Tensor, derivative: torch.Tensor, states: torch.Tensor, plan: _Plan) -> None:
    """total (V, D) += derivative^T (V, n) states (n, D).

    The product of half-precision tensors is in half precision: it is added to the total strip by strip, so that no
    second tensor of the weight's size is needed.
    """
    if total.dtype == derivative.dtype:
        total.addmm_(derivative.t(), states)
        return
    strip = max(1, plan.block_rows * len(total) // states.shape[1])
    for start in range(0, len(total), strip):
        total[start : start + strip] += derivative[:, start : start + strip].t() @ states
