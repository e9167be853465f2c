"""A multi-cloud that keeps its contract as well as real ones do, and a true bill that the product cannot see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from cost.ledger.leases import Lease
from cost.market.offers import Offer
from cost.market.providers import PriceBound, Ttl
from faults.nodes import Node
from faults.storage import MemoryStore
from faults.world import ORIGIN_MS, World
from orchestrator.backends.base import BackendError, Instance, LeasePhase, LeaseState, NoCapacity
from orchestrator.clock import utc
from orchestrator.supervisor.lease_policy import Terms, worst_price

BOOT_SECONDS = (20.0, 60.0)
TTL_LATENCY_SECONDS = (1.0, 15.0)
STOP_SECONDS = (1.0, 10.0)
BALANCE_SECONDS = 60.0
"""How often a provider compares prepaid money with what was used."""


@dataclass(slots=True)
class Trouble:
    """What is wrong with the provider now; counters, since troubles may overlap."""

    down: int = 0
    slow_seconds: float = 0.0
    hides: int = 0
    lag_seconds: float = 0.0
    deaf_to_stop: int = 0
    full: int = 0
    lose_reply: int = 0
    create_late_seconds: float = 0.0
    doubled: int = 0


@dataclass(slots=True)
class FakeCloud:
    """`prices` holds, by offer, the moments at which its price changed. `ttl_slack` breaks the TTL's reservation."""

    world: World
    store: MemoryStore
    terms: Terms
    armed_at_create: bool
    prices: dict[str, list[tuple[float, float]]]
    quotes: Sequence[Offer] = ()
    name: str = "fake"
    nodes: list[Node] = field(default_factory=list)
    trouble: Trouble = field(default_factory=Trouble)
    guarded: bool = True
    ttl_exists: bool = True
    ttl_slack: float = 0.0
    ttl_latency: tuple[float, float] = TTL_LATENCY_SECONDS
    on_create: Callable[[Node], None] | None = None
    stray_seconds: float = 0.0
    """How long a stray may live until it counts as beyond the bound."""
    steps: int = 0
    command: Sequence[str] = ()
    _exit_codes: dict[str, int] = field(default_factory=dict)
    _ended_usd: dict[str, float] = field(default_factory=dict)
    _alive: list[Node] = field(default_factory=list)

    # -- the contract

    def offers(self) -> Sequence[Offer]:
        return self.quotes

    def start(self, lease: Lease, command: Sequence[str]) -> None:
        self._request("start")
        self.command = command
        late, self.trouble.create_late_seconds = self.trouble.create_late_seconds, 0.0
        if late:
            for rank in range(lease.num_nodes):
                self.world.after(late, lambda rank=rank: self._create(lease, rank, is_stray=True))  # type: ignore[misc]
            self._reply("start", lost=True)
        for _ in range(2 if self.trouble.doubled else 1):
            have = {node.rank for node in self._alive if node.lease.lease_id == lease.lease_id}
            missing = [rank for rank in range(lease.num_nodes) if rank not in have]
            if missing and self.trouble.full:
                raise NoCapacity(f"{lease.offer.offer_id}: none free")
            if 0 in missing:
                self._exit_codes.pop(lease.lease_id, None)
            for rank in missing:
                self._create(lease, rank)
        self._reply("start", lost=self.trouble.lose_reply > 0)

    def poll(self, lease: Lease) -> LeaseState:
        self._request("poll")
        there = [node for node in self._listed() if node.lease.lease_id == lease.lease_id]
        self._reply("poll")
        price = Decimal(str(self.price_at(lease.offer.offer_id, self.world.t)))
        if not there:
            return LeaseState(LeasePhase.GONE, usd_per_hour=price)
        exit_code = self._exit_codes.get(lease.lease_id)
        phase = LeasePhase.RUNNING if exit_code is None else LeasePhase.ENDED
        return LeaseState(phase, tuple(sorted(node.rank for node in there)), exit_code, price)

    def extend(self, lease: Lease, seconds: float) -> None:
        self._request("extend")
        for node in self._alive:
            if node.lease.lease_id == lease.lease_id and self._limit_can_be_moved:
                node.move_ttl(self.world.t + seconds + self.ttl_slack)
        self._reply("extend")

    @property
    def _limit_can_be_moved(self) -> bool:
        return self.ttl_exists and self.terms.ttl is Ttl.RENEWABLE

    @property
    def limit_is_armed_later(self) -> bool:
        """Whether a node lives for a moment with no limit of the provider's."""
        return self.terms.ttl is Ttl.RENEWABLE and not self.armed_at_create

    @property
    def price_is_fixed(self) -> bool:
        return self.terms.price_bound is PriceBound.FIXED

    def stop(self, lease: Lease) -> None:
        self._request("stop")
        for node in [node for node in self._alive if node.lease.lease_id == lease.lease_id]:
            if not self.trouble.deaf_to_stop:
                seconds = self.world.rng.uniform(*STOP_SECONDS)
                self.world.after(seconds, lambda node=node: self.end(node))  # type: ignore[misc]
        self._reply("stop")

    def list_alive(self) -> Sequence[Instance]:
        self._request("list")
        found = [
            Instance(
                instance_id=f"{node.lease.lease_id}-{node.rank}",
                lease_id=node.lease.lease_id,
                run_id=node.lease.run_id,
                rank=node.rank,
                usd_per_hour=node.lease.offer.usd_per_hour,
                started_at=utc(ORIGIN_MS + int(node.created * 1000)),
            )
            for node in self._listed()
        ]
        self._reply("list")
        return found

    # -- the provider's side

    def end(self, node: Node) -> None:
        if node.alive:
            node.ended = self.world.t
            self._alive.remove(node)
            lease_id = node.lease.lease_id
            self._ended_usd[lease_id] = self._ended_usd.get(lease_id, 0.0) + self._cost(node)

    def alive(self) -> list[Node]:
        return list(self._alive)

    def price_at(self, offer_id: str, t: float) -> float:
        return [price for since, price in self.prices[offer_id] if since <= t][-1]

    def true_bill_usd(self) -> float:
        """Real node time at the price of each moment."""
        return sum(self.bills().values())

    def bills(self) -> dict[str, float]:
        """The same by lease."""
        bills = dict(self._ended_usd)
        for node in self._alive:
            bills[node.lease.lease_id] = bills.get(node.lease.lease_id, 0.0) + self._cost(node)
        return bills

    def _cost(self, node: Node, above: float = 0.0) -> float:
        """Integral of the price over the node's billed time; `above`: only of what exceeds that price."""
        end = self.world.t if node.ended is None else node.ended
        end = max(end, node.created + self.terms.minimum_billed_seconds)
        changes = self.prices[node.lease.offer.offer_id]
        total = 0.0
        for index, (since, price) in enumerate(changes):
            until = changes[index + 1][0] if index + 1 < len(changes) else end
            total += max(0.0, price - above) * max(0.0, min(end, until) - max(node.created, since)) / 3600
        return total

    def _look_at_balances(self) -> None:
        """An empty prepaid account, one on each cloud, ends everything that it paid for."""
        assert self.terms.balance_usd is not None
        if not self._alive:
            return
        for cloud in sorted({node.lease.offer.cloud for node in self._alive}):
            used = sum(self._cost(node) for node in self.nodes if node.lease.offer.cloud == cloud)
            if used >= float(self.terms.balance_usd):
                for node in [node for node in self._alive if node.lease.offer.cloud == cloud]:
                    self.world.after(self.world.rng.uniform(*self.ttl_latency), lambda node=node: self.end(node))  # type: ignore[misc]
        self.world.after(BALANCE_SECONDS, self._look_at_balances)

    def excess_usd(self) -> float:
        """The overshoot that broken assumptions explain: prices above p-hat, late kills, strays for a while."""
        return sum(self._excess(node) for node in self.nodes)

    def _excess(self, node: Node) -> float:
        offer = node.lease.offer
        if node.hung_unarmed:  # nothing ends it until somebody looks
            return self._cost(node)
        worst = worst_price(offer, self.terms.price_bound)
        seconds = node.late_seconds + (self.stray_seconds if node.is_stray else 0.0)
        highest = max(price for _, price in self.prices[offer.offer_id])
        return self._cost(node, float(worst)) + seconds * highest / 3600

    def _create(self, lease: Lease, rank: int, *, is_stray: bool = False) -> None:
        rng = self.world.rng
        node = Node(
            world=self.world,
            store=self.store,
            lease=lease,
            rank=rank,
            boot_seconds=rng.uniform(*BOOT_SECONDS),
            ttl=self._first_limit(lease),
            ttl_latency=rng.uniform(*self.ttl_latency),
            end=self.end,
            command_ended=self._command_ended,
            usd_per_hour=lambda: self._usd_per_hour(lease),
            guarded=self.guarded,
            ttl_works=self.ttl_exists,
            step=self._next_step,
            is_stray=is_stray,
        )
        self.nodes.append(node)
        self._alive.append(node)
        node.begin()
        if self.on_create is not None:
            self.on_create(node)
        if self.terms.balance_usd is not None and len(self._alive) == 1:
            self.world.after(BALANCE_SECONDS, self._look_at_balances)

    def _first_limit(self, lease: Lease) -> float | None:
        """When the provider ends a node that nobody moves the limit of; None where none is armed at the create."""
        if self.terms.ttl is Ttl.FIXED:
            return self.world.t + lease.ttl_seconds + self.ttl_slack
        if self.terms.ttl is Ttl.RENEWABLE and self.armed_at_create:
            return self.world.t + lease.first_grant_seconds + self.ttl_slack
        return None

    def _usd_per_hour(self, lease: Lease) -> float:
        """Of the nodes of a lease that are there now."""
        nodes = sum(1 for node in self._alive if node.lease.lease_id == lease.lease_id)
        return nodes * self.price_at(lease.offer.offer_id, self.world.t)

    def _command_ended(self, node: Node, code: int) -> None:
        if node.alive:
            self._exit_codes[node.lease.lease_id] = code

    def _next_step(self) -> int:
        self.steps += 1
        return self.steps

    def _listed(self) -> list[Node]:
        """What the interface says is there: late by the lag, and now and then without what lives."""
        moment = self.world.t - self.trouble.lag_seconds
        there = [
            node
            for node in (self._alive if self.trouble.lag_seconds == 0 else self.nodes)
            if node.created <= moment and (node.ended is None or node.ended > moment)
        ]
        return [node for node in there if not self.trouble.hides or self.world.rng.random() < 0.3]

    def _request(self, name: str) -> None:
        self.world.boundary(f"{name}:before")
        self.world.call(self.trouble.slow_seconds)
        if self.trouble.down:
            raise BackendError(f"{name}: the provider does not answer")

    def _reply(self, name: str, *, lost: bool = False) -> None:
        self.world.boundary(f"{name}:after")
        if lost:
            self.trouble.lose_reply = 0
            raise BackendError(f"{name}: the reply was lost")
