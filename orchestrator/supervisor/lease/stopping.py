"""Ending a lease in good order: the training loop is asked for a checkpoint and its end, and has a while for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cost.ledger.recovery import Cause
from orchestrator.clock import Clock
from orchestrator.supervisor.lease_policy import Terms
from tasks import run_store_keys as keys
from tasks.run_store_records import Command
from trainer.run_store.base import Store, StoreKeyMissing
from trainer.run_store.envelope import RecordError, Writer


@dataclass(slots=True)
class StopSwitch:
    """Ctrl-C and `slm stop`: level 1 asks for a checkpoint and a stop, level 2 ends the nodes at once."""

    level: int = 0

    def press(self) -> None:
        self.level += 1


@dataclass(frozen=True, slots=True)
class StopRequest:
    """Why the training loop was asked to stop, and when."""

    cause: Cause
    detail: str
    asked_at: float
    """Real seconds."""


@dataclass(slots=True)
class Stopping:
    """Whether this lease is asked to stop. `ask` and `take_up` set `request`; it is never withdrawn."""

    lease_id: str
    store: Store
    clock: Clock
    terms: Terms
    tell: Callable[..., None]
    request: StopRequest | None = None

    def ask(self, cause: Cause, detail: str) -> None:
        """Ask for a checkpoint and a stop; the lease continues until the training loop has done so.

        Raises:
            StoreError: The run store cannot be written; nothing is asked.
        """
        command = Command(command="stop", number=1, reason=cause.value)
        self.store.write(keys.control(self.lease_id), command.to_bytes(Writer.SUPERVISOR))
        self.request = StopRequest(cause, detail, self.clock.real_seconds())
        self.tell("warning", f"asking for a checkpoint and a stop: {detail}")

    def take_up(self) -> None:
        """Continue with what an earlier supervisor has asked for."""
        key = keys.control(self.lease_id)
        try:
            asked = Command.parse(self.store.read(key), key)
        except (StoreKeyMissing, RecordError):
            return
        if asked.command == "stop":
            cause = Cause(asked.reason) if asked.reason in set(Cause) else Cause.ASKED
            self.request = StopRequest(cause, "asked before this supervisor took over", self.clock.real_seconds())

    @property
    def is_overdue(self) -> bool:
        """Whether the training loop has not stopped in the time that it has for it."""
        if self.request is None:
            return False
        return self.clock.real_seconds() - self.request.asked_at > self.terms.stop_grace_seconds
