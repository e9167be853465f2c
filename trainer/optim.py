"""The update: Muon for hidden matrices with AdamW for the rest, or AdamW for all; each group at a rate of its own.

Invariant: `Updates.state` holds all that the next step depends on but the weights, under the parameters' own names,
so that a checkpoint knows nothing of how parameters were grouped, wrapped or sharded.
Sources: Loshchilov and Hutter 2019 (arXiv:1711.05101); Jordan et al. 2024 (kellerjordan.github.io/posts/muon); for
cautious decay Chen et al. 2025 (arXiv:2510.12402).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.config import OptimizerConfig

KINDS = ("matrix", "embedding", "head", "scalar")


def parameter_kind(name: str, parameter: Tensor) -> str:
    """Which learning rate a parameter has; only a "matrix" is for Muon: rows of tables are tokens or positions."""
    if parameter.ndim < 2:
        return "scalar"
    if name == "head.weight":
        return "head"
    return "embedding" if name.endswith("embedding.weight") else "matrix"


class Updates:
    """One or two torch optimizers as one. Build it after the model was wrapped: sharding replaces parameters."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        groups: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
        for name, parameter in self.parameters.items():
            groups[parameter_kind(name, parameter)].append(parameter)
        rates = {
            "matrix": config.learning_rate,
            "embedding": config.embedding_learning_rate,
            "head": config.head_learning_rate,
            "scalar": config.scalar_learning_rate,
        }
        matrices = groups.pop("matrix") if config.name == "muon" else []
        # Cautious decay needs the update first, so it is done here and not by torch.
        self._cautious_decay = config.weight_decay if config.cautious else 0.0
        decay = 0.0 if config.cautious else config.weight_decay
        self._adamw = torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "lr": config.learning_rate if rates[kind] is None else rates[kind],
                    "weight_decay": 0.0 if kind == "scalar" else decay,
                    "cautious": kind != "scalar",
                }
                for kind, parameters in groups.items()
                if parameters
            ],
            betas=config.betas,
            fused=True,
        )
        self._muon: torch.optim.Muon | None = None
        if matrices:
            only = {"params": matrices, "cautious": True}
            self._muon = torch.optim.Muon([only], lr=config.muon_learning_rate, weight_decay=decay)
        self._peaks = [(group, float(group["lr"])) for each in self._optimizers() for group in each.param_groups]

    def step(self, factor: float) -> None:
        """Update every parameter with `factor` times its peak learning rate."""
        for group, peak in self._peaks:
            group["lr"] = factor * peak
        for optimizer in self._optimizers():
            before = self._copies(optimizer) if self._cautious_decay else []
            optimizer.step()
            for rate, parameter, old in before:
                _decay_cautiously(parameter, old, rate * self._cautious_decay)

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
            for kind, tensor in self._parameter_state(parameter).items():
                tensors[f"{name}/{kind}"] = tensor
        return tensors

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [self._adamw] if self._muon is None else [self._muon, self._adamw]

    def _parameter_state(self, parameter: Tensor) -> dict[str, Tensor]:
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

    def _copies(self, optimizer: torch.optim.Optimizer) -> list[tuple[float, Tensor, Tensor]]:
        """Rate, parameter and its value before the update, of all that decay."""
        groups = [group for group in optimizer.param_groups if group["cautious"]]
        return [(group["lr"], p, p.detach().clone()) for group in groups for p in group["params"]]


@torch.no_grad()
def _decay_cautiously(parameter: Tensor, before: Tensor, rate: float) -> None:
    """Shrink, by `rate` of what it was, each weight that the update has moved toward zero."""
    toward_zero = (before - parameter) * before > 0
    parameter.sub_(rate * before * toward_zero)


def scale_and_clip(parameters: Iterable[Tensor], scale: float, max_norm: float) -> float:
    """Multiply all gradients by `scale`, and then shrink them together to `max_norm` if they are longer.

    Returns the norm after scaling and before clipping, of the whole gradient where it is sharded; it is not finite if
    any gradient is not.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    total = torch.nn.utils.get_total_norm(gradients)
    norm = scale * float(total.full_tensor() if isinstance(total, DTensor) else total)
    factor = scale if norm <= max_norm else scale * max_norm / norm
    torch._foreach_mul_(gradients, factor)
    return norm
