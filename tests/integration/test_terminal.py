"""A run on a terminal, as one who sits before it sees it: a pseudo-terminal, and every byte that comes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.processes import ROOT

pytestmark = pytest.mark.slow

FOREIGN = (
    "Writing model shards",
    "Loading weights",
    "Loading safetensors",
    "it/s",
    "s/it",
    "?it",
    "examples/s",
    "%|",
)
"""What the bars of transformers, datasets, huggingface_hub and vLLM show, all of them tqdm's."""


def on_a_terminal(*command: str | Path) -> str:
    """What a command, started anew, shows on a terminal of 100 columns; it has to end well."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))  # on one of no size bars are empty
    environment = {key: value for key, value in os.environ.items() if "DISABLE" not in key}
    environment |= {"OMP_NUM_THREADS": "1", "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        [*map(str, command)], cwd=ROOT, env=environment, stdin=its, stdout=its, stderr=its, close_fds=True
    )
    os.close(its)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # how the other side's end reads
        pass
    finally:
        os.close(ours)
    code = process.wait(timeout=60)
    text = shown.decode()
    assert code == 0, text
    return text


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any], tmp_path: Path) -> Path:
    """With checkpoints, a reference and a reward in a process of its own."""
    tiny_recipe["train"] |= {"max_steps": 4, "save_every": 2}
    tiny_recipe["loss"] = {"beta": 0.05}
    tiny_recipe["data"]["eval"] = {"name": tiny_recipe["data"]["name"], "limit": 2}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe))
    return path


def test_the_only_bar_is_ours_and_it_shows_the_reward_and_the_time_left(recipe: Path) -> None:
    shown = on_a_terminal(sys.executable, "-m", "grpo_cli.cli", "train", recipe)
    assert [bar for bar in FOREIGN if bar in shown] == []
    assert shown.count("checkpoint written") == 2
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert re.search(r"reward -[\d.]+ [▁▂▃▄▅▆▇█]+ +\d+ s left", plain), plain
    assert re.search(r"step 3/4 .* \d+ s left", plain), plain


def test_the_libraries_do_show_bars_where_nobody_turns_them_off(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Otherwise the test above could not fail."""
    code = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    )
    shown = on_a_terminal(sys.executable, "-c", code, tiny_model_dir, tmp_path / "copy")
    assert "Loading weights" in shown
    assert "Writing model shards" in shown
    assert "it/s" in shown
