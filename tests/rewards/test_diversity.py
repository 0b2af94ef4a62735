from rewards.diversity import reward_num_unique_chars


def test_each_character_counts_once():
    completions = ["", "aaa", "aAbB ", "日本日"]
    assert reward_num_unique_chars(completions=completions, prompts=["p"] * 4) == [0.0, 1.0, 5.0, 2.0]


def test_messages_count_like_their_text():
    assert reward_num_unique_chars(completions=[[{"role": "assistant", "content": "abca"}]]) == [3.0]
