"""What a model wrote, as one string, whichever shape the dataset gave it.

Not a reward: the other modules of this folder use it so that each works with plain and conversational data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Completion = str | Sequence[Message]


def completion_text(completion: Completion) -> str:
    """Return the text of a completion.

    A string is returned as it is. Of a list of messages, the contents of the assistant's messages are joined
    with newlines: what a tool or a user said in between is not the model's. A content of `None` (a bare tool
    call) is empty; of a list of parts (`{"type": "text", "text": ...}`) only the text counts.

    Raises:
        TypeError: the completion, or a message's content, has none of these shapes.
    """
    if isinstance(completion, str):
        return completion
    messages: Sequence[Message] = completion
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise TypeError(f"a completion is a string or a list of messages, not {_shown(completion)}")
    return "\n".join(
        _content_text(message.get("content"))
        for message in messages
        if message.get("role", "assistant") == "assistant"
    )


def _content_text(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content):
        return "".join(str(part.get("text") or "") for part in content if part.get("type", "text") == "text")
    raise TypeError(f"a message's content is a string or a list of parts, not {_shown(content)}")


def _shown(value: object) -> str:
    return f"{type(value).__name__}: {value!r:.80}"
