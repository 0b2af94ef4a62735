"""Tensors to a device and back, without the host waiting for it when it could give it its next work."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`, for what is queued there from now on."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # from pageable memory a copy waits all the same


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` on the CPU, to be read after `wait` only, without its gradient."""
    return tensor.detach().to("cpu", non_blocking=True)


def wait() -> None:
    """Until all that was queued is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
