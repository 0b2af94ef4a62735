"""What trainer and server say to each other: the routes of `/v1/grpo` and the bodies that they take and give.

Neither torch nor vLLM is imported here, since both sides need it and each lacks one of them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from grpo_cli.recipe.sampling import Sampling
from grpo_cli.recipe.section import Section

PREFIX = "/v1/grpo"
INFO, GENERATE = f"{PREFIX}/info", f"{PREFIX}/generate"
BEGIN_WEIGHTS, COMMIT_WEIGHTS = f"{PREFIX}/weights/begin", f"{PREFIX}/weights/commit"

HEARTBEAT_S = 5.0
"""While a request is worked on, the server sends a blank this often; for completions if its engine answers."""

TRANSFER_TIMEOUT_S = 600.0
"""Longest time that a server takes to empty itself or to load weights."""

STAGING_FILE = "weights"
"""Beside the memory probe, for weights that are handed over in memory."""

Count = Annotated[int, Field(ge=0)]
Dtype = Literal["float32", "bfloat16", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]


class Body(Section):
    """What a request or an answer holds. A field that the other side does not know is an error, so that two
    versions of this program do not talk past each other."""


class Weights(Body):
    """Names a whole set of weights: two trainers that both count from 0 are told apart by `run`."""

    run: str = Field(min_length=1, max_length=64)
    version: Count

    def __str__(self) -> str:
        return f"version {self.version} of run {self.run}"


class GenerateRequest(Sampling, Body):
    """One prompt, the group of completions that it shall get, and how they are sampled."""

    token_ids: list[Count] = Field(min_length=1)
    n: int = Field(ge=1)
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Completion i is drawn with seed + i."""
    stop_token_ids: list[Count] = []
    """Tokens that end a completion and stay in it; the model's own end-of-sequence token is not added."""
    weights: Weights | None = None
    """The weights that must generate; whatever is loaded if empty."""


class SampledTokens(Body):
    """A completion as vLLM gives it."""

    token_ids: list[int]
    logprobs: list[float]
    """Under the distribution that the token was drawn from: temperature, penalty and filters applied."""
    finish_reason: Literal["stop", "length"]


class GenerateResponse(Body):
    weights: Weights | None
    """What generated; none for the weights that the server started with."""
    completions: list[SampledTokens] = []
    interrupted: str | None = None
    """Why there are no completions: the request is to be sent again."""


class TensorSpec(Body):
    name: str = Field(min_length=1)
    dtype: Dtype
    shape: list[Count]


class Rendezvous(Body):
    """Where the trainer waits for the server's workers to join a process group: the trainer is rank 0."""

    backend: Literal["gloo", "nccl"]
    host: str
    port: int = Field(ge=1, le=65535)
    world_size: int = Field(ge=2)
    """The trainer and all workers of all replicas, which do not know of each other."""
    group: str
    """Names the group; one that the workers are in already is used again."""
    timeout_s: float = Field(gt=0)
    """Of the rendezvous and of each bucket, on both sides: one must not wait when the other has given up."""


class BeginWeights(Body):
    weights: Weights
    tensors: list[TensorSpec] = Field(min_length=1)
    rendezvous: Rendezvous | None = None
    """Empty where the weights come through memory that both sides can see."""


class Staging(Body):
    """The answer to `BeginWeights`."""

    path: str | None
    """File to be filled with the tensors, for a transfer through memory."""


class CommitWeights(Body):
    weights: Weights
    digest: str | None = None
    """What the trainer counts in the staging file; over a process group it comes as the last message."""


class Committed(Body):
    weights: Weights
    digest: str
    """Of the bytes that arrived, as `wire.Digest` counts them."""


class Refused(Body):
    """In place of an answer that took so long that its status was sent before it was known."""

    status: int
    detail: str


class ServerInfo(Body):
    instance: str
    """Changes whenever the server starts."""
    weights: Weights | None
    """None for the weights that the server started with."""
    refusing: str | None
    """Why the server does not generate."""
    dtype: str
    """Of the server's parameters, and so of the weights on the wire."""
    max_model_len: int
    max_num_seqs: int
    world_size: int
    """Workers over all replicas."""
    devices: list[str]
    """What each of them computes on: the id of a GPU, or `cpu`."""
    memory_probe: str
    """A file that holds `instance`: whoever can read it can hand over weights in memory."""
