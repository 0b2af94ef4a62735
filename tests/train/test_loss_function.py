"""A loss of the user's own: the documented one trains as it says, and a wrong one is told by its name."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_cli.algorithm.losses import LossOutput, measured_loss, policy_loss
from grpo_cli.errors import RunError, UserError
from grpo_cli.recipe.schema import LossConfig
from grpo_cli.train.loss_function import NAMED, POSITIONAL, load_loss_function, resolve_loss
from tests.conftest import byte_tokenizer
from tests.train.test_loop import numbers, ragged_llama, run, weights_of

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"

Write = Callable[[str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes the module `my_losses` into the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)

    def write(source: str) -> None:
        (tmp_path / "my_losses.py").write_text(source)

    return write


def documented_example() -> str:
    example = re.search(r"```python\n(# my_losses\.py\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    return example.group(1)


def returning(expression: str) -> str:
    """A loss function that returns `expression`."""
    return (
        "import torch\nfrom grpo_cli.algorithm.losses import LossOutput, policy_loss\n\n"
        "def loss(logprobs, old_logprobs, advantages, mask, config, *, normalizer, **others):\n"
        f"    return {expression}\n"
    )


def called(path: str = "my_losses:loss", *, rows: int = 2, normalizer: float = 6.0, **options: Any) -> Any:
    """What the function of the recipe returns for a micro-batch."""
    logprobs = torch.full((rows, 3), -1.0, requires_grad=True)
    arguments = dict.fromkeys(("ref_logprobs", "sampling_logprobs", "entropies", "importance_ratio"))
    return resolve_loss(LossConfig(type=path, **options))(
        logprobs, logprobs.detach() + 0.1, torch.ones(rows), torch.ones(rows, 3), LossConfig(type=path, **options),
        normalizer=normalizer, entropy_threshold=None, **arguments,
    )  # fmt: skip


def test_the_documented_loss_trains_as_the_built_in_one_that_it_is(
    write: Write, tiny_recipe: dict[str, Any]
) -> None:
    write(documented_example())
    changes: dict[str, Any] = {
        "loss__epsilon": 0.1, "train__num_iterations": 2, "optim__learning_rate": 3e-2,
        "train__max_tokens_per_microbatch": 50,
    }  # fmt: skip
    results = [
        run(
            tiny_recipe, loss__type=name, train__output_dir=folder, model=ragged_llama(),
            tokenizer=byte_tokenizer(), **changes,
        )
        for name, folder in (("my_losses:clipped", "own"), ("dapo", "dapo"))
    ]  # fmt: skip
    for name, value in weights_of(results[1]).items():
        torch.testing.assert_close(results[0].model.state_dict()[name], value, rtol=0, atol=1e-6)
        assert not torch.equal(value, ragged_llama().state_dict()[name]), f"{name} was not trained"
    own, dapo = (numbers(Path(folder, "metrics.jsonl")) for folder in ("own", "dapo"))
    for ours, theirs in zip(own, dapo, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert any(row["outside"] > 0 for row in own)


def test_groups_whose_advantages_are_all_zero_reach_the_users_function(
    write: Write, tiny_recipe: dict[str, Any]
) -> None:
    write(returning("logprobs.exp().mul(mask).sum() / normalizer"))
    start = ragged_llama().state_dict()
    result = run(
        tiny_recipe, loss__type="my_losses:loss", rewards=lambda completions: [1.0] * len(completions),
        model=ragged_llama(), tokenizer=byte_tokenizer(), train__max_steps=1,
    )  # fmt: skip
    assert result.metrics[0]["frac_groups_skipped"] == 0
    assert any(not torch.equal(value, start[name]) for name, value in weights_of(result).items())


def test_a_users_function_is_called_as_policy_loss_is() -> None:
    parameters = inspect.signature(policy_loss).parameters
    assert tuple(parameters) == (*POSITIONAL, *NAMED, "entropy_threshold", "completion_tokens")
    assert all(parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for name in POSITIONAL)
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in NAMED)


def test_a_built_in_type_is_measured_loss_itself() -> None:
    assert resolve_loss(LossConfig(type="grpo")) is measured_loss


def test_a_tensor_is_a_loss_without_metrics(write: Write) -> None:
    write(returning("(logprobs * advantages[:, None] * mask).sum() / normalizer"))
    output = called()
    assert isinstance(output, LossOutput)
    assert output.loss.item() == pytest.approx(-1)
    assert (output.metrics, output.weights) == ({}, {})


def test_metrics_become_plain_numbers(write: Write) -> None:
    write(returning("LossOutput(logprobs.sum(), {'a': mask.sum(), 'a_max': 3}, {'a': 2})"))
    output = called()
    assert (output.metrics, output.weights) == ({"a": 6.0, "a_max": 3.0}, {"a": 2.0})
    assert all(type(value) is float for value in output.metrics.values())


def test_a_users_function_may_build_on_a_built_in_type(write: Write) -> None:
    write(returning("policy_loss(logprobs, old_logprobs, advantages, mask, "
                    "config.model_copy(update={'type': 'grpo'}), normalizer=normalizer)"))  # fmt: skip
    assert "clip_ratio/low_mean" in called().metrics


def test_a_users_function_never_divides_by_zero(write: Write) -> None:
    write(returning("logprobs.sum() / normalizer"))
    assert called(normalizer=0.0).loss.item() == -6


def test_a_rank_without_completions_goes_backward_without_the_users_function(write: Write) -> None:
    write(returning("1 / 0"))
    output = called(rows=0)
    assert output.loss.item() == 0
    assert output.loss.requires_grad


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("1 / 0", "failed: {here}/my_losses.py:5: ZeroDivisionError: division by zero"),
        (
            "policy_loss(logprobs, old_logprobs, advantages, mask, config, normalizer=1.0)",
            "my_losses:loss is a function, not a built-in loss type",
        ),
        ("None", "returned a NoneType; return a LossOutput or a tensor with one number"),
        ("0.5", "returned a float; return"),
        ("LossOutput(0.5)", "returned a float; return"),
        ("logprobs", "returned a loss of shape (2, 3); add it up to one number"),
        ("logprobs.detach().sum()", "returned a loss without a gradient; compute it from logprobs"),
        ("LossOutput(logprobs.sum(), {'a': 'b'})", "returned metrics or weights that are no names with numbers"),
        ("LossOutput(logprobs.sum(), {'a': mask})", "returned metrics or weights that are no names with numbers"),
        ("LossOutput(logprobs.sum(), 3)", "returned metrics or weights that are no names with numbers"),
        ("LossOutput(logprobs.sum(), {}, {'a': 1})", "returned weights of metrics that it did not return: a"),
    ],
)
def test_what_goes_wrong_at_run_time_names_the_function(
    write: Write, tmp_path: Path, expression: str, message: str
) -> None:
    write(returning(expression))
    with pytest.raises(RunError) as caught:
        called()
    assert str(caught.value).startswith("loss.type: my_losses:loss ")
    assert message.replace("{here}", str(tmp_path)) in str(caught.value)


def test_a_device_that_is_full_is_told_as_everywhere(write: Write) -> None:
    write("import torch\ndef loss(*inputs, **named): raise torch.OutOfMemoryError('full')\n")
    with pytest.raises(torch.OutOfMemoryError):
        called()


@pytest.mark.parametrize(
    ("source", "path", "message"),
    [
        ("", "my_loses:loss", "there is no module 'my_loses'"),
        ("def los(): ...", "my_losses:loss", "my_losses has no loss; did you mean los?"),
        ("", "my_losses:", "is not of the form module:name"),
        ("loss = 3", "my_losses:loss", "my_losses:loss is of type int, not a function"),
        ("class loss: ...", "my_losses:loss", "my_losses:loss is a class, not a function"),
        ("def loss(logprobs): ...", "my_losses:loss", "old_logprobs, advantages, mask, config, *, normalizer, "),
        ("def loss(a, b, c, d, e, *, normalizer): ...", "my_losses:loss", "unexpected keyword argument"),
        ("def loss(a, b, c, d, e, f, **named): ...", "my_losses:loss", "missing a required argument: 'f'"),
    ],
)
def test_a_function_that_cannot_be_called_is_found_beforehand(
    write: Write, source: str, path: str, message: str
) -> None:
    write(source)
    for load in (load_loss_function, lambda path: resolve_loss(LossConfig(type=path))):
        with pytest.raises(UserError, match=r"^loss\.type: ") as caught:
            load(path)
        assert message in str(caught.value)
