"""Wrong recipes, data, code and command lines: each ends in one message and the right exit code, without debris.

A case is a whole world (recipe, data, reward file, model) with one thing wrong in it. The command runs through the
real entry point: every case in this process, a sample of them as processes of their own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors import safe_open

from grpo_cli import cli
from tests.processes import ROOT, Command

RECIPE = """\
model:
  name: tiny
data:
  name: prompts.jsonl
rewards:
  - my:score
generation:
  num_generations: 4
  max_completion_tokens: 8
train:
  output_dir: run
  max_steps: 2
  prompts_per_step: 3
logging:
  trackers: []
"""
"""What a case appends begins at line 16."""

PROMPTS = "".join(f'{{"prompt": "question {i}:", "answer": "{i}"}}\n' for i in range(10))
REWARDS = "def score(completions, **columns):\n    return [0.5] * len(completions)\n"
ROW = '{"prompt": "a", "answer": "1"}\n'
CHECK, TRAIN, EVAL = "check recipe.yaml", "train recipe.yaml", "eval recipe.yaml"

PROGRESS_BAR = re.compile(r"\r?[^\r\n]*(?:it/s|s/it)\]")
FRAME = re.compile(r"[│╭╮╰╯─]+")


@dataclass(frozen=True)
class Wrong:
    """One wrong thing, and what must be said about it."""

    what: str
    says: tuple[str, ...]
    """Parts of the message; the first begins it. `{here}` is the current folder."""
    command: str = TRAIN
    code: int = 2
    lines: int = 1
    """Of the message; 0 if Typer writes it, with the usage above it."""
    swap: tuple[str, str] = ("", "")
    """A part of the recipe, and what is there instead."""
    add: str = ""
    """Appended to the recipe."""
    files: dict[str, str | bytes | None] = field(default_factory=dict)
    """Files of the case. `copy/` is a copy of the model; None removes a file from it."""
    before: str = ""
    """A command that does well first; `files` in `run/` are written after it."""


def swap(what: str, old: str, new: str, *says: str, **more: Any) -> Wrong:
    return Wrong(what, says, swap=(old, new), **{"command": CHECK, **more})


def add(what: str, text: str, *says: str, **more: Any) -> Wrong:
    return Wrong(what, says, add=text, **{"command": CHECK, **more})


def whole(what: str, recipe: str | bytes, *says: str, **more: Any) -> Wrong:
    return Wrong(what, says, command=CHECK, files={"recipe.yaml": recipe}, **more)


def data(what: str, text: str | bytes, *says: str, file: str = "d.jsonl", **more: Any) -> Wrong:
    return Wrong(what, says, swap=("prompts.jsonl", file), files={file: text}, **more)


def reward(what: str, source: str, *says: str, path: str = "my:score", **more: Any) -> Wrong:
    return Wrong(what, says, swap=("my:score", path), files={"my.py": source}, **more)


def scoring(what: str, line: str, *says: str, **more: Any) -> Wrong:
    """A reward function that goes wrong in training."""
    source = f"def score(completions, **columns):\n    {line}\n"
    return reward(what, source, *says, code=1, lines=3, **more)


def callback(what: str, source: str, *says: str, code: int = 1) -> Wrong:
    return Wrong(
        what, says, code=code, swap=("train:", "train:\n  callbacks: [cb:Watch]"), files={"cb.py": source}
    )


def watching(what: str, line: str, *says: str, event: str = "on_step_end") -> Wrong:
    return callback(what, f"class Watch:\n    def {event}(self, state):\n        {line}\n", *says)


def optimizer(what: str, source: str, *says: str, **more: Any) -> Wrong:
    return Wrong(what, says, add="optim: {name: op:make}", files={"op.py": source}, **more)


def loss(what: str, line: str, *says: str, **more: Any) -> Wrong:
    source = f"def loss(logprobs, *inputs, **named):\n    {line}\n"
    return Wrong(what, says, add="loss: {type: my_loss:loss}", files={"my_loss.py": source}, **more)


def model(what: str, files: dict[str, str | bytes | None], *says: str, name: str = "copy", **more: Any) -> Wrong:
    return Wrong(what, says, swap=("name: tiny", f"name: {name}"), files=files, **more)


def command(what: str, line: str, *says: str, **more: Any) -> Wrong:
    return Wrong(what, says, command=line, **more)


CASES = [
    # Keys and values of the recipe
    add(
        "unknown key",
        "loss: {epsilom: 0.1}",
        "recipe.yaml:16: loss.epsilom is not a setting",
        "did you mean loss.epsilon?",
    ),
    add(
        "unknown section",
        "optimizer: {lr: 1}",
        "recipe.yaml:16: optimizer is not a setting",
        "did you mean optim?",
    ),
    add(
        "unknown key like no other",
        "loss: {zzz: 1}",
        "recipe.yaml:16: loss.zzz is not a setting; loss has type, beta, ",
    ),
    add("key that is a number", "1: 2", "recipe.yaml:16: 1 is not a setting; keys are words"),
    swap(
        "key in the wrong section",
        "max_steps: 2",
        "max_steps: 2\n  learning_rate: 1e-5",
        "recipe.yaml:13: train.learning_rate is not a setting",
        "did you mean optim.learning_rate?",
    ),
    swap(
        "unknown key of a reward",
        "- my:score",
        "- {path: my:score, wieght: 2}",
        "recipe.yaml:6: rewards.0.wieght is not a setting",
        "did you mean rewards.0.weight?",
    ),
    swap(
        "word for a number",
        "max_steps: 2",
        "max_steps: many",
        "recipe.yaml:12: train.max_steps must be a whole number, not the string 'many'",
    ),
    swap(
        "no for false",
        "name: tiny",
        "name: tiny\n  trust_remote_code: no",
        "recipe.yaml:3: model.trust_remote_code must be true or false, not the string 'no'",
    ),
    swap(
        "out of range",
        "num_generations: 4",
        "num_generations: 1",
        "recipe.yaml:8: generation.num_generations is 1; it should be greater than or equal to 2",
    ),
    swap(
        "seed over 32 bits",
        "max_steps: 2",
        "max_steps: 2\n  seed: 4294967296",
        "recipe.yaml:13: train.seed is 4294967296; it should be less than or equal to 4294967295",
    ),
    add(
        "no such choice",
        "loss: {type: ppo}",
        "recipe.yaml:16: loss.type is 'ppo'; it must be one of 'grpo', 'bnpo', ",
    ),
    add(
        "infinite number",
        "optim: {learning_rate: .inf}",
        "recipe.yaml:16: optim.learning_rate is inf; it should be a finite number",
    ),
    add(
        "settings that contradict each other",
        "optim: {scheduler: constant, warmup_ratio: 0.1}",
        "recipe.yaml:16: optim.scheduler constant has no warm-up; write constant_with_warmup, or remove",
    ),
    swap(
        "both steps and epochs",
        "max_steps: 2",
        "max_steps: 2\n  epochs: 1.0",
        "recipe.yaml:12: train.max_steps says how long to train, and so does train.epochs; remove one",
    ),
    swap(
        "neither steps nor epochs",
        "  max_steps: 2\n",
        "",
        "recipe.yaml:10: train.max_steps is missing; set it, or train.epochs",
    ),
    swap("missing section", "model:\n  name: tiny\n", "", "recipe.yaml: model is missing"),
    swap("missing key", "name: prompts.jsonl", "split: train", "recipe.yaml:3: data.name is missing"),
    swap(
        "empty section",
        "  num_generations: 4\n  max_completion_tokens: 8\n",
        "",
        "recipe.yaml:7: generation must be a section with keys of its own, not empty",
    ),
    swap(
        "no rewards", "  - my:score", "  []", "recipe.yaml:5: rewards is missing or empty; name a reward function"
    ),
    swap(
        "the same reward twice",
        "  - my:score",
        "  - my:score\n  - my:score",
        "recipe.yaml:7: rewards.1.name is 'score', as for rewards.0; give one of them another name",
    ),
    swap(
        "folder of a user who is not there",
        "output_dir: run",
        "output_dir: ~nobody-of-that-name/run",
        "recipe.yaml:11: train.output_dir is '~nobody-of-that-name/run'",
        "a user of this machine",
    ),
    swap(
        "file name longer than any",
        "name: prompts.jsonl",
        f"name: {'x' * 300}.jsonl",
        "recipe.yaml:4: data.name is 'xxx",
        "at most 255 bytes between two slashes",
    ),
    swap(
        "three errors at once",
        "num_generations: 4\n  max_completion_tokens: 8",
        "num_generation: 4\n  max_completion_tokens: 0",
        "recipe.yaml:8: generation.num_generation is not a setting",
        "did you mean generation.num_generations?",
        "\nrecipe.yaml:9: generation.max_completion_tokens is 0; it should be greater",
        "\nrecipe.yaml:16: loss.delta is 0",
        lines=3,
        add="loss: {delta: 0}",
    ),
    # The recipe as a file
    whole("invalid YAML", RECIPE + "loss: [1,\n", "recipe.yaml:17: not valid YAML"),
    whole("tab", RECIPE.replace("  name: tiny", "\tname: tiny"), "recipe.yaml:2: not valid YAML", "'\\t'"),
    whole("colon in a value", RECIPE.replace("tiny", "tiny: x"), "recipe.yaml:2: not valid YAML: mapping values"),
    whole("null character", RECIPE + "loss: \0\n", "recipe.yaml:16: not valid YAML: the character '\\x00'"),
    whole("YAML within itself", RECIPE + "loss: &a {b: *a}\n", "recipe.yaml:16: not valid YAML: the anchor &a"),
    whole(
        "YAML nested deeply",
        RECIPE + f"loss: {'[' * 2000}\n",
        "recipe.yaml:16: not valid YAML: more than 50 lists",
    ),
    whole(
        "value that its tag does not fit",
        RECIPE + "loss: {beta: !!float x}\n",
        "recipe.yaml:16: not valid YAML: 'x' is not a value of float",
    ),
    whole(
        "tag that runs Python",
        RECIPE + "loss: !!python/name:os.system\n",
        "recipe.yaml:16: not valid YAML: could not determine a constructor",
    ),
    whole(
        "key set twice",
        RECIPE + "loss: {}\nloss: {}\n",
        "recipe.yaml:17: loss is set twice (first at recipe.yaml:16)",
    ),
    whole("not UTF-8", RECIPE.encode("utf-16"), "recipe.yaml: cannot read the recipe: it is not UTF-8 text"),
    whole("empty recipe", "", "recipe.yaml: a recipe is a mapping of sections (model, data, rewards, train"),
    whole("recipe that is a list", "- model\n", "recipe.yaml: a recipe is a mapping of sections"),
    command(
        "recipe that is not there",
        "train recipes.yaml",
        "recipes.yaml: cannot read the recipe: No such file or directory",
    ),
    command("recipe that is a folder", "train tiny", "tiny: cannot read the recipe: Is a directory"),
    command(
        "folder that is no run's",
        "check tiny",
        "tiny is not the folder of a run: there is no recipe.yaml in it",
    ),
    # --set
    command(
        "--set without a value",
        f"{CHECK} --set train.max_steps",
        "--set train.max_steps: write --set key.path=value",
    ),
    command("--set with two dots", f"{CHECK} --set train..max_steps=3", "--set train..max_steps=3: write --set"),
    command(
        "--set of an unknown key",
        f"{CHECK} --set train.max_step=3",
        "--set train.max_step=3: train.max_step is not a setting; did you mean train.max_steps?",
    ),
    command(
        "--set in an unknown section",
        f"{CHECK} --set trian.max_steps=3",
        "--set trian.max_steps=3: trian is not a setting; did you mean train?",
    ),
    command(
        "--set of a wrong type",
        f"{CHECK} --set train.max_steps=x",
        "--set train.max_steps=x: train.max_steps must be a whole number",
    ),
    command(
        "--set of broken YAML", f"{CHECK} --set train.max_steps=[1", "--set train.max_steps=[1: the value is not"
    ),
    command(
        "--set past the end of a list",
        f"{CHECK} --set rewards.5.weight=1",
        "--set rewards.5.weight=1: rewards has 1 entries; write rewards.0",
        "or rewards.1 to append",
    ),
    command("--set of a list by name", f"{CHECK} --set rewards.weight=1", "--set rewards.weight=1: rewards has 1"),
    command(
        "--set of an odd digit", f"{CHECK} --set rewards.².weight=1", "--set rewards.².weight=1: rewards has 1"
    ),
    command(
        "--set below a number",
        f"{CHECK} --set train.max_steps.x=1",
        "--set train.max_steps.x=1: train.max_steps has no keys of its own",
    ),
    # The command line
    command("unknown verb", "trian recipe.yaml", "Usage: grpo", "No such command 'trian'", "'train'", lines=0),
    command("missing argument", "train", "Usage: grpo train", "Missing argument 'RECIPE'", lines=0),
    command("unknown option", f"{TRAIN} --resum", "Usage: grpo train", "No such option: --resum", lines=0),
    command("argument too many", f"{TRAIN} x=3", "Usage: grpo train", "unexpected extra argument", lines=0),
    command(
        "no prompts to sample", "sample recipe.yaml -n 0", "Usage: grpo sample", "Invalid value for '-n'", lines=0
    ),
    command(
        "eval without data.eval", EVAL, "grpo eval needs data.eval; add it to the recipe, or --set data.eval.name"
    ),
    command(
        "--pass-at over the group",
        f"{EVAL} --set data.eval.name=prompts.jsonl --pass-at 9",
        "--pass-at 9: k lies between 1 and generation.num_generations (4)",
    ),
    command(
        "--pass-reward that is no number",
        f"{EVAL} --set data.eval.name=prompts.jsonl --pass-reward nan",
        "--pass-reward nan: must be a finite number",
    ),
    command(
        "--model that is not there",
        f"{EVAL} --set data.eval.name=prompts.jsonl --model ./no",
        "--model: there is no folder ./no",
    ),
    command(
        "--model that is an adapter",
        f"{EVAL} --set data.eval.name=prompts.jsonl --model ad",
        "--model ad is a LoRA checkpoint, and the recipe has no model.lora",
        files={"ad/adapter_config.json": "{}"},
    ),
    command(
        "--model that is a damaged adapter",
        f"{EVAL} --set data.eval.name=prompts.jsonl --set model.lora.r=2 --model ad",
        "--model ad: the adapter cannot be loaded into tiny",
        lines=2,
        files={"ad/adapter_config.json": "{}", "ad/adapter_model.safetensors": b"garbage"},
    ),
    command("init over a file", "init .", "recipe.yaml exists already; choose another folder"),
    command("init into a file", "init my.py", "cannot write to my.py: File exists"),
    # Data
    swap(
        "data file that is not there",
        "prompts.jsonl",
        "promts.jsonl",
        "data.name: no such file: promts.jsonl; did you mean prompts.jsonl?",
    ),
    swap(
        "data that is on no Hub",
        "prompts.jsonl",
        "nobody/no-such-data",
        "data.name: nobody/no-such-data: HF_HUB_",
        "set data.name to a local .jsonl, .json, .csv or .parquet file",
    ),
    data("empty data file", "", "d.jsonl: the file is empty"),
    data("data file of blank lines", "\n\n", "data: d.jsonl has no rows"),
    data("malformed JSON line", ROW + ROW + '{"prompt": "a",\n', "d.jsonl:3: not JSON: ", "at column 16"),
    data("JSON line that is a list", ROW + "[1]\n", "d.jsonl:2: is a list; each line must be an object"),
    data(
        "column of two types",
        ROW + '{"prompt": 3}\n',
        "d.jsonl: column 'prompt' is text in row 1 and an integer in row 2",
    ),
    data("data not in UTF-8", b'{"prompt": "\xe9"}\n', "d.jsonl:1: not UTF-8", "save the file as UTF-8"),
    data(
        "CSV row of other length",
        "prompt,answer\na,b\nc\n",
        "d.csv:3: 1 fields, but the header has 2",
        file="d.csv",
    ),
    data("damaged Parquet", b"garbage", "d.parquet: not a Parquet file, or a damaged one", file="d.parquet"),
    data(
        "data of an unknown kind", "a", "data.name: d.txt is not a .jsonl, .json, .csv or .parquet", file="d.txt"
    ),
    data(
        "no prompt column",
        '{"question": "a"}\n',
        "data.prompt_column: there is no column 'prompt'; the columns are",
        "data.columns: {question: prompt}",
    ),
    data(
        "null prompt",
        ROW + ROW + '{"prompt": null}\n',
        "data: d.jsonl: row 3 has no prompt (null); remove the row",
    ),
    data("blank prompt", ROW + '{"prompt": " "}\n', "data: d.jsonl: row 2 has an empty prompt; remove the row"),
    data(
        "prompt that is a number",
        '{"prompt": 3}\n',
        "data.prompt_column: prompt holds int64",
        "data.prompt_template",
    ),
    data(
        "chat that ends with the answer",
        '{"prompt": [{"role": "assistant", "content": "a"}]}\n',
        "data: d.jsonl: row 1 ends with an assistant message",
    ),
    data(
        "reserved column",
        '{"prompt": "a", "completions": "b"}\n',
        "data.columns: reward functions get an argument completions already",
        "rename it with data.columns: {completions: completions_in_data}",
    ),
    swap(
        "renamed column that is not there",
        "name: prompts.jsonl",
        "name: prompts.jsonl\n  columns: {anser: gold}",
        "data.columns: there is no column 'anser' to rename",
        "did you mean answer?",
    ),
    swap(
        "template with an unknown column",
        "name: prompts.jsonl",
        "name: prompts.jsonl\n  prompt_template: '{promt}'",
        "data.prompt_template: there is no column 'promt'; the columns are prompt, answer; did you mean {prompt}?",
    ),
    swap(
        "all prompts too long",
        "name: prompts.jsonl",
        "name: prompts.jsonl\n  max_prompt_tokens: 2",
        "data.max_prompt_tokens: every prompt has more than 2 tokens, the shortest 11; raise it",
        command=TRAIN,
    ),
    Wrong(
        "data factory that raises",
        ("data.name: fac:rows failed: {here}/fac.py:2: OSError: no disk",),
        swap=("prompts.jsonl", "fac:rows"),
        files={"fac.py": "def rows():\n    raise OSError('no disk')\n"},
    ),
    Wrong(
        "data factory that exits",
        ("data.name: fac:rows failed: {here}/fac.py:2: SystemExit: 3",),
        swap=("prompts.jsonl", "fac:rows"),
        files={"fac.py": "def rows():\n    raise SystemExit(3)\n"},
    ),
    swap(
        "held-out data that are not there",
        "name: prompts.jsonl",
        "name: prompts.jsonl\n  eval: {name: held_out.jsonl}",
        "data.eval.name: no such file: held_out.jsonl",
    ),
    # Rewards, before training
    reward(
        "reward module that is not there",
        REWARDS,
        "rewards.0: there is no module 'mine' in {here}",
        path="mine:score",
    ),
    reward(
        "reward function that is not there",
        REWARDS,
        "rewards.0: my has no scor; did you mean score?",
        path="my:scor",
    ),
    reward(
        "reward without a colon",
        REWARDS,
        "rewards.0: there is no installed reward function 'my.score'; did you mean my:score?",
        path="my.score",
    ),
    reward(
        "reward module with a syntax error",
        "def score(:\n",
        "rewards.0: importing my failed: {here}/my.py:1: Syntax",
    ),
    reward(
        "reward module that raises", "1 / 0\n", "rewards.0: importing my failed: {here}/my.py:1: ZeroDivisionError"
    ),
    reward(
        "reward module that exits",
        "raise SystemExit(3)\n",
        "rewards.0: importing my failed: {here}/my.py:1: System",
    ),
    reward(
        "reward module that needs another",
        "import no_such_package\n",
        "rewards.0: my needs no_such_package, which is not installed",
    ),
    reward(
        "reward that cannot be called", "score = 3\n", "rewards.0: my:score is of type int, not something to call"
    ),
    reward(
        "reward class with wrong params",
        "class Judge:\n    def __init__(self, bar): ...\n    def __call__(self, **_): ...\n",
        "rewards.0: my:Judge does not take bat; params can be: bar",
        path="{path: my:Judge, params: {bat: 1}}",
    ),
    reward(
        "reward class without its params",
        "class Judge:\n    def __init__(self, bar): ...\n    def __call__(self, **_): ...\n",
        "rewards.0: my:Judge cannot be made: TypeError: ",
        "'bar'",
        path="my:Judge",
    ),
    reward(
        "column that a reward needs",
        "def score(completions, target): ...\n",
        "reward score needs the column target, which data does not have (it has: answer)",
        "data.columns",
    ),
    reward(
        "reward model that is not one",
        REWARDS,
        "rewards.0: model tiny has 2 outputs, but a reward model has one",
        path="{model: tiny}",
    ),
    reward(
        "reward that raises in grpo check",
        "def score(**_):\n    raise ValueError('boom')\n",
        "on a sample row of the data: reward score, step 0: raised ValueError: boom at {here}/my.py:2",
        command=CHECK,
        lines=3,
    ),
    # Rewards, while training
    scoring(
        "reward that raises",
        "raise ValueError('boom')",
        "reward score, step 1: raised ValueError: boom at {here}/my.py:2\n",
        "prompt 0: 'question",
        "completion 0: ",
    ),
    scoring(
        "reward that exits", "raise SystemExit(7)", "reward score, step 1: raised SystemExit: 7 at {here}/my.py:2"
    ),
    scoring(
        "reward of wrong length", "return [1.0]", "reward score, step 1: returned 1 values for 12 completions"
    ),
    scoring(
        "reward of None", "return None", "reward score, step 1: returned None instead of a list with one number"
    ),
    scoring(
        "reward of NaN",
        "return [0.0] * 11 + [float('nan')]",
        "reward score, step 1: value 11 is nan; return None for 'does not apply'",
        "completion 11: ",
    ),
    scoring(
        "reward of a string",
        "return ['good'] * 12",
        "reward score, step 1: value 0 is a str, not a number: 'good'",
    ),
    scoring(
        "reward that takes too long",
        "import time; time.sleep(3)",
        "reward score, step 1: took longer than 0.1 seconds (timeout_s)",
        path="{path: my:score, timeout_s: 0.1}",
    ),
    reward(
        "reward that raises at a later step",
        "calls = []\ndef score(completions, **columns):\n    calls.append(1)\n"
        "    return [1 / (2 - len(calls))] * len(completions)\n",
        "reward score, step 2: raised ZeroDivisionError: division by zero at {here}/my.py:4",
        code=1,
        lines=3,
        add="  every: 1",
        command=f"{TRAIN} --set train.save_every=1",
    ),
    reward(
        "reward of a string at a later step",
        "calls = []\ndef score(completions, **columns):\n    calls.append(1)\n"
        "    return [0.0 if len(calls) < 3 else 'good'] * len(completions)\n",
        "reward score, step 3: value 0 is a str, not a number: 'good'",
        code=1,
        lines=3,
        command=f"{TRAIN} --set train.save_every=1 --set train.max_steps=3",
    ),
    reward(
        "reward that raises in grpo sample",
        "def score(**_):\n    raise ValueError('boom')\n",
        "reward score, step 0: raised ValueError: boom at {here}/my.py:2",
        code=1,
        lines=3,
        command="sample recipe.yaml -n 1",
    ),
    # Callbacks
    callback(
        "callback that is not there",
        "class Watcher: ...\n",
        "train.callbacks.0: cb has no Watch; did you mean Watcher?",
        code=2,
    ),
    callback(
        "callback that cannot be made",
        "class Watch:\n    def __init__(self): raise OSError('no disk')\n",
        "train.callbacks.0: cb:Watch() failed: {here}/cb.py:2: OSError: no disk",
        code=2,
    ),
    callback(
        "callback without an event",
        "class Watch: ...\n",
        "train.callbacks.0: ",
        "none of the methods on_train_start",
        code=2,
    ),
    watching(
        "callback that raises in a step",
        "raise ValueError('boom')",
        "callback Watch.on_step_end, step 1: {here}/cb.py:3: ValueError: boom",
    ),
    watching(
        "callback that raises in a library",
        "import json; json.loads('{')",
        "callback Watch.on_step_end, step 1: {here}/cb.py:3: JSONDecodeError: ",
    ),
    watching(
        "callback that raises at the start",
        "raise ValueError('boom')",
        "callback Watch.on_train_start, step 0: {here}/cb.py:3: ValueError: boom",
        event="on_train_start",
    ),
    watching(
        "callback with a metric of text",
        "state.metrics['mood'] = 'good'",
        "callback Watch.on_step_end, step 1: metrics['mood'] is of type str; only numbers can be logged",
    ),
    callback(
        "callback that takes no state",
        "class Watch:\n    def on_step_end(self): ...\n",
        "callback Watch.on_step_end, step 1: TypeError: Watch.on_step_end() takes 1 positional argument",
    ),
    # Optimizers
    optimizer("optimizer that is not there", "", "optim.name: op has no make"),
    optimizer(
        "optimizer that refuses its arguments",
        "def make(parameters): ...\n",
        "optim.params: op:make failed: TypeError: make() got an unexpected keyword argument 'lr'",
    ),
    optimizer(
        "optimizer that is none",
        "def make(parameters, lr): ...\n",
        "optim.name: op:make returned a NoneType, not a torch optimizer",
    ),
    # Losses
    Wrong(
        "loss that is not there",
        ("loss.type: my has no los; did",),
        add="loss: {type: my:los}",
        files={"my.py": f"{REWARDS}loss = 1"},
    ),
    loss("loss that raises", "1 / 0", "loss.type: my_loss:loss failed: {here}/my_loss.py:2: ZeroDivision", code=1),
    loss("loss of another kind", "return 0.5", "loss.type: my_loss:loss returned a float; return a", code=1),
    # Models and tokenizers
    model("model folder that is not there", {}, "model.name: there is no folder ./none; set it to", name="./none"),
    model(
        "model on no Hub",
        {},
        "model.name: cannot load the tokenizer of nobody/nothing: HF_HUB_OFFLINE is set, and the model is not",
        name="nobody/nothing",
    ),
    model(
        "folder without a model",
        {"copy/config.json": None, "copy/model.safetensors": None},
        "model.name: the folder copy holds no model: there is no config.json or .gguf file in it",
    ),
    model(
        "corrupt config.json",
        {"copy/config.json": '{"model_type":'},
        "model.name: cannot load",
        "copy/config.json",
        lines=2,
    ),
    model("config.json of a list", {"copy/config.json": "[]"}, "model.name: cannot load", "copy", lines=2),
    model(
        "model of an unknown type",
        {"copy/config.json": '{"model_type": "nope"}'},
        "model.name: cannot load",
        "`nope`",
        lines=2,
    ),
    model(
        "model without weights",
        {"copy/model.safetensors": None},
        "model.name: cannot load copy",
        "no file named model.safetensors",
        lines=2,
    ),
    model("corrupt weights", {"copy/model.safetensors": b"garbage!" * 9}, "model.name: cannot load copy", lines=2),
    model(
        "weights that Git LFS left out, in grpo check",
        {"copy/model.safetensors": "version https://git-lfs..."},
        "model.name: copy/model.safetensors is not a safetensors file",
        "Git LFS",
        command=CHECK,
    ),
    model(
        "corrupt tokenizer",
        {"copy/tokenizer.json": '{"a": 1}'},
        "model.name: cannot load the tokenizer of copy",
        lines=2,
    ),
    model("GGUF file that is not there", {}, "model.name: there is no file m.gguf", name="m.gguf"),
    model(
        "GGUF file of garbage",
        {"m.gguf": b"garbage" * 99},
        "model.name: cannot load",
        "m.gguf",
        name="m.gguf",
        lines=2,
    ),
    model(
        "GGUF file cut short",
        {"m.gguf": b"GGUF\x03\0\0\0" + b"\xff" * 16},
        "model.name: cannot load",
        "m.gguf",
        name="m.gguf",
        lines=2,
    ),
    model(
        "GGUF file of garbage, in grpo check",
        {"m.gguf": b"garbage" * 99},
        "model.name: m.gguf is not a GGUF file, or a damaged one",
        name="m.gguf",
        command=CHECK,
    ),
    model(
        "several GGUF files",
        {"ggufs/a.gguf": b"", "ggufs/b.gguf": b""},
        "model.gguf_file: ggufs holds several, set it to one of a.gguf, b.gguf",
        name="ggufs",
    ),
    model(
        "tokenizer that is not there",
        {},
        "model.tokenizer: there is no folder ./none",
        name="tiny\n  tokenizer: ./none",
    ),
    model(
        "reference that is not there",
        {},
        "model.reference: there is no folder ./none",
        name="tiny\n  reference: ./none",
        add="loss: {beta: 0.1}",
    ),
    model(
        "kernel that is not installed",
        {},
        "model.attn_implementation: flash_attention_2 cannot be used here, write auto",
        name="tiny\n  attn_implementation: flash_attention_2",
        lines=2,
    ),
    model(
        "adapters on no module",
        {},
        "model.lora.target_modules: Target modules {'nope'} not found in the base model; "
        "write all-linear, or names among down_proj",
        name="tiny\n  lora: {target_modules: [nope]}",
    ),
    model(
        "module to save that is not there",
        {},
        "model.lora.modules_to_save: the model has no module nope",
        name="tiny\n  lora: {modules_to_save: [nope]}",
    ),
    model(
        "chats without a chat template",
        {"copy/chat_template.jinja": None, "d.jsonl": '{"prompt": [{"role": "user", "content": "a"}]}'},
        "data: the prompts are chats, and the tokenizer has no chat template; set model.chat_temp",
        command=f"{TRAIN} --set data.name=d.jsonl",
    ),
    model(
        "chat template that is not there",
        {},
        "model.chat_template: there is no file chat.jinja",
        name="tiny\n  chat_template: chat.jinja",
    ),
    model(
        "chat template not in UTF-8",
        {"chat.jinja": b"\xff"},
        "model.chat_template: the file chat.jinja cannot be read",
        name="tiny\n  chat_template: chat.jinja",
    ),
    model(
        "chat template with a syntax error",
        {"chat.jinja": "{% for %}"},
        "data: prompts.jsonl: row 1: the chat template fails on the prompt: TemplateSyntaxError",
        name="tiny\n  chat_template: '{% for %}'",
        command=f"{TRAIN} --set data.system_prompt=brief",
    ),
    # The run's folder and its trackers
    command(
        "output_dir that is a file", f"{TRAIN} --set train.output_dir=my.py", "train.output_dir: my.py is a file"
    ),
    command(
        "output_dir in a file",
        f"{TRAIN} --set train.output_dir=my.py/run",
        "train.output_dir: cannot write to my.py/run: Not a directory",
    ),
    command(
        "output_dir that holds a run",
        TRAIN,
        "train.output_dir: run already holds a run; continue it with --resume, or choose another folder",
        before=TRAIN,
    ),
    command(
        "--resume with other settings",
        f"{TRAIN} --resume --set train.seed=7",
        "--resume: the run in run was started with other settings: train.seed was 42, is 7",
        "Change them back",
        before=TRAIN,
    ),
    command(
        "--resume of a damaged recipe",
        f"{TRAIN} --resume",
        "run/recipe.yaml:2: not valid YAML",
        before=TRAIN,
        files={"run/recipe.yaml": "model: [\n"},
    ),
    command(
        "--resume of an empty recipe",
        f"{TRAIN} --resume",
        "run/recipe.yaml: a recipe is a mapping of sections",
        before=TRAIN,
        files={"run/recipe.yaml": ""},
    ),
    command(
        "--resume of damaged checkpoints",
        f"{TRAIN} --resume --set train.save_every=1",
        "--resume: run/checkpoint-000002 is damaged: optimizer.pt has 7 bytes, ",
        "run/checkpoint-000001 is damaged: model.safetensors is missing. No checkpoint is left to go on from",
        code=1,
        before=f"{TRAIN} --set train.save_every=1",
        files={"run/checkpoint-000002/optimizer.pt": b"garbage", "run/checkpoint-000001/model.safetensors": None},
    ),
    command(
        "unknown tracker",
        f"{TRAIN} --set logging.trackers.0=tensorbord",
        "logging.trackers.0: 'tensorbord' is not one of",
        "tensorboard",
    ),
    command(
        "tracker that is not installed",
        f"{TRAIN} --set logging.trackers.0=comet_ml",
        "logging.trackers.0: the package of comet_ml is not installed; install it, or remove comet_ml",
    ),
]

AS_PROCESSES = ("unknown key", "--set of a wrong type", "unknown verb")
AS_PROCESSES_THAT_TRAIN = (
    "malformed JSON line",
    "reward that raises at a later step",
    "callback that raises in a step",
)


def make_world(case: Wrong, folder: Path, model_dir: Path) -> None:
    """Write the files of a case; those in `run/` wait for `damage`."""
    (folder / "tiny").symlink_to(model_dir)
    files: dict[str, str | bytes | None] = {"prompts.jsonl": PROMPTS, "my.py": REWARDS}
    assert case.swap[0] in RECIPE
    files["recipe.yaml"] = RECIPE.replace(*case.swap, 1) + case.add
    files |= case.files
    if any(name.startswith("copy/") for name in files):
        shutil.copytree(model_dir, folder / "copy")
    write(folder, {name: content for name, content in files.items() if not name.startswith("run/")})


def damage(case: Wrong, folder: Path) -> None:
    write(folder, {name: content for name, content in case.files.items() if name.startswith("run/")})


def write(folder: Path, files: dict[str, str | bytes | None]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file and what is in it, compiled Python aside."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if "__pycache__" not in name}


def assert_one_message(case: Wrong, folder: Path, out: str, err: str) -> None:
    assert "Traceback" not in out + err
    message = PROGRESS_BAR.sub("", err).strip()
    if case.lines:
        assert len(message.splitlines()) == case.lines, message
    else:
        message = " ".join(FRAME.sub(" ", message).split())
    expected = [part.replace("{here}", str(folder.resolve())) for part in case.says]
    assert message.startswith(expected[0]), message
    for part in expected[1:]:
        assert part in message


def assert_nothing_half_written(folder: Path) -> None:
    """A failed run has no final model and no leftovers; what it has can be read."""
    run = folder / "run"
    assert not (run / "final").exists()
    assert not list(run.rglob("*.partial"))
    yaml.safe_load((run / "recipe.yaml").read_text())
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    for path in run.glob("completions/*"):
        pq.read_table(path)
    for checkpoint in run.glob("checkpoint-*"):
        json.loads((checkpoint / "position.json").read_text())
        torch.load(checkpoint / "optimizer.pt", weights_only=True)
        torch.load(checkpoint / "scheduler.pt", weights_only=True)
        with safe_open(checkpoint / "model.safetensors", framework="pt") as weights:
            assert len(weights.keys()) == 21


def assert_left_as_promised(case: Wrong, folder: Path, before: dict[str, bytes]) -> None:
    if case.code == 2 or case.before or not case.command.startswith("train"):
        assert contents(folder) == before
    else:
        assert_nothing_half_written(folder)


def run_here(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["grpo", *command.split()])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a command; what it imports is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("my", "cb", "op", "fac", "my_loss"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_wrong_input_ends_in_one_message_and_leaves_nothing_behind(
    case: Wrong,
    here: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    make_world(case, here, tiny_model_dir)
    if case.before:
        assert run_here(case.before, monkeypatch) == 0
        damage(case, here)
        capfd.readouterr()
    before = contents(here)
    code = run_here(case.command, monkeypatch)
    out, err = capfd.readouterr()
    assert code == case.code, err
    assert_one_message(case, here, out, err)
    assert_left_as_promised(case, here, before)


OF_PROCESSES = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.parametrize("what", AS_PROCESSES)
def test_the_same_holds_for_a_process(what: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    (case,) = [case for case in CASES if case.what == what]
    make_world(case, tmp_path, tiny_model_dir)
    before = contents(tmp_path)
    process = subprocess.run(
        [sys.executable, "-m", "grpo_cli.cli", *case.command.split()],
        cwd=tmp_path,
        env=os.environ | OF_PROCESSES,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == case.code, process.stderr
    assert_one_message(case, tmp_path, process.stdout, process.stderr)
    assert_left_as_promised(case, tmp_path, before)


@pytest.mark.slow
@pytest.mark.parametrize("what", AS_PROCESSES_THAT_TRAIN)
def test_the_same_holds_for_a_process_that_trains(what: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    (case,) = [case for case in CASES if case.what == what]
    make_world(case, tmp_path, tiny_model_dir)
    before = contents(tmp_path)
    environment = os.environ | OF_PROCESSES
    process = Command(*case.command.split(), environment=environment, folder=tmp_path, errors_apart=True)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == case.code, errors
    assert_one_message(case, tmp_path, output, errors)
    assert_left_as_promised(case, tmp_path, before)


def test_every_kind_of_mistake_has_its_own_case() -> None:
    assert len({case.what for case in CASES}) == len(CASES) >= 50
