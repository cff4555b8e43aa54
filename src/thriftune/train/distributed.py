"""Several processes, one step: sums over processes, and gradients added up in buckets once a step.

A wrapper such as DistributedDataParallel averages gradients per backward pass; the loss here is a mean over all
processes' target tokens, so gradients are summed, once, after the last micro-batch. Uneven shares need no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn

BUCKET_ELEMENTS = 64 * 1024**2


@dataclass(frozen=True)
class Processes:
    """This process's number, how many there are, and the sums between them."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        summed: list[float] = tensor.tolist()
        return summed

    def unlike_main(self, values: Sequence[float]) -> int:
        """How many processes have other values than the main one; the same answer in each."""
        of_main = self.total(values if self.is_main else [0.0] * len(values))
        (differing,) = self.total([float(list(values) != of_main)])
        return round(differing)

    def barrier(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()

    def same_start(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every process the main one's parameters."""
        if self.world > 1:
            for parameter in parameters:
                torch.distributed.broadcast(parameter.data, src=0)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add every parameter's gradient over the processes; one without a gradient counts as zero."""
        if self.world == 1:
            return
        for bucket in _buckets(parameters):
            for parameter in bucket:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in bucket]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            torch.distributed.all_reduce(flat)
            for gradient, part in zip(gradients, _split_like(flat, gradients), strict=True):
                gradient.copy_(part)


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = []
    filled = BUCKET_ELEMENTS
    for parameter in parameters:
        same_type = buckets and buckets[-1][0].dtype == parameter.dtype
        if not same_type or filled + parameter.numel() > BUCKET_ELEMENTS:
            buckets.append([])
            filled = 0
        buckets[-1].append(parameter)
        filled += parameter.numel()
    return buckets


def _split_like(flat: Tensor, gradients: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([gradient.numel() for gradient in gradients])
    return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
