"""Ray Train's torch backend, without the wait for an orderly end of the process group.

Ray asks every worker to destroy its process group before it kills them, and waits up to 30 s for those that are dead
or wait for the dead. The processes end right after, which closes the same sockets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class _QuickTorchBackend(_TorchBackend):  # type: ignore[misc]
    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Nothing: see the top of this file."""


@dataclass
class QuickTorchConfig(TorchConfig):  # type: ignore[misc]
    """TorchConfig for processes that are killed rather than asked."""

    @property
    def backend_cls(self) -> type[_QuickTorchBackend]:
        return _QuickTorchBackend
