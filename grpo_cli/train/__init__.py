"""Training. The package itself can be called: `grpo_cli.train(recipe, ...)`, see `grpo_cli.train.api.train`.

`grpo_cli.train` is both the public function and the package that implements it; a module that is callable lets one
name be both. Nothing here imports torch.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from grpo_cli.train.api import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
