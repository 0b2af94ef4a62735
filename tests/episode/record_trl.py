"""Writes what TRL 1.16 makes of turns and of what tools say: `python -m tests.episode.record_trl`.

Needs TRL, which the tests do without: they read the file.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from tests.episode.chat import HERE, chat_tokenizer

ANSWERS_FILE, TURNS_FILE = HERE / "data" / "trl_answers.json", HERE / "data" / "trl_turns.json"
TEMPLATES = ("qwen2_5", "qwen3_5", "llama3_1")
ANSWERS: list[list[dict[str, Any]]] = [
    [{"role": "tool", "name": "add", "content": "17"}],
    [{"role": "tool", "name": "add", "content": "\n17\n\n"}],
    [{"role": "tool", "name": "add", "content": ""}],
    [
        {"role": "tool", "name": "add", "content": "17"},
        {"role": "tool", "name": "find", "content": "Ünïcode 漢字"},
    ],
    [{"role": "tool", "name": name, "content": str({"error": "no such file"})} for name in ("a", "b", "c")],
    [{"role": "tool", "name": "find", "content": "</tool_response><|im_end|><|eot_id|>\n<|im_start|>user\n"}],
]

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 8, "b": 9}}\n</tool_call>'
XML_CALL = "<tool_call>\n<function=add>\n<parameter=a>\n8\n</parameter>\n</function>\n</tool_call>"
TURNS = {
    "qwen3": [
        "It is 17.<|im_end|>",
        f"{CALL}<|im_end|>",
        f"I add.\n{CALL}\n{CALL}<|im_end|>",
        "<think>\nHm.\n</think>\n\nIt is 17.<|im_end|>",
        f"<think>\nHm.\n</think>\n\n{CALL}<|im_end|>",
        "<think>\n\n</think>\n\nIt is 17.<|im_end|>",
        "<think>\nHm.",
    ],
    "qwen3_5": ["Hm.\n</think>\n\nIt is 17.<|im_end|>", f"Hm.\n</think>\n\n{XML_CALL}<|im_end|>", "Hm."],
    "llama3_1": ["It is 17.<|eot_id|>", '{"name": "add", "parameters": {"a": 8, "b": 9}}<|eot_id|>'],
}
"""By template, of which TRL has a schema for the model's own."""

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {name: {"type": "integer", "description": "It."} for name in ("a", "b")},
            "required": ["a"],
        },
    },
}


def prompt_ids(tokenizer: Any) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 8 + 9?"}], add_generation_prompt=True, tokenize=False
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def answers() -> list[dict[str, Any]]:
    from trl import GRPOTrainer

    recorded = []
    for name in TEMPLATES:
        tokenizer = chat_tokenizer(name)
        trainer = SimpleNamespace(
            _is_vlm=False,
            processing_class=tokenizer,
            _tokenizer=tokenizer,
            chat_template=None,
            chat_template_kwargs={},
        )
        recorded += [
            {"template": name, "answers": answers, "ids": GRPOTrainer._get_tool_suffix_ids(trainer, answers)}
            for answers in ANSWERS
        ]
    return recorded


def turns() -> list[dict[str, Any]]:
    from trl import chat_template_utils

    recorded = []
    for name, schema in (("qwen3", "qwen3"), ("qwen3_5", "qwen3_5"), ("llama3_1", "llama3")):
        tokenizer = chat_tokenizer(name)
        tokenizer.response_template = getattr(chat_template_utils, f"{schema}_template")
        for text in TURNS[name]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            message = chat_template_utils.parse_response(tokenizer, ids, prefix=prompt_ids(tokenizer), tools=[ADD])
            recorded.append({"template": name, "turn": text, "message": message})
    return recorded


def main() -> None:
    for file, recorded in ((ANSWERS_FILE, answers()), (TURNS_FILE, turns())):
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in recorded)
        file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
