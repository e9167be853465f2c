"""What can be rented, at which price, known since when and from whom."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal


@dataclass(frozen=True, slots=True)
class Offer:
    """One kind of node that a cloud rents by the hour.

    `usd_per_hour` is the price of one whole node. `accelerator` is a name of `cost.hardware`.
    `on_demand_usd_per_hour` is the same node's price without preemption, where it is known.
    """

    cloud: str
    region: str
    zone: str | None
    instance_type: str | None
    accelerator: str
    gpus_per_node: int
    gpu_memory_gib: float
    spot: bool
    usd_per_hour: Decimal
    on_demand_usd_per_hour: Decimal | None
    as_of: str
    source: str

    @property
    def offer_id(self) -> str:
        """Stable name, for logs and for telling a preempted offer from the next one."""
        place = "/".join(part for part in (self.cloud, self.region, self.zone) if part)
        kind = "spot" if self.spot else "on-demand"
        return f"{place}/{self.accelerator}x{self.gpus_per_node}/{self.instance_type or '-'}/{kind}"
