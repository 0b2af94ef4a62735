"""What runs inside vLLM's worker processes: takes a whole set of weights and loads it.

vLLM injects `WeightReceiver` into its worker class, which makes `load_weight_set` callable from the server.
Importing this module also registers the transfer engine that vLLM's own update routine drives.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info, is_deferred_attention_layer
from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

from grpo_cli.distributed.interfaces import address_towards
from grpo_cli.serve import wire
from grpo_cli.serve.protocol import Rendezvous, TensorSpec
from grpo_cli.serve.sender import Sender

BACKEND = "grpo"
"""Name of the transfer engine in vLLM's registry."""

Value = TypeVar("Value")

Source = Callable[[wire.Bucket], torch.Tensor]
"""Gives a bucket's (size,) bytes."""


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Empty: a process group is joined when weights first come through it."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """A whole set of weights and where to get it from; exactly one of the last three."""

    tensors: list[dict[str, Any]]
    digest: str | None = None
    """What the bytes must add up to; a broadcast brings it as its last message."""
    path: str | None = None
    """File that holds the set."""
    rendezvous: dict[str, Any] | None = None
    """Process group that it is broadcast in."""
    timeout_s: float = 300.0
    get: Callable[[str], torch.Tensor] | None = None
    """A function that gives each tensor, where trainer and worker share a process."""


class WholeSetEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads whole sets only: a tensor that is missing is an error, not one that keeps its old value."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.digest = ""
        self._group: Any = None
        self._group_name = ""
        self._store: Any = None
        self._sender: Sender | None = None
        self._whole: set[str] = set()
        """Names of the tensors of the last set that was whole."""

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Nothing to prepare."""

    def start_weight_update(self) -> None:
        for layer in self.model.modules():
            # What a transfer that broke has left behind would count as loaded.
            info = get_layerwise_info(layer)
            if info.can_load():
                info.loaded_weights.clear()
                info.load_numel = 0
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class, which synchronises an accelerator even where there is none."""
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except BaseException:
            self.shutdown()  # out of the group, in which the trainer may be waiting
            raise
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load every tensor.

        Raises:
            ValueError: the bytes are not those that were sent, or the set is not whole.
        """
        buckets = wire.plan_buckets([TensorSpec(**spec) for spec in update_info.tensors])
        digest = wire.Digest()
        if update_info.get is not None:
            get = update_info.get
            loaded = self.model.load_weights((spec["name"], get(spec["name"])) for spec in update_info.tensors)
            self._check_whole(update_info, loaded)
            return
        if update_info.path is not None:
            flat = torch.from_file(
                update_info.path, shared=True, size=wire.total_bytes(buckets), dtype=torch.uint8
            )
            loaded = self.model.load_weights(
                _received(buckets, lambda bucket: flat[bucket.start : bucket.start + bucket.size], digest)
            )
            expected = update_info.digest
        else:
            assert update_info.rendezvous is not None
            group = self._join(Rendezvous(**update_info.rendezvous), update_info.timeout_s)
            loaded = self.model.load_weights(
                _received(buckets, lambda bucket: self._receive(group, bucket.size), digest)
            )
            expected = bytes(self._receive(group, wire.DIGEST_BYTES).tolist()).decode()
        self.digest = digest.hexdigest()
        if self.digest != expected:
            raise ValueError(f"what arrived has digest {self.digest}, what was sent {expected}")
        self._check_whole(update_info, loaded)

    def _receive(self, group: Any, size: int) -> torch.Tensor:
        # A new buffer each time: layers are loaded only when all their tensors are there.
        flat = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._wait_for_sender(lambda: wire.broadcast(group, flat))
        return flat

    def _wait_for_sender(self, call: Callable[[], Value]) -> Value:
        """What `call` gives, which waits for the trainer.

        Raises:
            SenderGone: the trainer has ended.
        """

        def on_device() -> Value:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # each thread has a current device of its own
            return call()

        assert self._sender is not None
        return self._sender.while_there(on_device)

    def _join(self, rendezvous: Rendezvous, timeout_s: float) -> Any:
        if self._group_name != rendezvous.group:
            self.shutdown()
            parallel = self.parallel_config
            rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
            backend, store = rendezvous.backend, wire.find_sender(rendezvous.host, rendezvous.port, timeout_s)
            self._store = store
            self._sender = Sender(rendezvous.host, rendezvous.port, wire.FIND_TIMEOUT_S)
            host, size = address_towards(rendezvous.host), rendezvous.world_size
            with _unpinned_nccl(backend):
                group = self._group = self._wait_for_sender(
                    lambda: wire.make_group(backend, store, rank, size, host, timeout_s)
                )
                self._wait_for_sender(lambda: wire.connect(group, backend, self.device))
            self._group_name = rendezvous.group
        return self._group

    def _check_whole(self, update_info: UpdateInfo, loaded: set[str] | None) -> None:
        """Raise ValueError if a layer has not got all of its tensors.

        vLLM itself would only warn and let such a layer keep its old weights, or fill the gap with anything.
        Layers that got everything have left the loading state; a tied output head has nothing of its own.

        Args:
            update_info: what came.
            loaded: the model's own account: names of its parameters, if it gives one.
        """
        missing = []
        is_tied = self.model_config.hf_text_config.tie_word_embeddings
        for name, layer in self.model.named_modules():
            info = get_layerwise_info(layer)
            if not info.can_load() or is_deferred_attention_layer(layer):
                continue
            if not (is_tied and isinstance(layer, ParallelLMHead)):
                missing += _lacking(name, layer, info, loaded or set())
        names = {spec["name"] for spec in update_info.tensors}
        if missing:
            gone = sorted(self._whole - names)
            hint = f"; the last whole set had {', '.join(gone[:5])} as well" if gone else ""
            raise ValueError(
                f"the set of weights is not whole: nothing or too little for {', '.join(missing[:5])}{hint}"
            )
        self._whole = names

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for layer in self.model.modules():
            # On a CPU the output head keeps a packed copy of its own, also of a weight that it shares.
            if isinstance(layer, ParallelLMHead) and hasattr(layer, "cpu_linear"):
                layer.quant_method.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        """Leave the group, in which a thread may still be waiting for a trainer that has gone."""
        if self._group is not None:
            self._group.abort()
        if self._sender is not None:
            self._sender.close()
        self._group = self._store = self._sender = None
        self._group_name = ""


class WeightReceiver:
    """Methods that the server calls on every worker through `collective_rpc`."""

    def load_weight_set(self: Any, update: dict[str, Any]) -> str:
        """Load a whole set in one call, so that the engine cannot take a step in between; return its digest."""
        try:
            self.start_weight_update()
            self.update_weights(update)
            self.finish_weight_update()
        except BaseException:
            self._weight_update_active = False  # or vLLM would refuse to start the next one
            raise
        digest: str = self.weight_transfer_engine.digest
        return digest

    def device_id(self: Any) -> str:
        """The GPU that this worker computes on, as nothing else is called; `cpu` without one."""
        if self.device.type != "cuda":
            return "cpu"
        return str(torch.cuda.get_device_properties(self.device).uuid)

    def stop_with_server(self: Any, server: int) -> None:
        """End this process and the engine above it when the server has gone, however it went."""
        engine = os.getppid()

        def watch() -> None:
            while psutil.pid_exists(server) and os.getppid() == engine:
                time.sleep(1)
            if os.getppid() == engine and engine != server:
                os.kill(engine, signal.SIGKILL)
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def _lacking(name: str, layer: torch.nn.Module, info: Any, loaded: set[str]) -> list[str]:
    """What has not come of a layer that is still being loaded.

    Args:
        name: of the layer.
        layer: of vLLM's model.
        info: what vLLM notes of it: names and arguments of what came, and the number of elements of all these.
        loaded: parameters that the model says it has loaded, some of which it loads by itself.

    Raises:
        ValueError: something came that has no place in the layer.
    """
    parameters = {
        part: tensor for part, tensor in layer.named_parameters(recurse=False) if part not in SKIP_LOAD_TENSORS
    }
    for part in parameters:
        if part not in info.kernel_tensors[0]:
            raise ValueError(
                f"vLLM makes {name}.{part} only while it loads the model's files; run grpo serve without "
                "--load-format dummy, and give its address in generation.server.urls"
            )
    came = {part for part, _ in info.loaded_weights}
    came |= {part for part in parameters if f"{name}.{part}" in loaded}
    absent = [f"{name}.{part}" for part in parameters if part not in came]
    # The rows of a vocabulary may be padded up to a round number; whatever has come of one is whole.
    if absent or isinstance(layer, VocabParallelEmbedding):
        return absent
    buffers = [tensor for part, tensor in layer.named_buffers(recurse=False) if part in came]
    count = info.load_numel - sum(map(get_tensor_load_numel, buffers))
    wanted = sum(map(get_tensor_load_numel, parameters.values()))
    # Several tensors of a checkpoint, such as those of queries, keys and values, may share a parameter.
    return [f"{name} ({count:,} of {wanted:,} elements)"] if count < wanted else []


def _received(buckets: Sequence[wire.Bucket], source: Source, digest: wire.Digest) -> Iterator[Any]:
    """(name, tensor) for vLLM's loader, counted on the way."""
    for bucket in buckets:
        flat = source(bucket)
        digest.add(bucket, flat)
        yield from wire.tensors_in(bucket, flat)


def _unpinned_nccl(backend: str) -> AbstractContextManager[None]:
    """Inside, vLLM does not hold NCCL to the settings that its own groups need; nothing for other backends."""
    if backend != "nccl":
        return nullcontext()
    from vllm.utils.nccl import unpinned_nccl_env

    return unpinned_nccl_env()


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, WholeSetEngine)
