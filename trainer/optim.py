"""The update: Muon for hidden matrices with AdamW for the rest, or AdamW for all.

Invariant: `Updates.state` holds all that the next step depends on but the weights, under the parameters' own names,
so that a checkpoint knows nothing of how parameters were grouped, wrapped or sharded.
Sources: Loshchilov and Hutter 2019 (arXiv:1711.05101); Jordan et al. 2024 (kellerjordan.github.io/posts/muon).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainer.config import OptimizerConfig

TABLES = ("embedding.weight", "head.weight")
"""Matrices whose rows are tokens: Muon's orthogonal update is not meant for them."""


class Updates:
    """One or two torch optimizers as one. Build it after the model was wrapped: sharding replaces parameters."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        matrices = {name for name, value in self.parameters.items() if value.ndim == 2 and name not in TABLES}
        muon_names = matrices if config.name == "muon" else set()
        other_names = [name for name in self.parameters if name not in muon_names]
        decayed = [self.parameters[name] for name in other_names if self.parameters[name].ndim >= 2]
        plain = [self.parameters[name] for name in other_names if self.parameters[name].ndim < 2]
        self._adamw = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=config.betas,
            fused=True,
        )
        self._muon: torch.optim.Muon | None = None
        if muon_names:
            self._muon = torch.optim.Muon(
                [self.parameters[name] for name in self.parameters if name in muon_names],
                lr=config.muon_learning_rate,
                weight_decay=config.weight_decay,
            )
        self._peaks = [(group, float(group["lr"])) for each in self._optimizers() for group in each.param_groups]

    def step(self, factor: float) -> None:
        """Update every parameter with `factor` times its peak learning rate."""
        for group, peak in self._peaks:
            group["lr"] = factor * peak
        for optimizer in self._optimizers():
            optimizer.step()

    def zero_grad(self) -> None:
        """Forget all gradients and free their memory."""
        for optimizer in self._optimizers():
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """`<parameter name>/<kind>` to the optimizers' own tensors, made here where no step has made them yet.

        What is copied into these tensors is what the next step uses.
        """
        tensors = {}
        for name, parameter in self.parameters.items():
            for kind, tensor in self._state_of(parameter).items():
                tensors[f"{name}/{kind}"] = tensor
        return tensors

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [self._adamw] if self._muon is None else [self._muon, self._adamw]

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        in_muon = self._muon is not None and any(parameter is p for p in self._muon.param_groups[0]["params"])
        optimizer = self._muon if self._muon is not None and in_muon else self._adamw
        state: dict[str, Tensor] = optimizer.state[parameter]
        if not state and in_muon:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        elif not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def scale_and_clip(parameters: Iterable[Tensor], scale: float, max_norm: float) -> float:
    """Multiply all gradients by `scale`, and then shrink them together to `max_norm` if they are longer.

    Returns the norm after scaling and before clipping; it is not finite if any gradient is not.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = scale * float(torch.nn.utils.get_total_norm(gradients))
    factor = scale if norm <= max_norm else scale * max_norm / norm
    torch._foreach_mul_(gradients, factor)
    return norm
