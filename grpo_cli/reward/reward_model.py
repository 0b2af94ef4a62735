"""A trained model that scores, with the interface of a reward function.

`grpo check` imports this module to know which `params` a reward model takes. So torch and transformers must never
be imported at the top, only inside the functions that need them. How completions are batched changes no score.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_cli import hub
from grpo_cli.errors import UserError, one_line

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


class RewardModel:
    """A sequence-classification model with one output, as a reward function."""

    scores_each_alone = True
    """A score does not depend on the other completions of the call, so processes may divide them."""

    def __init__(
        self,
        name: str,
        *,
        batch_size: int = 8,
        max_tokens: int | None = None,
        dtype: str = "float32",
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Load the model and its tokenizer.

        Args:
            name: Hub id or folder.
            batch_size: completions in one forward pass, which changes memory and time but no results.
            max_tokens: longest input; a longer one loses its beginning. No limit if empty.
            dtype: precision of the weights: float32, bfloat16 or float16.
            device: where it runs. If empty, this process's GPU, or the CPU where there is none.
            trust_remote_code: allow a Hub model to run its own Python code.

        Raises:
            UserError: an argument is out of range, or the model does not load or does not have one output.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1")
        if max_tokens is not None and max_tokens < 1:
            raise UserError(f"max_tokens is {max_tokens}; it must be at least 1, or empty for no limit")
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.device = _device(device)
        self.model, self.tokenizer = _load(name, dtype, trust_remote_code)
        if self.tokenizer.pad_token_id is None:
            if self.tokenizer.eos_token is None:
                raise UserError(f"the tokenizer of {name} has neither a pad token nor an end token; give it one")
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        self.tokenizer.truncation_side = "left"
        # Decoder models read the score at the last token that is not this one.
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model.to(self.device).eval().requires_grad_(False)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        """Score each prompt with its completion: strings joined, or messages through the chat template.

        Strings get the tokenizer's special tokens; a chat template writes its own.

        Raises:
            ValueError: the lists differ in length, or messages are given and there is no chat template.
        """
        import torch

        rows = self._token_ids(prompts, completions)
        longest_first = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        scores = [0.0] * len(rows)
        with torch.inference_mode():
            for start in range(0, len(rows), self.batch_size):
                chosen = longest_first[start : start + self.batch_size]
                logits = self._logits([rows[i] for i in chosen])
                for i, score in zip(chosen, logits.float().tolist(), strict=True):
                    scores[i] = score
        return scores

    def _token_ids(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[list[int]]:
        if not completions:
            return []
        conversational = isinstance(completions[0], list)
        texts = [
            self.tokenizer.apply_chat_template(prompt + completion, tokenize=False)
            if conversational
            else prompt + completion
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        encoded = self.tokenizer(
            texts,
            add_special_tokens=not conversational,
            truncation=self.max_tokens is not None,
            max_length=self.max_tokens,
        )
        return [ids or [self.tokenizer.pad_token_id] for ids in encoded["input_ids"]]

    def _logits(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """(B,) scores of token ids, padded on the right."""
        import torch

        shape = (len(rows), max(len(row) for row in rows))  # (B, T)
        input_ids = torch.full(shape, self.tokenizer.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row)
            attention_mask[i, : len(row)] = 1
        output = self.model(input_ids=input_ids.to(self.device), attention_mask=attention_mask.to(self.device))
        logits: torch.Tensor = output.logits  # (B, 1)
        return logits[:, 0]


def _device(wanted: str | None) -> torch.device:
    """The device asked for, or this process's GPU, or the CPU where there is none."""
    import torch

    if wanted is None:
        return torch.device(f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {wanted!r} cannot be used: {reason}; write cpu, or leave it out") from error
    return device


def _load(name: str, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """The model and its tokenizer; the number of outputs is read before any weights are."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        if config.num_labels != 1:
            raise UserError(
                f"model {name} has {config.num_labels} outputs, but a reward model has one (num_labels: 1); "
                "set model to a reward model"
            )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        hub.tell_download("model", name)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name,
            config=config,
            dtype=getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except UserError:
        raise
    except Exception as error:
        words = hub.explained(error, "model", name, instead="set model to a folder on this machine")
        if words is None or Path(name).is_dir():
            words = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(
            f"model {name} cannot be loaded: {words}\n"
            "  set model to a folder or a Hub id of a sequence-classification model"
        ) from error
    head = sorted(key for key in report["missing_keys"] if not key.startswith(f"{model.base_model_prefix}."))
    if head:
        raise UserError(
            f"model {name} has no trained weights for {', '.join(head)}, so its scores would be random; "
            "set model to a reward model"
        )
    return model, tokenizer
