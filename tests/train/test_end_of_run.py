"""What a run says of itself at its end."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

import grpo_cli
from grpo_cli.train import api


def always_one(completions: list[str], **_: Any) -> list[float]:
    return [1.0 for _ in completions]


def end_of(recipe: dict[str, Any], **objects: Any) -> str:
    out = io.StringIO()
    result = grpo_cli.train(recipe, console=Console(file=out, width=200), **objects)
    assert (result.output_dir / "final").is_dir()
    return out.getvalue()


def test_what_looks_wrong_is_told_at_the_end(tiny_recipe: dict[str, Any]) -> None:
    said = end_of(tiny_recipe, rewards=[always_one])
    assert "looks wrong:  The reward always_one returned 1 for each of 36 completions in 3 steps." in said
    assert f"grpo report {tiny_recipe['train']['output_dir']}" in said
    assert said.count("looks wrong:") <= api.MOST_FINDINGS


def test_a_rule_that_fails_does_not_fail_the_run(
    tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> list[object]:
        raise ZeroDivisionError("nothing to divide by")

    monkeypatch.setattr(api, "find", broken)
    assert "at the end of the run: ZeroDivisionError: nothing to divide by" in end_of(tiny_recipe)
