"""Episodes whose turns are written beforehand: what is said, how long tools take, and what was computed for it.

No torch or transformers is imported: the process that hands out the work reads this, too.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks._models import random_prompts, single_words

CHAT_TEMPLATE = """
{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n' }}
    {%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}
    {{- 'A call: <tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set role = 'user' if message.role == 'tool' else message.role %}
    {{- '<|im_start|>' + role + '\n' }}
    {%- if message.role == 'tool' %}
        {{- '<tool_response>\n' + message.content + '\n</tool_response>' }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson + '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
"""Of a model that calls tools as Qwen does."""


@dataclass(frozen=True)
class Plan:
    """The size of a rollout."""

    prompts: int
    group_size: int
    turns: int
    """Of each episode. All but the last call a tool."""
    prompt: int
    """Tokens of a question, without what the template puts around it and the tools."""
    shortest: int
    """Tokens of a turn."""
    longest: int
    result: int
    """Tokens of what a tool says."""
    longest_wait: float
    """Seconds that a call may take. They are drawn between 0 and this."""

    @property
    def episodes(self) -> int:
        return self.prompts * self.group_size


@dataclass(frozen=True)
class Script:
    """What is said in a rollout."""

    questions: list[str]
    turns: list[list[list[int]]]
    """Tokens of each turn of each episode, those of a group side by side."""
    results: list[str]
    """What each call gives."""
    waits: list[float]
    """Seconds that each call takes."""
    limit: int
    """Tokens that an episode may have."""

    def tool(self) -> Callable[..., str]:
        """The tool of this rollout, as TRL and we take it."""

        def look_up(entry: int) -> str:
            """Look up an entry.

            Args:
                entry: Its number.
            """
            time.sleep(self.waits[entry])
            return self.results[entry]

        return look_up


def script_of(plan: Plan, tokenizer: Any, seed: int) -> Script:
    """The same for the same seed."""
    source = random.Random(seed)
    words = single_words(tokenizer)
    calls = plan.turns - 1
    turns: list[list[list[int]]] = []
    for episode in range(plan.episodes):
        turns.append([])
        for turn in range(plan.turns):
            call = {"name": "look_up", "arguments": {"entry": episode * calls + turn}}
            text = f"\n<tool_call>\n{json.dumps(call)}\n</tool_call>" if turn < calls else ""
            said = tokenizer(text, add_special_tokens=False)["input_ids"]
            others = source.randint(plan.shortest, plan.longest) - len(said) - 1
            if others < 0:
                raise ValueError(f"a call alone is {len(said) + 1} tokens")
            turns[-1].append([*source.choices(words, k=others), *said, tokenizer.eos_token_id])
    return Script(
        random_prompts(tokenizer, plan.prompts, plan.prompt, seed),
        turns,
        [tokenizer.decode(source.choices(words, k=plan.result)) for _ in range(plan.episodes * calls)],
        [source.uniform(0, plan.longest_wait) for _ in range(plan.episodes * calls)],
        limit=plan.turns * (plan.longest + 2 * plan.result + 50),
    )


@dataclass(frozen=True)
class Played:
    """What became of a rollout."""

    seconds: float
    idle: float
    """Seconds in which nothing was computed, since tools were at work."""
    forward: float
    """Seconds in the model."""
    passes: int
    """Through the model."""
    computed: int
    """Tokens that were given to the model."""
    distinct: int
    """Tokens of all episodes, each beginning that several have in common counted once."""
    digest: str
    """Of all episodes' tokens."""


def distinct_tokens(sequences: Iterable[Sequence[int]]) -> int:
    """The size of the tree that these sequences are, which begin alike or not."""
    root: dict[int, Any] = {}
    count = 0
    for sequence in sequences:
        node = root
        for token in sequence:
            count += token not in node
            node = node.setdefault(token, {})
    return count


def digest(sequences: Iterable[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps([list(sequence) for sequence in sequences]).encode()).hexdigest()
