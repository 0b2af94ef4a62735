"""`grpo check RUN`: whether the checkpoints and `final/` of a run are as they were written. No torch."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from grpo_cli.errors import UserError
from grpo_cli.train.manifest import MANIFEST, faults, has_manifest
from grpo_cli.train.run_folder import list_checkpoints
from grpo_cli.train.run_lock import holder


def check_run(folder: Path, console: Console) -> None:
    """Read every file that a manifest lists, and print a row for each checkpoint and for `final/`.

    Raises:
        UserError: it is not a run's folder, it cannot be read, or one of them is broken.
    """
    try:
        _check_run(folder, console)
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read: {error.strerror}") from error


def _check_run(folder: Path, console: Console) -> None:
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is not the folder of a run: there is no recipe.yaml in it")
    table = Table(show_header=False, box=None)
    who = holder(folder)
    if who is not None:
        table.add_row("[bold]in use", escape(who))
    broken: list[str] = []
    written = [*list_checkpoints(folder), *(path for path in [folder / "final"] if path.exists())]
    for path in written:
        found = faults(path)
        if not path.exists():
            continue  # the run that is going on has newer ones
        broken += [f"{path}: {fault}" for fault in found]
        table.add_row(
            f"[bold]{path.name}", f"[red]broken[/]: {escape('; '.join(found))}" if found else _state(path)
        )
    for path in sorted(folder.glob("broken-*")):
        table.add_row(f"[bold]{path.name}", "set aside by an earlier --resume; remove it if it is of no use")
    if not written:
        table.add_row("[bold]checkpoints", "none yet")
    console.print(table)
    if broken:
        raise UserError("\n".join([*broken, "--resume goes on from the newest checkpoint that is whole"]))


def _state(path: Path) -> str:
    if not has_manifest(path):
        return f"cannot be verified: it has no {MANIFEST}, as those of older versions"
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return f"[green]whole[/], {size / 1e6:.1f} MB"
