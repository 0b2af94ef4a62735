from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from grpo_cli.errors import UserError
from grpo_cli.recipe.schema import RewardConfig
from grpo_cli.reward import reward_model
from grpo_cli.reward.registry import resolve_rewards
from grpo_cli.reward.reward_model import RewardModel
from grpo_cli.reward.scorer import Scorer, ScoringBatch

LETTERS = "abcdefghijklmnopqrstuvwxyz <>|:"
TEMPLATE = "<s>{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}|{% endfor %}"

PROMPTS = ["a question", "b", "what is this", "", "a very long question about it"]
COMPLETIONS = ["yes", "a rather long answer to that", "no", "maybe", "x"]


def save_tokenizer(folder: Path, *, pad: bool = True, eos: bool = True) -> None:
    """A tokenizer of single letters that puts <s> in front of a text."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special: dict[str, Any] = {"bos_token": "<s>", "unk_token": "<unk>"}
    if pad:
        special["pad_token"] = "<pad>"
    if eos:
        special["eos_token"] = "</s>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, **special)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def tiny_config(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**{**sizes, **changes})


def save_model(folder: Path, *, outputs: int = 1, **tokenizer: bool) -> str:
    torch.manual_seed(0)
    LlamaForSequenceClassification(tiny_config(num_labels=outputs)).save_pretrained(folder)
    save_tokenizer(folder, **tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("reward_model"))


def score_alone(folder: str, text: str, *, special: bool = True) -> float:
    """What transformers itself says about one text, without padding."""
    network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=special, return_tensors="pt").input_ids
    network.config.pad_token_id = 0
    with torch.inference_mode():
        return float(network(input_ids=ids).logits.item())


def test_a_string_is_scored_as_prompt_and_completion_joined(model: str) -> None:
    scores = RewardModel(model, batch_size=2)(PROMPTS, COMPLETIONS)
    expected = [score_alone(model, p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert len(set(expected)) == len(expected)
    assert scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("pad", [True, False])
def test_scores_do_not_depend_on_the_batch_size(tmp_path: Path, pad: bool) -> None:
    folder = save_model(tmp_path, pad=pad)
    alone = RewardModel(folder, batch_size=1)(PROMPTS, COMPLETIONS)
    for batch_size in (2, 3, 8):
        assert RewardModel(folder, batch_size=batch_size)(PROMPTS, COMPLETIONS) == pytest.approx(alone, abs=1e-5)


def test_a_model_that_reads_both_ways_does_not_see_the_padding(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    alone = RewardModel(str(tmp_path), batch_size=1)(PROMPTS, COMPLETIONS)
    assert RewardModel(str(tmp_path))(PROMPTS, COMPLETIONS) == pytest.approx(alone, abs=1e-5)


def test_messages_go_through_the_chat_template_without_further_special_tokens(model: str) -> None:
    prompts = [[{"role": "user", "content": p}] for p in PROMPTS]
    completions = [[{"role": "assistant", "content": c}] for c in COMPLETIONS]
    scores = RewardModel(model)(prompts, completions)
    texts = [f"<s>user:{p}|assistant:{c}|" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert scores == pytest.approx([score_alone(model, text, special=False) for text in texts], abs=1e-5)


def test_a_tokenizer_without_pad_token_pads_with_the_end_token(tmp_path: Path) -> None:
    reward = RewardModel(save_model(tmp_path, pad=False))
    assert reward.tokenizer.pad_token == "</s>"
    assert reward.model.config.pad_token_id == 2


def test_a_tokenizer_without_pad_and_end_token_is_an_error(tmp_path: Path) -> None:
    folder = save_model(tmp_path, pad=False, eos=False)
    with pytest.raises(UserError, match="has neither a pad token nor an end token"):
        RewardModel(folder)


def test_max_tokens_cuts_off_the_left(model: str) -> None:
    reward = RewardModel(model, max_tokens=6)
    assert reward(["zzzzzz"], ["abcde"]) == pytest.approx([score_alone(model, "abcde")], abs=1e-5)
    assert reward(["zzz"], ["abcde"]) == reward([""], ["abcde"])
    assert reward([""], ["bcde"]) != reward([""], ["abcde"])


def test_nothing_to_read_is_scored_all_the_same(model: str) -> None:
    reward = RewardModel(model)
    reward.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (score,) = reward([[{"role": "user", "content": ""}]], [[{"role": "assistant", "content": ""}]])
    assert isinstance(score, float)
    assert reward([], []) == []


def test_scoring_leaves_no_gradient_and_no_dropout(model: str) -> None:
    reward = RewardModel(model)
    assert not reward.model.training
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())


def test_by_default_it_computes_on_the_gpu_that_the_process_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reward_model._device(None) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert reward_model._device(None) == torch.device("cuda", 1)


def test_bfloat16_weights_give_floats(model: str) -> None:
    reward = RewardModel(model, dtype="bfloat16", device="cpu")
    assert next(reward.model.parameters()).dtype == torch.bfloat16
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(RewardModel(model)(PROMPTS, COMPLETIONS), abs=0.2)


def test_a_model_with_more_than_one_output_is_an_error_that_says_how_many(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 3 outputs, but a reward model has one"):
        RewardModel(save_model(tmp_path, outputs=3))


def test_a_language_model_without_a_trained_head_is_an_error(tmp_path: Path) -> None:
    LlamaForCausalLM(tiny_config(num_labels=1)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"has no trained weights for score.weight, so its scores would be random"):
        RewardModel(str(tmp_path))


def test_a_model_that_is_not_there_is_an_error_that_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (str(tmp_path / "absent"), "nobody/no-such-reward-model"):
        with pytest.raises(UserError) as caught:
            RewardModel(name)
        assert str(caught.value).startswith(f"model {name} cannot be loaded: ")
        assert "set model to a folder or a Hub id" in str(caught.value)


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"dtype": "float8"}, "dtype is 'float8'; it must be one of float32, bfloat16, float16"),
        ({"device": "abacus"}, "device 'abacus' cannot be used: "),
        ({"device": "cuda:77"}, "device 'cuda:77' cannot be used: "),
    ],
)
def test_arguments_out_of_range_are_errors_before_anything_is_loaded(params: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        RewardModel("nobody/no-such-reward-model", **params)
    assert str(caught.value).startswith(told)


def test_a_recipe_reaches_a_reward_model_with_its_params(model: str) -> None:
    config = RewardConfig(model=model, params={"batch_size": 2, "max_tokens": 64}, weight=0.5)
    (function,) = resolve_rewards([config])
    assert (function.name, function.weight) == (config.metric_name, 0.5)
    batch = ScoringBatch(PROMPTS, COMPLETIONS, [[1]] * 5, {"answer": ["x"] * 5})
    scores = Scorer([function]).score(batch, step=0)
    assert scores[:, 0].tolist() == pytest.approx(RewardModel(model)(PROMPTS, COMPLETIONS), abs=1e-5)


def test_an_error_of_a_model_names_the_setting(tmp_path: Path) -> None:
    folder = save_model(tmp_path, outputs=2)
    with pytest.raises(UserError, match=r"^rewards\.0: model .* has 2 outputs"):
        resolve_rewards([RewardConfig(model=folder)])
