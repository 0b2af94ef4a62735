"""`grpo init`: a recipe, a reward and a few prompts that work together, to start from."""

from __future__ import annotations

from pathlib import Path

from grpo_cli.errors import UserError

RECIPE = """\
# grpo check recipe.yaml    finds mistakes without loading the model
# grpo sample recipe.yaml   shows completions and their rewards
# grpo train recipe.yaml    trains
model:
  name: Qwen/Qwen2-0.5B-Instruct     # a Hub id, a folder, or a .gguf file
data:
  name: prompts.jsonl                # or a Hub dataset, .json, .csv, .parquet, or module:factory
rewards:
  - my_rewards:mentions_keyword
  - {path: rewards.length:reward_len, weight: 0.01}
generation:
  num_generations: 8
  max_completion_tokens: 64
train:
  output_dir: runs/first
  max_steps: 100
"""

REWARDS = '''\
"""Rewards of this experiment."""


def mentions_keyword(completions, keyword, **kwargs):
    """1.0 where the completion mentions the row's keyword, else 0.0; None where the row has none.

    Every list has one entry per completion. `keyword` is a column of the dataset: any column can be an argument.
    """
    return [
        None if word is None else float(word.lower() in completion.lower())
        for completion, word in zip(completions, keyword)
    ]
'''

PROMPTS = """\
{"prompt": "The largest planet of the solar system is", "keyword": "Jupiter"}
{"prompt": "The capital of France is", "keyword": "Paris"}
{"prompt": "Water freezes at a temperature of", "keyword": "0"}
{"prompt": "The author of Hamlet is", "keyword": "Shakespeare"}
{"prompt": "Write a short line about the sea.", "keyword": null}
"""


def init(folder: Path) -> list[Path]:
    """Write the starting files into `folder` and return their paths.

    Raises:
        UserError: one of them exists already, or the folder cannot be written to; nothing was written.
    """
    files = {"recipe.yaml": RECIPE, "my_rewards.py": REWARDS, "prompts.jsonl": PROMPTS}
    taken = [name for name in files if (folder / name).exists()]
    if taken:
        raise UserError(f"{folder / taken[0]} exists already; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    return [folder / name for name in files]
