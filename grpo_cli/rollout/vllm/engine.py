"""The rollout engine that runs vLLM in the training process, on the training device."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from grpo_cli.errors import UserError, one_line
from grpo_cli.recipe.schema import GenerationConfig
from grpo_cli.rollout.engine import Demand, OnTurn, Turn, check_lengths
from grpo_cli.rollout.policy_weights import PolicyWeights
from grpo_cli.rollout.with_vllm import sampled_turn, save_for_vllm, seed_of
from grpo_cli.serve.engine_arguments import (
    HOW_TO_INSTALL,
    REQUIRED,
    SHARED_GPU_MEMORY,
    engine_defaults,
    refuse_splitting,
)
from grpo_cli.serve.environment import set_defaults
from grpo_cli.serve.own_folder import OwnFolder


class VllmEngine:
    """Generates with vLLM; on a GPU it gives its memory back while the policy trains.

    Args:
        model: its configuration is what vLLM builds.
        policy: what vLLM is given.
        tokenizer: saved for vLLM, and decodes completions.
        config: the recipe's `generation` section.
        eos_token_ids: tokens that end a completion.

    Raises:
        UserError: vLLM is not installed, or refuses the model or an argument.
    """

    def __init__(
        self, model: Any, policy: PolicyWeights, tokenizer: Any, config: GenerationConfig, eos_token_ids: set[int]
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.config = config
        self.eos_token_ids = eos_token_ids
        self._version: int | None = None
        self._sleeps = policy.device.type == "cuda"
        refuse_splitting(config.vllm, "generation.vllm.{}".format)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's loop in this process
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its start would fill a page of the run's output
        set_defaults(os.environ)
        try:
            import vllm
        except ImportError as error:
            raise UserError(f"generation.engine: vllm is not installed: {HOW_TO_INSTALL}") from error
        arguments: dict[str, Any] = {
            "load_format": "dummy",
            **REQUIRED,
            "distributed_executor_backend": "uni",
            "enable_sleep_mode": self._sleeps,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            **engine_defaults(),
        }
        if self._sleeps:
            arguments["gpu_memory_utilization"] = SHARED_GPU_MEMORY
            if policy.device.index:  # left to itself, vLLM takes the first one
                arguments["device_ids"] = [policy.device.index]
        with OwnFolder("grpo-train-") as folder:
            save_for_vllm(model, tokenizer, folder)
            threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
            try:
                self._llm: Any = vllm.LLM(model=str(folder), **(arguments | config.vllm))
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"generation.vllm: vLLM refuses the model or an argument: {one_line(error)}"
                ) from error
        # vLLM sets the threads of this process for its own needs.
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        self._is_asleep = False
        self.release_memory()

    def update_weights(self, version: int) -> int:
        """See `RolloutEngine.update_weights`."""
        if self._version == version and not self._is_asleep:
            return 0
        self._version = None
        if self._is_asleep:
            self._llm.wake_up(tags=["weights"])
        dtype = str(self._llm.llm_engine.model_config.dtype).removeprefix("torch.")
        specs = self.policy.specs(dtype)
        update = {"tensors": [spec.model_dump() for spec in specs], "get": self.policy.tensor}
        self._llm.collective_rpc("load_weight_set", args=(update,))
        if self._is_asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._is_asleep = False
        self._llm.reset_prefix_cache()
        self._version = version
        return sum(math.prod(spec.shape) * getattr(torch, spec.dtype).itemsize for spec in specs)

    def release_memory(self) -> None:
        """Give weights and cache back to the device: the next generation follows an update, which brings them."""
        if self._sleeps:
            self._llm.sleep(level=2)
            self._is_asleep = True

    @contextmanager
    def stream(self, on_turn: OnTurn, demand: Demand) -> Iterator[VllmStream]:
        """See `TurnEngine.stream`. `update_weights` comes first."""
        assert not self._is_asleep, "update_weights comes before stream"
        stream = VllmStream(self._llm.llm_engine, self, on_turn)
        try:
            yield stream
        finally:
            stream.abort()

    def close(self) -> None:
        """Let go of vLLM's memory."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm


class VllmStream:
    """A `TurnStream` over vLLM's own scheduler: what turns have read and said stays in its prefix cache.

    Args:
        engine: vLLM's, in this process.
        owner: whose settings hold.
        on_turn: told of each finished turn, on the thread that advances.
    """

    def __init__(self, engine: Any, owner: VllmEngine, on_turn: OnTurn) -> None:
        self._engine = engine
        self._owner = owner
        self._on_turn = on_turn
        self._running: set[str] = set()

    def ask(self, turns: Sequence[Turn]) -> None:
        """See `TurnStream.ask`.

        Raises:
            UserError: a turn may become longer than vLLM was told to expect.
        """
        from grpo_cli.serve.sampling import sampling_params

        limit, eos = self._engine.model_config.max_model_len, sorted(self._owner.eos_token_ids)
        what_to_do = (
            f"vLLM's limit of {limit}; raise generation.vllm.max_model_len, or lower data.max_prompt_tokens or "
            "max_completion_tokens"
        )
        check_lengths(turns, limit, what_to_do)
        for turn in turns:
            settings = self._owner.config.model_copy(update={"max_completion_tokens": turn.max_tokens})
            params = sampling_params(settings, n=1, seed=seed_of(turn), stop_token_ids=eos)
            name = str(turn.completion)
            self._engine.add_request(name, {"prompt_token_ids": list(turn.token_ids)}, params)
            self._running.add(name)

    def advance(self) -> bool:
        """See `TurnStream.advance`."""
        from grpo_cli.serve.sampling import sampled_tokens

        if not self._engine.has_unfinished_requests():
            return False
        for output in self._engine.step():
            if output.finished:
                self._running.remove(output.request_id)
                (part,) = sampled_tokens(output)
                turn = sampled_turn(part, self._owner.config, self._owner.tokenizer)
                self._on_turn(int(output.request_id), turn)
        return True

    def forget(self, completion: int) -> None:
        """See `TurnStream.forget`: vLLM's cache drops what is used least by itself."""

    def abort(self) -> None:
        """Stop what runs: it would turn up among the next stream's."""
        if self._running:
            self._engine.abort_request(sorted(self._running))
