"""What a chat template makes of an episode: its prompt, and what it puts around an answer after a turn.

The tokens of a turn are kept as they were sampled. What comes after them is found in a small conversation of its
own, in which the turn is a word that can be found again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from grpo_cli.episode.calls import TurnParser
from grpo_cli.episode.tools import Tool
from grpo_cli.errors import UserError, one_line

Message = Mapping[str, Any]
"""One message in transformers' chat format."""

_WORDS, _THOUGHTS, _TOOL, _KEY, _VALUE, _RESULT = (
    f"grpoprobe{part}" for part in ("words", "thoughts", "tool", "key", "value", "result")
)
_EMPTY_THOUGHTS = re.compile(r"<think>\s*</think>\s*")
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": _TOOL,
        "description": "A tool.",
        "parameters": {
            "type": "object",
            "properties": {_KEY: {"type": "string", "description": "Any."}},
            "required": [_KEY],
        },
    },
}
_USER = {"role": "user", "content": "grpoprobeuser"}


@dataclass(frozen=True)
class _Ending:
    """How the template ends a turn."""

    said: str
    """The last thing that a probe of such a turn says."""
    end: str
    """The end token, which the policy samples; without one, what else the template writes after a call."""
    closing: str
    """All that follows what was said, the end token included; empty if the template writes none."""


class EpisodeTemplate:
    """The chat template of a tokenizer, as episodes use it.

    Args:
        tokenizer: a transformers tokenizer.
        template_kwargs: passed on to its chat template.
    """

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._kwargs = dict(template_kwargs or {})
        self._kept: dict[tuple[str, bool, bool], bool] = {}
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= {tokenizer.eos_token} if tokenizer.eos_token else set()
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Tokens of a conversation and of the beginning of the policy's next turn.

        Raises:
            UserError: the template fails on it.
        """
        return self._ids(self._render(messages, [tool.schema for tool in tools], go_on=True))

    def answer_ids(
        self, messages: Sequence[Message], *, ended: bool = True, last_id: int | None = None
    ) -> list[int]:
        """Tokens that follow a turn: the answers, all that the template puts around them, and the beginning of the
        next turn.

        Args:
            messages: results of the tools that the turn called, or what a user says to it.
            ended: whether the turn ended in its end token. If not (a stop string ended it), that comes first.
            last_id: the turn's last token, which is not said twice: GLM's turns end in the first of an answer.

        Raises:
            UserError: the template fails on them.
        """
        turn, ending = self._turn_before(messages)
        text = self._render([_USER, turn, *messages], (), go_on=True)
        cut = self._cut(text, ending)
        whole, before = self._ids(text), self._ids(text[:cut])
        # Without an end token, tokens may reach over the cut.
        after = whole[len(before) :] if whole[: len(before)] == before else self._ids(text[cut:])
        if not ended:
            return self._ids(self._ending_of_words.closing) + after
        return after[1:] if after[:1] == [last_id] else after

    @cached_property
    def keeps_history(self) -> bool:
        """Whether every turn, thoughts and calls included, stays as it was said whatever follows.

        If not, ask `keeps` about a turn, and where that says no take the next prompt from `prompt_ids`.
        """
        roles = [
            role for role, why in (("tool", self._why_no_results), ("user", self.why_no_replies)) if not why()
        ]
        if not roles:
            return True
        begun = self._render([_USER], (), go_on=True).rstrip()
        kinds = (False,) if begun.endswith("</think>") else (True,) if begun.endswith("<think>") else (False, True)
        return all(self._keeps(role, thoughts, True) for role in roles for thoughts in kinds)

    def keeps(self, turn: Message, answers: Sequence[Message], tools: Sequence[Tool] = ()) -> bool:
        """Whether the template leaves a turn and all before it as they are when these answers follow.

        Some drop the thoughts of a turn once a user speaks again, and some move the tools to what the user said
        last. TRL refuses or replaces such templates; here the next turn begins with the history rendered anew.
        """
        thoughts = bool(turn.get("reasoning_content")) or "</think>" in str(turn.get("content"))
        return self._keeps(answers[0]["role"], thoughts, bool(tools))

    def why_no_tools(self) -> str | None:
        """What is missing for tools, and what to set; None if nothing is."""
        if self._tokenizer.chat_template is None:
            return "the tokenizer has no chat template; set model.chat_template to one with tools"
        wanted = "set model.chat_template to one that does"
        try:
            if _TOOL not in self._render([_USER], [_PROBE_TOOL], go_on=True):
                return f"the chat template does not show tools to the model; {wanted}"
        except UserError as error:
            return f"{error}, with tools; {wanted}"
        return self._why_no_results() or TurnParser(self._tokenizer).why_no_calls()

    def why_no_replies(self) -> str | None:
        """What is missing for an environment that answers turns without calls; None if nothing is."""
        if self._tokenizer.chat_template is None:
            return "the tokenizer has no chat template; set model.chat_template"
        return self._why_not(
            [{"role": "user", "content": _RESULT}], (_WORDS, _RESULT), "what a user says after a turn"
        )

    def _why_no_results(self) -> str | None:
        return self._why_not([_result(0)], (_TOOL, _KEY, _VALUE, _RESULT), "tool calls and their results")

    def _why_not(self, answers: Sequence[Message], expected: Sequence[str], what: str) -> str | None:
        wanted = f"set model.chat_template to one that renders {what}"
        try:
            turn, ending = self._turn_before(answers)
            text = self._render([_USER, turn, *answers], (), go_on=True)
            self._cut(text, ending)
        except UserError as error:
            return f"{error}; {wanted}"
        if all(word in text for word in expected):
            return None
        return f"the chat template leaves out {what}; {wanted}"

    def _keeps(self, role: str, thoughts: bool, tools: bool) -> bool:
        key = (role, thoughts, tools)
        if key not in self._kept:
            self._kept[key] = self._probe_history(*key)
        return self._kept[key]

    def _probe_history(self, role: str, thoughts: bool, tools: bool) -> bool:
        """Whether a prompt and a turn after it stay when a message of this role follows."""
        answers = [_result(0)] if role == "tool" else [{"role": "user", "content": _RESULT}]
        turn, ending = self._turn_before(answers)
        template = self._template(bool(tools))
        if thoughts:
            if "think" not in template:
                return True  # they are words like any other
            turn = _with_thoughts(turn, "reasoning_content" in template)
        shown = [_PROBE_TOOL] if tools else []
        prompt = self._render([_USER], shown, go_on=True)
        said = self._render([_USER, turn], shown, go_on=False)
        later = self._render([_USER, turn, *answers], shown, go_on=True)
        if not said.startswith(prompt) or (thoughts and _THOUGHTS not in later):
            return False
        words = said[len(prompt) : self._cut(said, ending)]
        # Some write empty thoughts into the last turn alone, which the policy did not say.
        return later.startswith((prompt + words, prompt + _EMPTY_THOUGHTS.sub("", words)))

    def _turn_before(self, answers: Sequence[Message]) -> tuple[dict[str, Any], _Ending]:
        """A turn that these messages may answer, and how it ends."""
        results = [answer for answer in answers if answer["role"] == "tool"]
        if not results:
            return {"role": "assistant", "content": _WORDS}, self._ending_of_words
        return _calling(results if self._takes_several_calls else results[:1]), self._ending_of_calls

    @cached_property
    def _takes_several_calls(self) -> bool:
        """Llama's template takes no turn with several, and results in any number."""
        results = [_result(0), _result(1)]
        try:
            self._render([_USER, _calling(results), *results], (), go_on=True)
        except UserError:
            return False
        return True

    @cached_property
    def _ending_of_words(self) -> _Ending:
        """The end-of-sequence token, or else the first special token after a turn's words (Gemma has another)."""
        tail = self._tail({"role": "assistant", "content": _WORDS}, _WORDS)
        special = self._special.findall(tail)
        eos = self._tokenizer.eos_token
        end = eos if eos in special else special[0] if special else ""
        return _Ending(_WORDS, end, tail[: tail.index(end) + len(end)])

    @cached_property
    def _ending_of_calls(self) -> _Ending:
        """As words end if calls do, too; else with the last special token, as of Llama's built-in tools."""
        tail = self._tail(_calling([_result(0)]), _VALUE)
        special = self._special.findall(tail)
        words = self._ending_of_words.end
        end = words if words in special else special[-1] if special else tail.rstrip()
        return _Ending(_VALUE, end, tail[: tail.index(end) + len(end)])

    def _tail(self, turn: Message, said: str) -> str:
        """What the template writes after the last thing that a turn says."""
        _, found, tail = self._render([_USER, turn], (), go_on=False).rpartition(said)
        if not found:
            raise UserError("the chat template leaves out what the model says, or the tools that it calls")
        return tail

    def _cut(self, text: str, ending: _Ending) -> int:
        """Where the probe's turn ends in a rendered conversation."""
        said = text.find(ending.said)  # the first: an answer may say anything
        after = said + len(ending.said)
        end = text.find(ending.end, after)
        if said < 0 or end < 0:
            raise UserError("the chat template ends a turn otherwise once an answer follows")
        return end + len(ending.end)

    def _template(self, tools: bool) -> str:
        """That for tools, if the tokenizer has one of its own for them."""
        template: str = self._tokenizer.get_chat_template(tools=[] if tools else None)
        return template

    def _render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, go_on: bool) -> str:
        acting = bool(tools) or any(message["role"] == "tool" or "tool_calls" in message for message in messages)
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=self._template(acting),
                tools=list(tools) or None,  # some write a heading for no tools at all
                add_generation_prompt=go_on,
                tokenize=False,
                **self._kwargs,
            )
        except Exception as error:  # a template raises what it likes
            raise UserError(f"the chat template fails ({type(error).__name__}: {one_line(error)})") from error
        return text

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _calling(results: Sequence[Message]) -> dict[str, Any]:
    """A turn that made the calls of which these are the results; the last of them says the word to look for."""
    calls = [
        {
            "type": "function",
            "id": result.get("tool_call_id") or "callprobe",
            "function": {"name": result.get("name") or _TOOL, "arguments": {_KEY: _VALUE if last else "other"}},
        }
        for last, result in zip([False] * (len(results) - 1) + [True], results, strict=True)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _result(place: int) -> dict[str, Any]:
    return {"role": "tool", "name": _TOOL, "tool_call_id": f"callprob{place}", "content": _RESULT}


def _with_thoughts(turn: dict[str, Any], as_field: bool) -> dict[str, Any]:
    if as_field:
        return turn | {"reasoning_content": _THOUGHTS}
    return turn | {"content": f"<think>\n{_THOUGHTS}\n</think>\n\n{turn['content']}"}
