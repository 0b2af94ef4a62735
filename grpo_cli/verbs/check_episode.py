"""What `grpo check` says of tools and environments: as the policy will see them, before a model is loaded.

It needs the tokenizer, whose chat template shows them, so a recipe with episodes waits for transformers.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from grpo_cli.data.prompts import Prompt
from grpo_cli.data.rows import PromptRows
from grpo_cli.episode.cast import Cast
from grpo_cli.episode.template import EpisodeTemplate
from grpo_cli.episode.tools import Tool
from grpo_cli.episode.world import Reset, World
from grpo_cli.errors import UserError
from grpo_cli.plugins import origin
from grpo_cli.recipe.schema import Recipe

SHOWN_CHARACTERS = 4_000
"""Of a prompt with tools."""


@contextmanager
def checked_episode(recipe: Recipe, cast: Cast, rows: PromptRows, console: Console) -> Iterator[list[Any]]:
    """Show tools, reset the environment of the first row, and render its prompt.

    Inside it is there for rewards to look at, and is closed then. There is none where the recipe has none, and
    where the tokenizer is not on this machine.

    Raises:
        UserError: an environment cannot be reset, or the chat template cannot show what the policy is answered.
    """
    if recipe.episode is None:
        yield []
        return
    for tool in cast.tools:
        _show(console, f"tool {tool.name}", _schema(tool))
    for kind in cast.kinds.values():
        named = "" if kind.name is None else f" {kind.name}"
        _show(console, f"environment{named}", f"{kind.class_name}: {', '.join(_abilities(kind))}")
        for tool in kind.tools:
            _show(console, f"its tool {tool.name}", _schema(tool))
    tokenizer = _tokenizer(recipe, console)
    if tokenizer is None:
        yield []
        return
    world = cast.world(recipe, tokenizer, {tokenizer.eos_token_id})
    assert world is not None
    reset = _reset(recipe, world, rows)
    try:
        _show_prompt(recipe, world, reset, rows, tokenizer, console)
        yield [] if reset.instance is None else [reset.instance]
    finally:
        world.take_back(reset)
        world.close()


def _reset(recipe: Recipe, world: World, rows: PromptRows) -> Reset:
    prompt = Prompt(0, rows.content(0), [], rows.row_columns(0))
    try:
        return world.reset(prompt, (recipe.train.seed, 0, 0, 0)).result()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"episode.environment: reset failed on the first row, twice: {origin(error)}") from error


def _show_prompt(
    recipe: Recipe, world: World, reset: Reset, rows: PromptRows, tokenizer: Any, console: Console
) -> None:
    start = world.start(Prompt(0, rows.content(0), [], rows.row_columns(0)), reset)
    content = start.prompt.content
    assert not isinstance(content, str)  # episodes need chats
    template = EpisodeTemplate(tokenizer, recipe.model.chat_template_kwargs)
    token_ids = template.prompt_ids(content, list(start.tools.values()))
    shown: str = tokenizer.decode(token_ids, skip_special_tokens=False)
    _show(console, f"the first prompt, {len(token_ids)} tokens", shown[:SHOWN_CHARACTERS])
    kept = "keeps what was said"
    if not template.keeps_history:
        kept = "may write what was said anew; a turn after that is trained on as a row of its own"
    console.print(f"[bold]chat template[/]: {kept}", soft_wrap=True)


def _tokenizer(recipe: Recipe, console: Console) -> Any:
    """None where it would have to be fetched first."""
    from grpo_cli.policy.load import load_tokenizer

    try:
        return load_tokenizer(recipe.model, is_offline=True)
    except UserError:
        if Path(recipe.model.tokenizer or recipe.model.name).expanduser().exists():
            raise
        console.print("[bold]chat template[/]: the tokenizer is not on this machine yet, so no prompt is shown")
        return None


def _schema(tool: Tool) -> str:
    return json.dumps(tool.schema["function"], indent=2, ensure_ascii=False)


def _abilities(kind: Any) -> Iterator[str]:
    yield f"reset{inspect.signature(kind.cls.reset)}"
    yield "answers turns without a call" if kind.responds else "does not answer turns without a call"
    if kind.has_reward:
        yield "scores its episodes"
    yield f"{len(kind.tools)} tools"


def _show(console: Console, title: str, text: str) -> None:
    console.print(f"[bold]{escape(title)}[/]\n{escape(text)}", soft_wrap=True, highlight=False)
