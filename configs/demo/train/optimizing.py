"""Muon for the matrices, AdamW for the rest, and the shape of the learning rate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is brought close to orthogonal by a Newton-Schulz iteration (Jordan et al., 2024).

    Matrices of one shape are stacked and worked on at once: on a CPU the single small products would cost more.
    """

    def __init__(
        self, matrices: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        super().__init__(list(matrices), {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002 - torch's signature
        """One update of all matrices that have a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes[matrix.shape].append(matrix)
            for matrices in shapes.values():
                self._update(matrices, group["lr"], group["momentum"], group["decay"])

    def _update(self, matrices: list[torch.nn.Parameter], lr: float, momentum: float, decay: float) -> None:
        pushes = []
        for matrix in matrices:
            state = self.state[matrix]
            if not state:
                state["velocity"] = torch.zeros_like(matrix)
            assert matrix.grad is not None
            state["velocity"].mul_(momentum).add_(matrix.grad)
            pushes.append(matrix.grad + momentum * state["velocity"])
        directions = orthogonal(torch.stack(pushes))
        rows, columns = matrices[0].shape
        scale = lr * max(1.0, rows / columns) ** 0.5
        for matrix, direction in zip(matrices, directions, strict=True):
            matrix.mul_(1 - lr * decay).add_(direction, alpha=-scale)


def orthogonal(matrices: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """The nearest matrices with all singular values near one, (count, rows, columns); coefficients of the paper."""
    turned = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if turned else matrices
    x = x.to(torch.bfloat16)  # Twice as fast, and the iteration needs no precision.
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        square = x @ x.mT
        factor = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, factor, x, beta=3.4445)
    return (x.mT if turned else x).to(matrices.dtype)


def rate(step: int, steps: int, cooldown: float, warmup: int = 60) -> float:
    """Share of the full learning rate: a short climb, a plateau, then straight down over the last part."""
    left = (steps - step) / (steps * cooldown)
    return min(1.0, (step + 1) / warmup, left)
