"""Writes the episodes that TRL 1.16 makes of `trl_episodes.py`: `python -m tests.episode.record_trl_episodes`.

Needs TRL, which the tests do without: they read the file. The trainer is TRL's, and so is all that it does; only
the method that samples a turn says what the script has it say.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from typing import Any

from datasets import Dataset

from tests.conftest import tiny_llama
from tests.episode.chat import HERE, chat_tokenizer
from tests.episode.trl_episodes import QUESTION, TEMPLATES, TOOLS, Counter, Play, plays_of, setting_of, turn_text

FILE = HERE / "data" / "trl_episodes.json"


def reward(completions: list[Any], **kwargs: Any) -> list[float]:
    return [0.0 for _ in completions]


def trainer_of(template: str, play: Play, folder: str) -> Any:
    from trl import GRPOConfig, GRPOTrainer, chat_template_utils

    tokenizer = chat_tokenizer(template)
    tokenizer.pad_token = "<s>"
    own = {"qwen2_5": "qwen3", "llama3_1": "llama3"}[template]
    tokenizer.response_template = getattr(chat_template_utils, f"{own}_template")
    settings = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    model = tiny_llama(**settings, max_position_embeddings=4096)
    arguments = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=play.limit,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    rows = Dataset.from_list([{"prompt": QUESTION, "start": 0}])
    given = {"environment_factory": Counter} if play.with_environment else {}
    return GRPOTrainer(
        model, reward, args=arguments, train_dataset=rows, processing_class=tokenizer, tools=TOOLS, **given
    )


def recorded(template: str, play: Play) -> tuple[list[int], dict[str, Any]]:
    """Tokens of the prompt, and the episode."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(template, play, folder)
    tokenizer = trainer.processing_class
    turns: Iterator[str] = iter(turn_text(template, turn) for turn in play.turns)

    def says(prompt_ids: list[list[int]], *rest: Any, **options: Any) -> Any:
        ids = [*tokenizer(next(turns), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        cut = ids[: play.limit]
        return [list(cut) for _ in prompt_ids], [[-0.5] * len(cut) for _ in prompt_ids]

    trainer._generate_single_turn = says
    kept: list[Any] = []
    generate = trainer._generate

    def generated(prompts: Any) -> Any:
        kept.append(generate(prompts))
        return kept[0]

    trainer._generate = generated
    trainer.model.train()
    trainer._generate_and_score_completions([{"prompt": QUESTION, "start": 0} for _ in range(2)])
    prompt_ids, completion_ids, masks, completions, *_ = kept[0]
    assert completion_ids[0] == completion_ids[1]
    return list(prompt_ids[0]), {
        "template": template,
        "play": play.name,
        "completion_ids": list(completion_ids[0]),
        "mask": "".join(map(str, masks[0])),
        "messages": completions[0],
    }


def main() -> None:
    prompts: dict[str, list[int]] = {}
    episodes = []
    for template in TEMPLATES:
        for play in plays_of(template):
            prompt, episode = recorded(template, play)
            assert prompts.setdefault(setting_of(template, play), prompt) == prompt
            episodes.append(json.dumps(episode, ensure_ascii=False))
    lines = ",\n".join(episodes)
    FILE.write_text(f'{{"prompts": {json.dumps(prompts)},\n"episodes": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
