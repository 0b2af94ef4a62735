"""A checkpoint is whole or absent, comes back bit for bit, and belongs to one recipe."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from grpo_cli.distributed.ranks import Ranks
from grpo_cli.distributed.strategies.replicated import Replicated
from grpo_cli.errors import RunError, UserError
from grpo_cli.policy.load import load_policy
from grpo_cli.recipe.load import dump_recipe, load_recipe
from grpo_cli.recipe.schema import ModelConfig, OptimConfig, Recipe
from grpo_cli.train import whole_files
from grpo_cli.train.checkpoint import Position, load_checkpoint, read_position, save_checkpoint
from grpo_cli.train.optim import build_optimizer, build_scheduler
from grpo_cli.train.run_folder import (
    changed_settings,
    check_run_folder,
    hold_run_folder,
    list_checkpoints,
    open_run_folder,
    whole_checkpoint,
)
from grpo_cli.train.whole_files import write_text
from tests.conftest import byte_tokenizer, tiny_llama


class Parts:
    """A model with an optimizer and a schedule that have made some steps."""

    def __init__(self, model: Any = None, steps: int = 0) -> None:
        self.model = tiny_llama() if model is None else model
        config = OptimConfig(learning_rate=0.01)
        self.optimizer = build_optimizer(self.model, config, torch.Tensor.size)
        self.scheduler = build_scheduler(self.optimizer, config, 10)
        self.strategy = Replicated(Ranks(), config.max_grad_norm)
        self.strategy.prepare(self.model, self.optimizer)
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(input_ids=torch.tensor([[1, 2, 3]])).logits.logsumexp(-1).sum().backward()
        self.optimizer.step()
        self.scheduler.step()

    def save(self, folder: Path, step: int, keep: int = 2, note: Callable[[str], None] = pytest.fail) -> Path:
        folder.mkdir(exist_ok=True)
        return save_checkpoint(folder, self.learner(), Position(step, 100 * step), keep, note)

    def load(self, path: Path) -> Position:
        return load_checkpoint(path, self.learner())

    def learner(self) -> Any:
        """What a checkpoint is made of."""
        return SimpleNamespace(
            ranks=Ranks(),
            strategy=self.strategy,
            model=self.model,
            tokenizer=byte_tokenizer(),
            scheduler=self.scheduler,
        )

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Let no file grow beyond `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_continues_from_a_checkpoint_ends_where_the_uninterrupted_one_does(tmp_path: Path) -> None:
    straight = Parts(steps=5)
    stopped = Parts(steps=3)
    path = stopped.save(tmp_path, 3)
    other = Parts(tiny_llama(initializer_range=0.1))
    assert other.load(path) == Position(3, 300)
    assert other.scheduler.get_last_lr() == stopped.scheduler.get_last_lr()
    other.step()
    other.step()
    for name, value in straight.weights().items():
        assert torch.equal(other.weights()[name], value), name
    for ours, theirs in zip(
        other.optimizer.state.values(), straight.optimizer.state.values(), strict=True
    ):  # moments and step counts
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_an_adapter_checkpoint_comes_back_bit_for_bit(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = ModelConfig.model_validate({"name": str(tiny_model_dir), "lora": {"r": 2}})
    torch.manual_seed(1)
    trained = Parts(load_policy(config), steps=3)
    path = trained.save(tmp_path, 3)
    assert not (path / "model.safetensors").exists(), "the base is not written again"
    torch.manual_seed(2)
    other = Parts(load_policy(config))
    other.load(path)
    trained.step()
    other.step()
    for name, value in trained.weights().items():
        assert torch.equal(other.weights()[name], value), name


def test_a_position_comes_back_and_goes_on(tmp_path: Path) -> None:
    position = Position().advance(7).advance(5)
    assert position == Position(2, 12)
    path = Parts().save(tmp_path, 4)
    assert path.name == "checkpoint-000004"
    assert read_position(path) == Position(4, 400)


def test_a_checkpoint_is_a_model_that_loads_as_it_is(tmp_path: Path) -> None:
    parts = Parts(steps=1)
    path = parts.save(tmp_path, 1)
    model = load_policy(ModelConfig(name=str(path)))
    for name, value in parts.weights().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert (path / "tokenizer.json").is_file()


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    parts = Parts()
    for step in (1, 2, 3, 10):
        parts.save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["checkpoint-000003", "checkpoint-000010"]
    parts.save(tmp_path, 11, keep=1)
    assert names(tmp_path) == ["checkpoint-000011"]


def test_the_newest_is_the_one_of_the_highest_step_however_many_digits_it_has(tmp_path: Path) -> None:
    parts = Parts()
    for step in (999_999, 1_000_000, 1_000_001):
        parts.save(tmp_path, step, keep=2)
    assert [read_position(path).step for path in list_checkpoints(tmp_path)] == [1_000_000, 1_000_001]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    path = Parts().save(tmp_path, 1)
    (path / "optimizer.pt").write_bytes(b"damaged")
    assert Parts().save(tmp_path, 1) == path
    assert Parts().load(path).step == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed")])
def test_a_failed_write_leaves_no_checkpoint_and_keeps_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    parts = Parts()
    parts.save(tmp_path, 1)
    parts.save(tmp_path, 2)
    before = contents(tmp_path)

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RunError, match=r"writing .*checkpoint-000003 failed, earlier checkpoints are kept: .*"):
        parts.save(tmp_path, 3)
    assert contents(tmp_path) == before
    assert names(tmp_path) == ["checkpoint-000001", "checkpoint-000002"]
    monkeypatch.undo()
    parts.save(tmp_path, 3)
    assert names(tmp_path) == ["checkpoint-000002", "checkpoint-000003"]


@pytest.mark.parametrize("limit", [20_000, 200_000])
def test_a_full_disk_leaves_no_checkpoint_and_keeps_the_old_ones(tmp_path: Path, limit: int) -> None:
    parts = Parts(steps=1)
    path = parts.save(tmp_path, 1)
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    assert 20_000 < sizes["model.safetensors"] < 200_000 < sizes["optimizer.pt"], "a file of each kind fails"
    before = contents(tmp_path)
    with full_disk(limit), pytest.raises(RunError, match="checkpoint-000002 failed"):
        parts.save(tmp_path, 2)
    assert contents(tmp_path) == before
    assert names(tmp_path) == ["checkpoint-000001"]


def test_nothing_appears_under_its_name_before_it_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    final = tmp_path / "checkpoint-000001"

    def record(path: Path) -> None:
        if path != tmp_path:
            assert not final.exists()
        synced.append(path.name)

    monkeypatch.setattr(whole_files, "sync", record)
    Parts().save(tmp_path, 1)
    assert set(synced) == {path.name for path in final.iterdir()} | {f".{final.name}.partial", tmp_path.name}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "position.json", "manifest.json"} < set(synced)
    assert synced[-2:] == [".checkpoint-000001.partial", tmp_path.name]


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_whole_ones_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = Parts()
    parts.save(tmp_path, 1, keep=1)
    remove = shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        if options:
            return remove(path, **options)
        (path / "model.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        parts.save(tmp_path, 2, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-000002"]


@pytest.mark.parametrize("code", [errno.ENOTEMPTY, errno.EBUSY, errno.EACCES])
def test_an_old_checkpoint_that_cannot_be_removed_is_noted_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    parts = Parts()
    parts.save(tmp_path, 1, keep=1)
    remove = shutil.rmtree

    def refused(path: Path, **options: Any) -> None:
        if options:
            return remove(path, **options)
        raise OSError(code, os.strerror(code), str(path / "optimizer.pt"))

    monkeypatch.setattr(shutil, "rmtree", refused)
    notes: list[str] = []
    written = parts.save(tmp_path, 2, keep=1, note=notes.append)
    assert list_checkpoints(tmp_path) == [written]
    (note,) = notes
    assert os.strerror(code) in note
    assert ".checkpoint-000001.partial" in note
    monkeypatch.undo()
    parts.save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["checkpoint-000003"], "what was left is removed once it can be"


def test_what_cannot_be_renamed_for_removal_stays_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = Parts()
    old = parts.save(tmp_path, 1, keep=1)

    def refused(path: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr(Path, "rename", refused)
    notes: list[str] = []
    written = parts.save(tmp_path, 2, keep=1, note=notes.append)
    assert list_checkpoints(tmp_path) == [old, written]
    assert "checkpoint-000001" in notes[0]


def test_partial_and_foreign_folders_are_no_checkpoints(tmp_path: Path) -> None:
    for name in (".checkpoint-000003.partial", "checkpoint-000004", "final", "completions"):
        (tmp_path / name).mkdir()
    (tmp_path / ".checkpoint-000003.partial" / "position.json").write_text('{"step": 3, "num_tokens": 0}')
    assert list_checkpoints(tmp_path) == []
    Parts().save(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-000002"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "position.json"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "empty"])
def test_a_damaged_checkpoint_is_one_message(tmp_path: Path, name: str, damage: str) -> None:
    parts = Parts(steps=1)
    path = parts.save(tmp_path, 1)
    whole = (path / name).read_bytes()
    if damage == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes(whole[: len(whole) // 2] if damage == "cut short" else b"")
    with pytest.raises(RunError, match="checkpoint-000001 is damaged"):
        parts.load(path)


def recipe_of(tiny_recipe: dict[str, Any], *overrides: str) -> Recipe:
    return load_recipe(tiny_recipe, overrides)


def enter(recipe: Recipe, *, resume: bool) -> Path | None:
    check_run_folder(recipe, resume=resume)
    with closing(hold_run_folder(recipe, pytest.fail)) as lock:
        open_run_folder(recipe, pytest.fail)
        return whole_checkpoint(lock.folder, Ranks(), pytest.fail)


def test_a_new_run_gets_its_folder_and_its_recipe(tiny_recipe: dict[str, Any]) -> None:
    recipe = recipe_of(tiny_recipe)
    assert enter(recipe, resume=False) is None
    written = Path(recipe.train.output_dir) / "recipe.yaml"
    assert written.read_text() == dump_recipe(recipe)
    assert load_recipe(written) == recipe


def test_a_folder_with_a_run_is_not_overwritten(tiny_recipe: dict[str, Any]) -> None:
    recipe = recipe_of(tiny_recipe)
    enter(recipe, resume=False)
    saved = Parts().save(Path(recipe.train.output_dir), 2)
    with pytest.raises(UserError, match=r"already holds a run; continue it with --resume"):
        enter(recipe, resume=False)
    assert enter(recipe, resume=True) == saved


def test_a_run_that_left_nothing_to_continue_may_be_started_over(tiny_recipe: dict[str, Any]) -> None:
    enter(recipe_of(tiny_recipe), resume=False)
    mended = recipe_of(tiny_recipe, "optim.learning_rate=0.5")
    assert enter(mended, resume=False) is None
    assert load_recipe(Path(mended.train.output_dir) / "recipe.yaml") == mended
    assert enter(mended, resume=True) is None, "killed before its first checkpoint"


def test_resume_finds_the_newest_whole_checkpoint_and_clears_leftovers(tiny_recipe: dict[str, Any]) -> None:
    recipe = recipe_of(tiny_recipe)
    enter(recipe, resume=False)
    folder = Path(recipe.train.output_dir)
    parts = Parts()
    parts.save(folder, 2)
    parts.save(folder, 3)
    for name in (".checkpoint-000004.partial", ".final.partial"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"half")
    for name in (".recipe.yaml.partial", ".metrics.jsonl.partial"):
        (folder / name).write_text("half")
    assert enter(recipe, resume=True) == folder / "checkpoint-000003"
    assert names(folder) == [".lock", "checkpoint-000002", "checkpoint-000003", "recipe.yaml"]


def test_resume_takes_what_may_change_and_refuses_what_makes_another_run(tiny_recipe: dict[str, Any]) -> None:
    recipe = recipe_of(tiny_recipe)
    enter(recipe, resume=False)
    Parts().save(Path(recipe.train.output_dir), 2)
    free = ("train.max_steps=9", "train.save_every=2", "train.keep_checkpoints=5", "logging.every=3")
    longer = recipe_of(tiny_recipe, *free)
    enter(longer, resume=True)
    assert load_recipe(Path(longer.train.output_dir) / "recipe.yaml") == longer
    other = recipe_of(tiny_recipe, "optim.learning_rate=0.5", "train.seed=7")
    with pytest.raises(UserError, match="was started with other settings") as caught:
        enter(other, resume=True)
    assert "optim.learning_rate was 0.001, is 0.5" in str(caught.value)
    assert "train.seed was 42, is 7" in str(caught.value)
    assert load_recipe(Path(longer.train.output_dir) / "recipe.yaml") == longer, "the refused one is not written"


def test_a_run_of_a_version_without_a_setting_resumes_unless_the_setting_changes_it(
    tiny_recipe: dict[str, Any],
) -> None:
    recipe = recipe_of(tiny_recipe)
    enter(recipe, resume=False)
    folder = Path(recipe.train.output_dir)
    Parts().save(folder, 2)
    older = recipe.model_dump(mode="json")
    del older["loss"]["sampler_correction"], older["generation"]["top_k"], older["distributed"]
    (folder / "recipe.yaml").write_text(yaml.dump(older))
    with pytest.raises(UserError, match=r"other settings: generation\.top_k was 0, is 5\. ") as caught:
        check_run_folder(recipe_of(tiny_recipe, "generation.top_k=5"), resume=True)
    assert "sampler_correction" not in str(caught.value)
    assert enter(recipe, resume=True) == folder / "checkpoint-000002"


def test_a_stored_recipe_that_is_damaged_is_one_message(tiny_recipe: dict[str, Any]) -> None:
    recipe = recipe_of(tiny_recipe)
    enter(recipe, resume=False)
    folder = Path(recipe.train.output_dir)
    Parts().save(folder, 2)
    (folder / "recipe.yaml").write_text("model: {name: m}\nloss: {beat: 1}\n")
    with pytest.raises(UserError, match=r"recipe\.yaml:2: loss\.beat is not a setting"):
        check_run_folder(recipe, resume=True)


def test_an_output_dir_that_cannot_be_used_is_one_message(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, message in (("file", "is a file"), ("file/run", "cannot write to")):
        recipe = recipe_of(tiny_recipe, f"train.output_dir={tmp_path / name}")
        with pytest.raises(UserError, match=rf"train\.output_dir: .*{message}"):
            enter(recipe, resume=False)


def test_changed_settings_names_each_one_that_decides_what_the_run_computes(tiny_recipe: dict[str, Any]) -> None:
    before = recipe_of(tiny_recipe)
    served = ("generation.engine=vllm_server", "generation.server={spawn: true}")
    free = ("train.max_steps=9", "logging.every=5", "distributed.processes=1", "generation.server.port=5")
    assert changed_settings(recipe_of(tiny_recipe, *served), recipe_of(tiny_recipe, *served, *free)) == []
    after = recipe_of(tiny_recipe, "train.max_steps=9", "loss.epsilon=0.1", "rewards.0.params={x: 1}")
    assert changed_settings(before, after) == [
        "rewards.0.params.x was absent, is 1",
        "loss.epsilon was 0.2, is 0.1",
    ]
    (lora,) = changed_settings(before, recipe_of(tiny_recipe, "model.lora={r: 4}"))
    assert lora.startswith('model.lora was empty, is {"r": 4, ')


def test_a_small_file_is_replaced_all_at_once(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    write_text(path, "old")
    write_text(path, json.dumps({"é": 1}, ensure_ascii=False))
    assert path.read_text(encoding="utf-8") == '{"é": 1}'
    with full_disk(0), pytest.raises(OSError, match="too large"):
        write_text(path, "new")
    assert path.read_text(encoding="utf-8") == '{"é": 1}'
