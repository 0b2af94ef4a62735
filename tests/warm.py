"""What a process of `tests.processes` has imported before it begins: most of the seconds that a start takes."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # as the command line has it where nobody watches; it is read at import

MODULES = [
    "datasets", "grpo_cli.cli", "grpo_cli.train.api", "grpo_cli.verbs.evaluate",
    "grpo_cli.verbs.sample", "peft", "pyarrow.parquet", "torch._dynamo",
    "torch.distributed.elastic.multiprocessing", "torch.distributed.tensor", "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
]  # fmt: skip

if not Path("/dev/nvidiactl").exists():  # DeepSpeed would choose a GPU before a test hides it
    MODULES.append("deepspeed")

for module in MODULES:
    with contextlib.suppress(ImportError):
        importlib.import_module(module)

# So many objects are not to be looked through, or copied because they are, in each process.
gc.freeze()
