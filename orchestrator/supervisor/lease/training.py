"""What the training loop of a lease reports through the run store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.clock import Clock
from tasks import run_store_keys as keys
from tasks.run_store_records import Failure
from trainer.run_store.base import Store, StoreKeyMissing
from trainer.run_store.envelope import RecordError, unwrap


@dataclass(frozen=True, slots=True)
class Report:
    """A step that was not reported before."""

    step: int | None
    content: Mapping[str, Any]
    is_first: bool
    """Whether this supervisor has seen no other on this lease."""
    recovery_seconds: float | None
    """How long training was interrupted, in its first report after a loss."""
    skipped_checkpoints: tuple[str, ...]
    """Why damaged checkpoints were passed over by a new group of workers."""


@dataclass(slots=True)
class Training:
    """How far training is. `take_up`, `news` and `interrupted` change it; times are real seconds."""

    store: Store
    """The run store as the stage of the lease sees it."""
    clock: Clock
    lost_at: float | None = None
    """When a lease or a node was lost; None once training continues."""
    step: int | None = None
    incarnation: int = -1
    """Number of the group of workers that reported `step`."""
    newest_at: float = 0.0
    """When a new step was last reported."""
    is_running: bool = False
    """Whether this supervisor has seen a new step on this lease."""

    def take_up(self) -> None:
        """Begin where the run stands."""
        self.newest_at = self.clock.real_seconds()
        content = self._read(keys.PROGRESS)
        if content is not None:
            self.step, self.incarnation = content.get("step"), int(content.get("incarnation", -1))

    def interrupted(self) -> None:
        """Nodes were lost just now."""
        self.lost_at = self.clock.real_seconds()

    def news(self) -> Report | None:
        """What has been reported since the last call; None if nothing new.

        Raises:
            StoreError: The run store does not answer.
        """
        content = self._read(keys.PROGRESS)
        if content is None:
            return None
        step, incarnation = content.get("step"), int(content.get("incarnation", -1))
        if (step, incarnation) == (self.step, self.incarnation):
            return None
        now, restarted = self.clock.real_seconds(), incarnation != self.incarnation
        recovery_seconds = now - self.lost_at if restarted and self.lost_at is not None else None
        skipped = (self._read(keys.incarnation(incarnation)) or {}).get("skipped", []) if restarted else []
        if restarted:
            self.lost_at = None
        report = Report(step, content, not self.is_running, recovery_seconds, tuple(skipped))
        self.step, self.incarnation, self.newest_at, self.is_running = step, incarnation, now, True
        return report

    def share_left(self) -> float | None:
        """Of all steps, 0..1; None while that is unknown."""
        num_steps = (self._read(keys.PROGRESS) or {}).get("num_steps")
        return 1 - self.step / num_steps if num_steps and self.step is not None else None

    def last_words(self, run_store: Store, lease_id: str) -> str:
        """The last line of the first node's log, since it often says why the command ended."""
        try:
            lines = run_store.read(keys.node_log(lease_id, 0)).decode(errors="replace").splitlines()
        except StoreKeyMissing:
            return ""
        words = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f" after: {words[:200]}" if words else ""

    def newest_failure(self) -> str:
        """What went wrong twice at one step."""
        failures = self.store.list(keys.FAILURES)
        if not failures:
            return "training failed twice at one step, without a record of why"
        try:
            failure = Failure.parse(self.store.read(failures[-1]), failures[-1])
        except RecordError as error:
            return f"training failed twice at one step; {error}"
        return f"training failed twice at step {failure.step}: {failure.message}"

    def _read(self, key: str) -> dict[str, Any] | None:
        try:
            return unwrap(self.store.read(key), key)
        except (StoreKeyMissing, RecordError):
            return None
