"""What a launch was told beside its recipe: `LaunchRequest` as a person asks for it, `RunOptions` as the run keeps it.

`RunOptions` stand as JSON in the run's row of the database and in each supervisor's first record in the run store, so
that a later supervisor, here or on another machine, continues with what the first was told. Pydantic checks them where
they are read. A field that is added later needs a default, since older runs lack it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Annotated, Any, ClassVar

from pydantic import AllowInfNan, ConfigDict, TypeAdapter, ValidationError

from cost.errors import SlmError
from cost.market.offers import Offer
from tasks.recipe.schema import Recipe

LOCAL = "local"
"""The backend that plays a spot market on this machine."""


Forecast = Annotated[Decimal, AllowInfNan()]
"""Dollars; infinite where the market never lets a run finish."""


class OptionsUnreadable(SlmError):
    """Options that this version cannot read: what their run may do is unknown, so nothing is done for it."""


@dataclass(frozen=True, slots=True)
class LossBelief:
    """What the plan believed of losses of the offer that it chose."""

    losses: float
    node_hours: float
    """In which there were so many losses."""
    saved_at_notice: float
    """Share of the losses before which a checkpoint is saved, 0..1."""
    restart_seconds: float
    """Real seconds."""
    time_scale: float
    """Billed seconds in a real one."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What a run is supervised by, beside its recipe."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    backend: str
    offers: tuple[Offer, ...] = ()
    """What may be rented, in the order of the plan."""
    checkpoint_interval_seconds: float | None = None
    """As planned; None: as the recipe says."""
    losses: LossBelief | None = None
    expected_usd: Mapping[str, Forecast] = field(default_factory=dict)
    """Of the whole run by offer_id, for telling later whether another offer has become cheaper."""
    planned_speed: Mapping[str, float] = field(default_factory=dict)
    """Tokens per second of one device by offer_id."""
    precision_reason: str | None = None
    """Why it computes in its precision, where the recipe left that open; said in the log of each supervisor."""
    single_supervisor: bool = False
    """Whether a person has promised that no other machine supervises this run, so that its store need not fence."""
    allow_unguarded: bool = False
    """Whether to rent where nothing would end a hung node."""
    store: str | None = None
    """Where the run store is; None: in the home of this machine."""
    market: str | None = None
    """On the local backend: the folder of the market that it rents from."""
    owners: tuple[str, ...] = ()
    """The names under which its nodes were ever rented."""

    @property
    def is_local(self) -> bool:
        """Whether it rents from the market that is played on this machine."""
        return self.backend == LOCAL

    def time_scale(self, recipe: Recipe) -> float:
        """Billed seconds in a real one."""
        return recipe.local.time_scale if self.is_local else 1.0

    @staticmethod
    def parse(content: Mapping[str, Any]) -> RunOptions:
        """Options as they were read from JSON.

        Raises:
            OptionsUnreadable: A field is missing, unknown or of another type.
        """
        try:
            return _STORED.validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise OptionsUnreadable(
                f"the options of this run cannot be read ({name}: {first['msg'].lower()}); another version of slm "
                "wrote them, so continue it with that version."
            ) from error

    @staticmethod
    def from_json(text: str) -> RunOptions:
        """Options as they stand in the database.

        Raises:
            OptionsUnreadable: They are no options of this version.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise OptionsUnreadable(f"the options of this run are no JSON: {error}; bring back a copy.") from error
        return RunOptions.parse(content)

    def content(self) -> dict[str, Any]:
        """The same as JSON types; dollars as text."""
        content: dict[str, Any] = _STORED.dump_python(self, mode="json")
        return content

    def to_json(self) -> str:
        return json.dumps(self.content(), sort_keys=True)


_STORED = TypeAdapter(RunOptions)


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """Everything that a launch is asked for.

    `options` are what the plan decided; where the new run's store and market are is added when it is created.
    """

    recipe: Recipe
    options: RunOptions
    budget_usd: Decimal | None = None
    """Cap of the whole run; None: the recipe's, or that of the unfinished run that is continued."""
    store: str | None = None
    """The folder or bucket under which a new run gets its run store; None: in the home."""
    notify_target: str | None = None
    """Whom to notify of what happens; None: as before."""
