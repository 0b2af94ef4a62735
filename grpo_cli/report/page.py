"""A report of runs as one HTML file that needs no network and executes nothing but its own scripts.

What comes from a model, a dataset or a recipe is text: jinja2 escapes it, or it lies as JSON in blocks that
scripts read and put into the page with `textContent`. The page's own policy allows the scripts and styles whose
hashes it names, and no connection.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from grpo_cli.errors import UserError
from grpo_cli.report.curves import change, known
from grpo_cli.report.finding import Finding
from grpo_cli.report.findings import WORTH_TELLING, find
from grpo_cli.report.page_completions import Completions
from grpo_cli.report.page_data import Curves
from grpo_cli.report.recipe_words import differing_settings, in_words, non_defaults
from grpo_cli.report.run import Run
from grpo_cli.report.text import SEVERE

SCRIPTS = ("page.js", "plots.js", "completions.js")
"""In the order in which they run, after Plotly."""

ESCAPES = {character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
"""JSON for characters that could end a block of the page."""


def write_report(runs: Sequence[Run], out: Path) -> None:
    """Write one page about all of the runs, whole or not at all.

    Args:
        runs: at least one; several are drawn over each other.
        out: the file, which is replaced.

    Raises:
        UserError: it cannot be written.
    """
    page = report_page(runs)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        # A model may have said halves of characters, which no file can hold.
        partial.write_bytes(page.encode("utf-8", errors="replace"))
        os.replace(partial, out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{out} cannot be written: {error.strerror}; --out names another file") from error


def report_page(runs: Sequence[Run]) -> str:
    """The page as HTML."""
    labels = run_labels(runs)
    curves, completions = Curves(runs), Completions(runs, labels)
    drawn = curves.data() | {"runs": labels}
    stored = completions.data()
    script_texts = [_plotly(), *(_asset(name) for name in SCRIPTS)]
    style = _asset("page.css")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("page.html")).render(
        policy=content_policy(script_texts, [style, ""]),  # Plotly fills an empty style by rules
        style=Markup(style),
        scripts=[Markup(text) for text in script_texts],
        title=", ".join(labels),
        made_at=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        runs=[_about(run, label) for run, label in zip(runs, labels, strict=True)],
        differing=differing_settings([run.recipe for run in runs]),
        curves=as_json_block(drawn),
        sections=[section["title"] for section in drawn["sections"]],
        completions=as_json_block(stored),
        has_completions=any(stored),
        curve_notes=curves.notes(),
        completion_notes=completions.notes(),
    )


def run_labels(runs: Sequence[Run]) -> list[str]:
    """The runs' names; of runs whose names are alike the paths of their folders."""
    names = Counter(run.name for run in runs)
    return [run.name if names[run.name] == 1 else str(run.folder) for run in runs]


def content_policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    """A Content-Security-Policy under which exactly these scripts and styles are in force."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(map(_hash, scripts))}",
            f"style-src {' '.join(map(_hash, styles))}",
            "img-src data: blob:",
            "connect-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def as_json_block(value: Any) -> Markup:
    """JSON that may stand in a `<script type="application/json">`, whatever its texts are."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escape in ESCAPES.items():
        text = text.replace(character, escape)
    return Markup(text)


def _asset(name: str) -> str:
    return (files("grpo_cli.report") / "assets" / name).read_text(encoding="utf-8")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _about(run: Run, label: str) -> dict[str, Any]:
    """What the page says of a run before its curves."""
    return {
        "label": label,
        "folder": str(run.folder),
        "facts": _facts(run),
        "findings": [(_tone(finding), finding) for finding in find(run)],
        "words": in_words(run.recipe),
        "settings": non_defaults(run.recipe),
    }


def _tone(finding: Finding) -> str:
    if finding.badness >= SEVERE:
        return "severe"
    return "notable" if finding.badness >= WORTH_TELLING else "minor"


def _facts(run: Run) -> list[tuple[str, str]]:
    """A name and a value each."""
    last, planned = run.steps[-1], run.recipe.train.max_steps
    of = "" if planned is None else f" of {planned}"
    facts = [("state", "finished" if run.is_finished else "not finished"), ("steps", f"{last}{of}")]
    reward = change(run.series("reward"))
    if reward is not None:
        ends = "the first and the last step" if reward.span == 1 else f"first and last {reward.span} steps"
        facts.append((f"reward, {ends}", f"{reward.first:.3g} → {reward.last:.3g}"))
    held_out = run.points("eval_reward")[1]
    if held_out:
        facts.append(("held-out reward", f"{held_out[-1]:.3g}"))
    seconds = sum(sum(known(run.series(name))) for name in ("time/step", "time/eval"))
    facts.append(("time", _duration(seconds)))
    tokens = known(run.series("num_tokens"))
    return [*facts, ("tokens", f"{tokens[-1]:,.0f}")] if tokens else facts


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
