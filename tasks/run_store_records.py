"""Records of the run store that supervisor and nodes tell each other, as types.

What is read was written by another machine: `parse` takes any bytes and raises a RecordError of one line. Fields that
this version does not know are read past. Other records have their types where they are made: `tasks.spec.RunSpec`,
`tasks.stages.manifest.Manifest`, `trainer.metrics.Progress` and `trainer.checkpoints.lineage`. Torch-free.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.run_store.envelope import RecordError, Writer, unwrap, wrap

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Record(BaseModel):
    """The payload of one record."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    def to_bytes(self, writer: Writer) -> bytes:
        """As it stands in the run store."""
        return wrap(self.model_dump(mode="json"), writer)

    @classmethod
    def parse(cls, data: bytes, key: str) -> Self:
        """Read it; `key` names it in an error.

        Raises:
            RecordError: It is damaged, of another kind, or a newer version wrote it.
        """
        try:
            return cls.model_validate(unwrap(data, key))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "it"
            reason = f"is no {cls.__name__} ({where}: {first['msg']})"
            raise RecordError(key, reason, "bring it back from a copy") from None


class GuardRequest(Record):
    """A node's guard asks for more time; its numbers only grow."""

    number: int
    exit_code: int | None = None
    """Of the node's command; None while it runs."""
    noticed: bool = False
    """The cloud has announced that it takes the node."""


class Grant(Record):
    """The supervisor's answer to one request: how long the node may live, counted from that request."""

    fencing_token: int
    number: int
    duration_seconds: Seconds
    at_ms: int
    """Billed time: another machine knows by it how late it was."""


class Command(Record):
    """The supervisor tells the training loop what to do."""

    command: Literal["stop", "checkpoint"]
    number: int
    reason: str = ""


class Failure(Record):
    """Why the training code failed, by the worker that saw it."""

    lease_id: str = ""
    group: int = 0
    incarnation: int | None = None
    step: int
    fingerprint: str = ""
    """The same for the same bug."""
    message: str
    traceback: str = ""
    at: str = ""
