"""What was written on one side is read on the other, and the digest notices what is not the same."""

from __future__ import annotations

import dataclasses
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grpo_cli.serve import wire
from grpo_cli.serve.protocol import TensorSpec
from grpo_cli.serve.wire import ALIGNMENT, Bucket, Digest, fill, plan_buckets, tensors_in, total_bytes

DTYPES = ["float32", "bfloat16", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]
PATIENCE_S = 20.0
CPU = torch.device("cpu")
BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"

shapes = st.lists(st.integers(0, 9), max_size=3)


@st.composite
def spec_lists(draw: Any) -> list[TensorSpec]:
    kinds = draw(st.lists(st.tuples(st.sampled_from(DTYPES), shapes), max_size=12))
    return [TensorSpec(name=f"t{i}", dtype=dtype, shape=shape) for i, (dtype, shape) in enumerate(kinds)]


def spec(name: str, shape: Sequence[int], dtype: Any = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=list(shape))


def num_bytes(of: TensorSpec) -> int:
    return math.prod(of.shape) * getattr(torch, of.dtype).itemsize


def random_tensors(specs: Sequence[TensorSpec], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        one.name: torch.randint(0, 2 if one.dtype == "bool" else 100, one.shape, generator=generator).to(
            getattr(torch, one.dtype)
        )
        for one in specs
    }


def written(buckets: Sequence[Bucket], tensors: dict[str, torch.Tensor], dirt: int = 0) -> list[torch.Tensor]:
    """The bytes of each bucket, in buffers that held `dirt` before."""
    flats = [torch.full((bucket.size,), dirt, dtype=torch.uint8) for bucket in buckets]
    for bucket, flat in zip(buckets, flats, strict=True):
        fill(bucket, flat, tensors.__getitem__)
    return flats


def digest_of(buckets: Sequence[Bucket], flats: Sequence[torch.Tensor]) -> str:
    digest = Digest()
    for bucket, flat in zip(buckets, flats, strict=True):
        digest.add(bucket, flat)
    return digest.hexdigest()


@given(spec_lists(), st.integers(1, 2000))
@example([spec("small", [3]), spec("large", [1000]), spec("small too", [3])], 256)
@example([], 256)
def test_every_tensor_has_one_place_of_its_own(specs: list[TensorSpec], bucket_bytes: int) -> None:
    buckets = plan_buckets(specs, bucket_bytes)
    assert [slot.spec for bucket in buckets for slot in bucket.slots] == specs
    end_of_set = 0
    for bucket in buckets:
        assert bucket.slots
        assert bucket.start == end_of_set
        assert bucket.start % ALIGNMENT == bucket.size % ALIGNMENT == 0
        assert bucket.size <= bucket_bytes or len([slot for slot in bucket.slots if slot.size]) == 1
        end = 0
        for slot in bucket.slots:
            assert slot.start % ALIGNMENT == 0
            assert end <= slot.start < end + ALIGNMENT
            assert slot.size == num_bytes(slot.spec)
            end = slot.start + slot.size
        assert end <= bucket.size < end + ALIGNMENT
        end_of_set += bucket.size
    assert total_bytes(buckets) == end_of_set


def test_a_tensor_larger_than_a_bucket_travels_alone() -> None:
    specs = [spec("a", [16]), spec("large", [1000]), spec("b", [16]), spec("c", [16])]
    buckets = plan_buckets(specs, 128)
    assert [[slot.spec.name for slot in bucket.slots] for bucket in buckets] == [["a"], ["large"], ["b", "c"]]


def test_a_bucket_is_filled_to_the_last_byte() -> None:
    assert len(plan_buckets([spec("a", [16]), spec("b", [16])], 128)) == 1
    assert len(plan_buckets([spec("a", [16]), spec("b", [16])], 127)) == 2


@settings(deadline=None)
@given(spec_lists(), st.integers(1, 2000))
@example([spec("scalar", []), spec("empty", [0, 3]), spec("odd", [7], "bfloat16"), spec("after", [2])], 64)
@example([spec("nothing", [0])], 64)
def test_what_is_written_is_what_is_read(specs: list[TensorSpec], bucket_bytes: int) -> None:
    buckets, tensors = plan_buckets(specs, bucket_bytes), random_tensors(specs)
    flats = written(buckets, tensors, dirt=255)
    read = dict(pair for bucket, flat in zip(buckets, flats, strict=True) for pair in tensors_in(bucket, flat))
    assert list(read) == [one.name for one in specs]
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name], tensor)


def test_a_set_can_lie_in_one_buffer() -> None:
    """As it does in memory that both sides see: each bucket is a slice that starts where it says."""
    specs = [spec(f"t{i}", [i, 3], "bfloat16") for i in range(1, 9)]
    buckets, tensors = plan_buckets(specs, 128), random_tensors(specs)
    assert len(buckets) > 2
    whole = torch.full((total_bytes(buckets),), 9, dtype=torch.uint8)
    parts = [whole[bucket.start : bucket.start + bucket.size] for bucket in buckets]
    for bucket, part in zip(buckets, parts, strict=True):
        fill(bucket, part, tensors.__getitem__)
    for bucket, part in zip(buckets, parts, strict=True):
        for name, tensor in tensors_in(bucket, part):
            assert torch.equal(tensor, tensors[name])
    assert digest_of(buckets, parts) == digest_of(buckets, written(buckets, tensors))


def test_a_tensor_is_cast_to_the_dtype_of_the_wire() -> None:
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    buckets = plan_buckets([spec("w", [5, 3], "bfloat16")])
    ((_, read),) = tensors_in(buckets[0], written(buckets, {"w": values})[0])
    assert torch.equal(read, values.detach().bfloat16())


def test_a_tensor_that_is_not_contiguous_is_written_in_its_own_order() -> None:
    values = torch.arange(12.0).view(3, 4).T
    buckets = plan_buckets([spec("w", [4, 3])])
    ((_, read),) = tensors_in(buckets[0], written(buckets, {"w": values})[0])
    assert read.tolist() == values.tolist()


@pytest.mark.parametrize("shape", [[1], [3, 2], [6], []])
def test_a_tensor_of_another_shape_than_announced_is_an_error(shape: list[int]) -> None:
    (bucket,) = plan_buckets([spec("w", [2, 3])])
    with pytest.raises(ValueError, match=r"w has shape .* not \[2, 3\] as announced"):
        fill(bucket, torch.zeros(bucket.size, dtype=torch.uint8), lambda name: torch.zeros(shape))


def mixed_set() -> tuple[list[Bucket], dict[str, torch.Tensor]]:
    specs = [
        spec("a", [5]), spec("b", [5]), spec("c", [3, 7], "bfloat16"), spec("d", [], "int64"), spec("e", [0]),
    ]  # fmt: skip
    return plan_buckets(specs, 128), random_tensors(specs)


def test_equal_weights_have_equal_digests_whatever_the_buffers_held() -> None:
    buckets, tensors = mixed_set()
    digest = digest_of(buckets, written(buckets, tensors))
    assert digest == digest_of(buckets, written(buckets, tensors, dirt=255))
    assert len(digest) == wire.DIGEST_BYTES
    assert set(digest) <= set("0123456789abcdef")


def test_the_digest_does_not_depend_on_the_size_of_buckets() -> None:
    buckets, tensors = mixed_set()
    whole = plan_buckets([slot.spec for bucket in buckets for slot in bucket.slots])
    assert len(whole) < len(buckets)
    assert digest_of(buckets, written(buckets, tensors)) == digest_of(whole, written(whole, tensors))


def test_one_flipped_bit_of_any_byte_changes_the_digest() -> None:
    buckets, tensors = mixed_set()
    flats = written(buckets, tensors)
    digest = digest_of(buckets, flats)
    places = [
        (flat, slot.start + byte)
        for bucket, flat in zip(buckets, flats, strict=True)
        for slot in bucket.slots
        for byte in range(slot.size)
    ]
    assert len(places) == 5 * 4 * 2 + 3 * 7 * 2 + 8
    for flat, byte in places:
        flat[byte] ^= 64
        assert digest_of(buckets, flats) != digest
        flat[byte] ^= 64
    assert digest_of(buckets, flats) == digest


def changed_spec(**changes: Any) -> Callable[[list[Bucket]], list[Bucket]]:
    def change(buckets: list[Bucket]) -> list[Bucket]:
        slot = buckets[0].slots[0]
        other = dataclasses.replace(slot, spec=slot.spec.model_copy(update=changes))
        return [dataclasses.replace(buckets[0], slots=[other, *buckets[0].slots[1:]]), *buckets[1:]]

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed_spec(name="z"),
        changed_spec(dtype="int32"),
        changed_spec(shape=[5, 1]),
        lambda buckets: buckets[:-1],
        lambda buckets: buckets[1:],
        lambda buckets: [],
        lambda buckets: [*buckets, buckets[0]],
        lambda buckets: buckets[::-1],
    ],
    ids=["name", "dtype", "shape", "last missing", "first missing", "none", "one twice", "order"],
)
def test_the_same_bytes_under_another_description_have_another_digest(change: Any) -> None:
    buckets, tensors = mixed_set()
    by_start = dict(zip([bucket.start for bucket in buckets], written(buckets, tensors), strict=True))
    changed = change(buckets)
    assert digest_of(buckets, list(by_start.values())) != digest_of(
        changed, [by_start[bucket.start] for bucket in changed]
    )


def test_swapped_tensors_have_another_digest() -> None:
    buckets, tensors = mixed_set()
    swapped = tensors | {"a": tensors["b"], "b": tensors["a"]}
    assert digest_of(buckets, written(buckets, tensors)) != digest_of(buckets, written(buckets, swapped))


def test_a_gloo_group_brings_the_sender_s_bytes_to_every_other_rank() -> None:
    sent = [torch.arange(200, dtype=torch.uint8), torch.full((7,), 3, dtype=torch.uint8)]
    store = wire.TCPStore("127.0.0.1", 0, 3, is_master=True, wait_for_workers=False)
    received: dict[int, list[torch.Tensor]] = {}

    def receive(rank: int) -> None:
        mine = wire.find_sender("127.0.0.1", store.port, PATIENCE_S)
        group = wire.join_group("gloo", mine, rank, 3, "127.0.0.1", PATIENCE_S, CPU)
        received[rank] = [torch.zeros_like(flat) for flat in sent]
        for flat in received[rank]:
            wire.broadcast(group, flat)

    threads = [threading.Thread(target=receive, args=(rank,), daemon=True) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    group = wire.join_group("gloo", store, 0, 3, "127.0.0.1", PATIENCE_S, CPU)
    for flat in sent:
        wire.broadcast(group, flat)
    for thread in threads:
        thread.join(PATIENCE_S)
    assert received.keys() == {1, 2}
    for flats in received.values():
        assert all(map(torch.equal, flats, sent))


def test_a_sender_that_is_gone_is_not_waited_for_as_long_as_a_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "FIND_TIMEOUT_S", 0.2)
    store = wire.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    port = store.port
    found = wire.find_sender("127.0.0.1", port, 600)
    assert found.timeout == timedelta(seconds=600)
    del store, found
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        wire.find_sender("127.0.0.1", port, 600)
    assert time.monotonic() - start < PATIENCE_S


def test_a_rank_that_nobody_meets_gives_up() -> None:
    store = wire.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    with pytest.raises(RuntimeError):
        wire.join_group("gloo", store, 0, 2, "127.0.0.1", 0.1, CPU)


class NcclGroup:
    """Stands for ProcessGroupNCCL, which reads the environment as it is made."""

    Options = SimpleNamespace
    made: list[str | None]

    def __init__(self, *_: Any) -> None:
        before = os.environ.get(BLOCKING_WAIT)
        time.sleep(0.002)
        self.made += [before, os.environ.get(BLOCKING_WAIT)]

    def broadcast(self, flats: list[torch.Tensor], options: Any) -> Any:
        assert [flat.device for flat in flats] == [torch.device("meta")]
        return SimpleNamespace(wait=lambda: None)


@pytest.mark.parametrize("before", [None, "0"])
def test_groups_of_many_servers_are_made_at_the_same_time(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with a wait that raises, on the device of its own side, and the environment is as it was."""
    monkeypatch.setattr(NcclGroup, "made", [], raising=False)
    monkeypatch.setattr(wire.dist, "ProcessGroupNCCL", NcclGroup, raising=False)
    if before is not None:
        monkeypatch.setenv(BLOCKING_WAIT, before)

    def join(rank: int) -> Any:
        return wire.join_group("nccl", None, rank, 16, "127.0.0.1", PATIENCE_S, torch.device("meta"))

    with ThreadPoolExecutor(16) as pool:
        assert len(list(pool.map(join, range(16)))) == 16
    assert NcclGroup.made == ["1"] * 32
    assert os.environ.get(BLOCKING_WAIT) == before
