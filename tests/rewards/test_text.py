import pytest

from rewards.text import completion_text


def test_a_string_is_returned_as_it_is():
    assert completion_text("  héllo\n") == "  héllo\n"


def test_an_empty_completion_is_empty_in_every_shape():
    assert completion_text("") == ""
    assert completion_text([]) == ""
    assert completion_text([{"role": "assistant", "content": None}]) == ""


def test_only_the_assistants_messages_count():
    messages = [
        {"role": "assistant", "content": "I look it up"},
        {"role": "tool", "content": "a long page"},
        {"role": "assistant", "content": "72"},
    ]
    assert completion_text(messages) == "I look it up\n72"


def test_the_text_parts_of_a_message_are_joined():
    parts = [{"type": "text", "text": "7"}, {"type": "image", "image": None}, {"type": "text", "text": "2"}]
    assert completion_text([{"role": "assistant", "content": parts}]) == "72"


@pytest.mark.parametrize("wrong", [None, 3, ["a string"], [{"role": "assistant", "content": 3}]])
def test_any_other_shape_is_an_error_that_shows_it(wrong):
    with pytest.raises(TypeError, match="not "):
        completion_text(wrong)
