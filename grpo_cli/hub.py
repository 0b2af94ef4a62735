"""The Hugging Face Hub as a user meets it: what is about to be downloaded, and what to do where the Hub refuses.

Its libraries are slow to import, so that they are imported only where one of them is used already.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Literal

Kind = Literal["model", "dataset"]

BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
"""Switches of huggingface_hub and transformers, of datasets, and of the bars that others make."""

NETWORK_ERRORS = {"TransportError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}
"""Names of error classes. httpx, httpx2 and requests each have classes of their own, slow to import."""


def without_bars(environment: MutableMapping[str, str]) -> None:
    """Have the libraries show no progress bars: they would tear ours, and fill a log file with a hundred lines.

    They read these variables when they are imported. One that is set already stays as it is.
    """
    for name in BARS:
        environment.setdefault(name, "1")


def tell_download(kind: Kind, name: str, revision: str | None = None, file: str | None = None) -> None:
    """Say on stderr, on rank 0, that a model or dataset is about to be downloaded, if it is.

    Args:
        kind: of the repository.
        name: its id; nothing is said of a folder.
        revision: branch, tag or commit of a model.
        file: the one file of a model that is needed; its weights if not given.
    """
    from huggingface_hub import constants

    if Path(name).is_dir() or constants.HF_HUB_OFFLINE or os.environ.get("RANK", "0") != "0":
        return
    if not (_has_dataset(name) if kind == "dataset" else _has_model(name, revision, file)):
        print(f"downloading the {kind} {name} from the Hub; the cache has none of it, or a part", file=sys.stderr)


def _has_model(name: str, revision: str | None, file: str | None) -> bool:
    """Whether all of a model's weights are in the cache."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, file or "config.json", revision=revision)
    if not isinstance(config, str):
        return False
    folder = Path(config).parent
    if file is not None:
        return True
    for index in folder.glob("*.index.json"):
        parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return all((folder / part).exists() for part in parts)
    return any(True for pattern in ("*.safetensors", "*.bin") for _ in folder.glob(pattern))


def _has_dataset(name: str) -> bool:
    """Whether `datasets` has prepared anything of a dataset."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    owner, _, own_name = name.rpartition("/")
    folder = camelcase_to_snakecase(own_name)
    return Path(config.HF_DATASETS_CACHE, f"{owner}___{folder}" if owner else folder).is_dir()


def explained(
    error: BaseException, kind: Kind, name: str, revision: str | None = None, *, instead: str
) -> str | None:
    """What to do about an error of the Hub or of the way there; None if it is another error.

    Args:
        error: of huggingface_hub, or raised from one of its errors by transformers or datasets.
        kind: of the repository.
        name: its id.
        revision: that was asked for.
        instead: what needs no Hub, such as `set model.name to a folder on this machine`.
    """
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    chain = list(_chain(error))
    answers = [one for one in chain if isinstance(one, errors.HfHubHTTPError)]
    if any(isinstance(one, errors.GatedRepoError) for one in answers) or _says(chain, "is a gated dataset"):
        return _gated(page)
    if any(isinstance(one, errors.RevisionNotFoundError) for one in answers) or _says(
        chain, "is not a valid git id"
    ):
        return f"{name} has no branch, tag or commit {revision}; {page} shows those there are"
    if any(isinstance(one, errors.RepositoryNotFoundError) for one in answers) or _says(
        chain, "doesn't exist on the"
    ):
        return _not_there(kind, page)
    for answer in answers:
        status = answer.response.status_code
        if status == 401:
            refused = "Invalid credentials" in (answer.response.headers.get("X-Error-Message") or "")
            return _refused_token() if refused else _not_there(kind, page)
        if status == 403:
            return f"the token of this login may not read it; `hf auth login` with one that may read {page}"
        if status != 404:
            return f"the Hub answers {status}; try again later, or {instead}"
    return _no_network(kind, name, instead) if is_network_error(error) else None


def _gated(page: str) -> str:
    from huggingface_hub import get_token

    if get_token() is None:
        return f"it is gated: accept its terms at {page}, then log in with `hf auth login` (or set HF_TOKEN)"
    return (
        f"it is gated, and the account of this login may not read it: accept its terms at {page}, where its "
        "owners may have to agree; `hf auth whoami` says which account this is, `hf auth login` takes another"
    )


def _not_there(kind: Kind, page: str) -> str:
    from huggingface_hub import get_token

    missing = f"the Hub has no such {kind}, or shows it to others only: check the spelling ({page})"
    if get_token() is None:
        return f"{missing}; if it is private, log in with `hf auth login` (or set HF_TOKEN)"
    return f"{missing}; if it is private, `hf auth whoami` says which account this is"


def _refused_token() -> str:
    where = "HF_TOKEN holds" if os.environ.get("HF_TOKEN") else "`hf auth login` has stored"
    return f"the Hub refuses the token that {where}: log in again with `hf auth login`, or remove the token"


def _no_network(kind: Kind, name: str, instead: str) -> str:
    if os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE"):
        reason = f"HF_HUB_OFFLINE is set, and the {kind} is not in the cache"
    else:
        reason = f"the Hugging Face Hub cannot be reached, and the {kind} is not in the cache"
    run_once = "run once" if kind == "dataset" else f"run once (or `hf download {name}`)"
    return f"{reason}: {run_once} where there is network, so that it is cached, or {instead}"


def is_network_error(error: BaseException) -> bool:
    """Whether the error, or one that it was raised from, says that nobody answered."""
    return any(
        isinstance(one, (ConnectionError, TimeoutError))
        or any(cls.__name__ in NETWORK_ERRORS for cls in type(one).__mro__)
        for one in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _says(chain: list[BaseException], words: str) -> bool:
    """Whether one of the errors has these words: `datasets` drops the Hub's error and keeps its own."""
    return any(words in str(one) for one in chain)
