"""A model's files say what they are before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_cli.errors import UserError
from grpo_cli.policy.files import count_parameters, locate_gguf
from tests.conftest import tiny_llama


def test_gguf_files_are_found(tmp_path: Path) -> None:
    assert locate_gguf("org/model", None) == ("org/model", None)
    assert locate_gguf("org/model", "q8.gguf") == ("org/model", "q8.gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert locate_gguf(str(tmp_path / "a.gguf"), None) == (str(tmp_path), "a.gguf")
    assert locate_gguf(str(tmp_path), None) == (str(tmp_path), "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"holds several, set it to one of a\.gguf, b\.gguf"):
        locate_gguf(str(tmp_path), None)
    assert locate_gguf(str(tmp_path), "b.gguf") == (str(tmp_path), "b.gguf")
    with pytest.raises(UserError, match=r"there is no c\.gguf in .*; found a\.gguf, b\.gguf"):
        locate_gguf(str(tmp_path), "c.gguf")
    (tmp_path / "config.json").write_text("{}")
    assert locate_gguf(str(tmp_path), None) == (str(tmp_path), None), "a folder of safetensors is that"
    for name in ("./nowhere", "/nowhere/at/all", "~/no-such-folder", "a/b/c"):
        with pytest.raises(UserError, match="there is no folder"):
            locate_gguf(name, None)


def test_parameters_are_counted_from_the_headers(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert count_parameters(tiny_model_dir) == sum(p.numel() for p in tiny_llama().parameters())
    assert count_parameters(tmp_path) is None
