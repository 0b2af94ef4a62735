"""Trainer and server refuse what they do not know: a field misspelt or of another type never passes silently."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from grpo_cli.serve.protocol import (
    BeginWeights,
    Body,
    Committed,
    CommitWeights,
    GenerateRequest,
    GenerateResponse,
    SampledTokens,
    ServerInfo,
    Staging,
    Weights,
)

WEIGHTS = {"run": "r", "version": 3}
REQUEST = {"token_ids": [1, 2], "n": 2, "max_completion_tokens": 4}
BEGIN = {"weights": WEIGHTS, "tensors": [{"name": "w", "dtype": "bfloat16", "shape": [2, 3]}]}
RENDEZVOUS = {"backend": "gloo", "host": "127.0.0.1", "port": 1, "world_size": 2, "group": "g", "timeout_s": 5.0}
COMPLETION = {"token_ids": [1], "logprobs": [-0.5], "finish_reason": "stop"}
INFO = {
    "instance": "i", "weights": None, "refusing": None, "dtype": "float32", "max_model_len": 8,
    "max_num_seqs": 4, "world_size": 1, "devices": ["cpu"],
    "memory_probe": "/p",
}  # fmt: skip

VALID: list[tuple[type[Body], dict[str, Any]]] = [
    (Weights, WEIGHTS),
    (GenerateRequest, REQUEST),
    (GenerateResponse, {"weights": WEIGHTS, "completions": [COMPLETION], "interrupted": None}),
    (SampledTokens, COMPLETION),
    (BeginWeights, BEGIN | {"rendezvous": RENDEZVOUS}),
    (Staging, {"path": None}),
    (CommitWeights, {"weights": WEIGHTS, "digest": "d"}),
    (Committed, {"weights": WEIGHTS, "digest": "d"}),
    (ServerInfo, INFO),
]


@pytest.mark.parametrize(("body", "values"), VALID, ids=lambda value: getattr(value, "__name__", ""))
def test_a_body_comes_back_as_it_was_sent_and_takes_no_unknown_field(
    body: type[Body], values: dict[str, Any]
) -> None:
    parsed = body.model_validate_json(json.dumps(values))
    assert body.model_validate_json(parsed.model_dump_json()) == parsed
    assert parsed.model_dump(exclude_unset=True) == values
    with pytest.raises(ValidationError, match="spurious"):
        body.model_validate_json(json.dumps(values | {"spurious": 1}))


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": []},
        {"token_ids": [-1]},
        {"token_ids": ["1"]},
        {"token_ids": [1.0]},
        {"token_ids": [True]},
        {"token_ids": "12"},
        {"n": 0},
        {"n": "2"},
        {"n": 2.0},
        {"max_completion_tokens": 0},
        {"max_completion_tokens": None},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": "1"},
        {"temperature": -0.1},
        {"temperature": "1"},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"stop": [""]},
        {"stop": "x"},
        {"stop_token_ids": [-1]},
        {"weights": {"run": "r"}},
        {"weights": {"run": "", "version": 0}},
        {"weights": {"run": "r", "version": -1}},
        {"weights": {"run": "r" * 65, "version": 0}},
    ],
    ids=str,
)
def test_a_request_with_a_wrong_value_is_refused(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(ValidationError, match=name):
        GenerateRequest.model_validate_json(json.dumps(REQUEST | changes))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["temperature", "repetition_penalty"])
def test_a_number_that_is_none_is_refused(field: str, value: str) -> None:
    text = json.dumps(REQUEST)[:-1] + f', "{field}": {value}}}'
    with pytest.raises(ValidationError, match=f"{field}"):
        GenerateRequest.model_validate_json(text)
    with pytest.raises(ValidationError, match=f"{field}"):
        GenerateRequest(**REQUEST | {field: float(value)})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["NaN", "-Infinity"])
def test_a_log_probability_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(ValidationError, match="logprobs"):
        SampledTokens.model_validate_json(f'{{"token_ids": [1], "logprobs": [{value}], "finish_reason": "stop"}}')


@pytest.mark.parametrize(
    "changes",
    [
        {"tensors": []},
        {"tensors": [{"name": "", "dtype": "float32", "shape": []}]},
        {"tensors": [{"name": "w", "dtype": "float8", "shape": []}]},
        {"tensors": [{"name": "w", "dtype": "float32", "shape": [-1]}]},
        {"tensors": [{"name": "w", "dtype": "float32", "shape": [1.5]}]},
        {"rendezvous": RENDEZVOUS | {"backend": "mpi"}},
        {"rendezvous": RENDEZVOUS | {"port": 0}},
        {"rendezvous": RENDEZVOUS | {"port": 65536}},
        {"rendezvous": RENDEZVOUS | {"world_size": 1}},
        {"rendezvous": RENDEZVOUS | {"timeout_s": 0.0}},
        {"rendezvous": RENDEZVOUS | {"pickle": ""}},
    ],
    ids=str,
)
def test_weights_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(ValidationError, match=name):
        BeginWeights.model_validate_json(json.dumps(BEGIN | changes))


def test_bodies_do_not_change() -> None:
    weights = Weights(run="r", version=1)
    with pytest.raises(ValidationError, match="frozen"):
        weights.version = 2  # type: ignore[misc]
    assert str(weights) == "version 1 of run r"


def test_the_protocol_imports_neither_torch_nor_vllm() -> None:
    heavy = ["torch", "vllm", "transformers", "fastapi"]
    code = f"import sys, grpo_cli.serve.protocol; sys.exit(' '.join(sys.modules.keys() & set({heavy})) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
