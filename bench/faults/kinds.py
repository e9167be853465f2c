"""The kinds of faults, each installed at a random time of one schedule.

HELD: whatever of these happens together, the promise stands. BROKEN: an assumption of the promise is broken on purpose,
and the bill may pass the cap by what `bound` says. Limits of what is assumed stand beside the terms in `machine.py`:
lists lie for less than CONFIRM, calls are late by less than the kill latency.
"""

from __future__ import annotations

from collections.abc import Callable

from cost.market.offers import Offer
from faults.machine import Machine
from faults.nodes import SAVE_SECONDS, Node
from faults.world import Killed
from orchestrator.supervisor.lease_policy import worst_price
from tasks.run_store_keys import GRANTS, LEDGER, SPEC

Install = Callable[[Machine, float], None]

CALLS = (
    "reserve",
    "renew",
    "resize",
    "settle",
    LEDGER.rstrip("/"),
    SPEC,
    "start",
    "poll",
    "extend",
    "stop",
    "list",
    GRANTS.rstrip("/"),
)
MAX_LIE_SECONDS = 25.0
MAX_LAG_SECONDS = 20.0
SLOW_SECONDS = 20.0
AWAY_SECONDS = (2.0, 1500.0)


def kill(machine: Machine, away_seconds: float | None) -> None:
    if machine.depth:
        machine.away_seconds = away_seconds
        machine.tell(f"FAULT killed, back after {away_seconds}")
        raise Killed


def at_time_or_call(machine: Machine, t: float, act: Callable[[], None]) -> None:
    """Half of the times at `t`, half at the next boundary of a random call after `t`."""
    rng = machine.world.rng
    if rng.random() < 0.5:
        machine.world.at(t, act)
    else:
        name = f"{rng.choice(CALLS)}:{rng.choice(('before', 'after'))}"
        machine.world.at(t, lambda: machine.world.traps.update({name: act}))


def supervisor_killed(machine: Machine, t: float) -> None:
    away = machine.world.rng.uniform(*AWAY_SECONDS)
    at_time_or_call(machine, t, lambda: kill(machine, away))


def supervisor_lost(machine: Machine, t: float) -> None:
    at_time_or_call(machine, t, lambda: kill(machine, None))


def supervisor_moves(machine: Machine, t: float) -> None:
    """The machine is lost for good; some time later the run is recovered on another one."""
    away = machine.world.rng.uniform(*AWAY_SECONDS)

    def lose() -> None:
        if machine.depth:
            machine.moves = True
        kill(machine, away)

    at_time_or_call(machine, t, lose)


def supervisor_held_up(machine: Machine, t: float) -> None:
    seconds = machine.world.rng.uniform(10.0, 1500.0)

    def hold() -> None:
        if machine.depth:
            machine.tell(f"FAULT held up for {seconds:.0f} s")
            machine.world.advance(seconds)

    held_between_calls(machine, t, hold)


def another_supervisor(*, elsewhere: bool) -> Install:
    """While the first stands still, a second one goes on with the run: on the same machine, or on another one."""

    def install(machine: Machine, t: float) -> None:
        seconds = machine.world.rng.uniform(60.0, 1500.0)

        def hold() -> None:
            if machine.db.in_transaction and not elsewhere:
                return  # the file's lock keeps every other process of this machine out
            if machine.depth:
                machine.tell(f"FAULT another supervisor for {seconds:.0f} s")
                machine.takes_over_for(seconds, elsewhere=elsewhere)
                machine.tell("FAULT the first supervisor goes on")

        held_between_calls(machine, t, hold)

    return install


def held_between_calls(machine: Machine, t: float, hold: Callable[[], None]) -> None:
    """A process stands still in a wait, or right after a call; a call already sent is not held back."""
    rng = machine.world.rng
    if rng.random() < 0.4:
        machine.world.at(t, hold)
    else:
        name = f"{rng.choice(CALLS)}:after"
        machine.world.at(t, lambda: machine.world.traps.update({name: hold}))


def interval(machine: Machine, t: float, seconds: float, begin: Callable[[], None], end: Callable[[], None]) -> None:
    machine.world.at(t, begin)
    machine.world.at(t + seconds, end)


def counted(where: Callable[[Machine], object], name: str, shortest: float, longest: float) -> Install:
    """A trouble that begins at t and lasts a random time."""

    def install(machine: Machine, t: float) -> None:
        target = where(machine)

        def change(by: int) -> None:
            setattr(target, name, getattr(target, name) + by)
            machine.tell(f"FAULT {name} {'begins' if by > 0 else 'ends'}")

        seconds = machine.world.rng.uniform(shortest, longest)
        interval(machine, t, seconds, lambda: change(1), lambda: change(-1))

    return install


def network_cut(machine: Machine, t: float) -> None:
    """The supervisor reaches neither the provider nor the store."""
    seconds = machine.world.rng.uniform(20.0, 1200.0)

    def change(by: int) -> None:
        machine.cloud.trouble.down += by
        machine.door.down += by

    interval(machine, t, seconds, lambda: change(1), lambda: change(-1))


def slow(machine: Machine, t: float) -> None:
    seconds = machine.world.rng.uniform(60.0, 900.0)
    trouble = machine.cloud.trouble
    interval(
        machine,
        t,
        seconds,
        lambda: setattr(trouble, "slow_seconds", SLOW_SECONDS),
        lambda: setattr(trouble, "slow_seconds", 0.0),
    )


def list_lags(machine: Machine, t: float) -> None:
    seconds = machine.world.rng.uniform(60.0, 900.0)
    trouble = machine.cloud.trouble
    lag = machine.world.rng.uniform(1.0, MAX_LAG_SECONDS)
    interval(
        machine,
        t,
        seconds,
        lambda: setattr(trouble, "lag_seconds", lag),
        lambda: setattr(trouble, "lag_seconds", 0.0),
    )


def reply_lost(machine: Machine, t: float) -> None:
    machine.world.at(t, lambda: setattr(machine.cloud.trouble, "lose_reply", 1))


def on_node(act: Callable[[Machine, Node], None]) -> Install:
    """Do it to a random living node at t, or to the next that lives."""

    def install(machine: Machine, t: float) -> None:
        def look() -> None:
            alive = machine.cloud.alive()
            if alive:
                node = machine.world.rng.choice(alive)
                machine.tell(f"FAULT {act.__name__} {node.lease.lease_id} {node.rank}")
                act(machine, node)
            else:
                machine.world.after(30.0, look)

        machine.world.at(t, look)

    return install


def preempted(machine: Machine, node: Node) -> None:
    machine.cloud.end(node)


def preempted_with_notice(machine: Machine, node: Node) -> None:
    def save() -> None:
        for instance in machine.cloud.alive():
            if instance.lease.lease_id == node.lease.lease_id:
                instance.save()

    machine.world.after(SAVE_SECONDS, save)
    machine.world.after(30.0, lambda: machine.cloud.end(node))


def guest_hangs(machine: Machine, node: Node) -> None:
    """Once the provider's limit is armed; that it does not hang before is an assumption."""
    if node.ttl is None and machine.cloud.limit_is_armed_later and node.alive:
        machine.world.after(5.0, lambda: guest_hangs(machine, node))
    else:
        node.hung = True


def hangs_unarmed(machine: Machine, t: float) -> None:
    """The next node hangs before its provider's limit is armed, and nobody is there to arm it for a while."""

    def hang(node: Node) -> None:
        if node.ttl is None and machine.cloud.limit_is_armed_later:
            node.hung = node.hung_unarmed = True
            machine.tell(f"FAULT hangs unarmed {node.lease.lease_id} {node.rank}")
            machine.away_seconds = machine.world.rng.uniform(*AWAY_SECONDS)
            machine.world.traps["extend:before"] = lambda: kill(machine, machine.away_seconds)

    machine.world.at(t, lambda: setattr(machine.cloud, "on_create", hang))


def grants_repeated(machine: Machine, t: float) -> None:
    for later in range(0, 600, 60):
        machine.world.at(t + later, lambda: machine.store.deliver_again(GRANTS))


def guard_killed(_: Machine, node: Node) -> None:
    node.lose_guard()


def guest_reboots(_: Machine, node: Node) -> None:
    node.reboot()


def node_cut_off(machine: Machine, node: Node) -> None:
    node.cut = True
    machine.world.after(machine.world.rng.uniform(30.0, 1500.0), lambda: setattr(node, "cut", False))


def provider_timer_fails(_: Machine, node: Node) -> None:
    """One of the two terminators fails; the other is assumed sound, so this is not combined with a hung guest."""
    node.ttl_works = False


def wall_clock_jumps(machine: Machine, t: float) -> None:
    """Ahead by any time, or back so far that the ledger's newest entry shows it; counts at the next start."""
    rng = machine.world.rng
    jump = rng.uniform(10.0, 7200.0) if rng.random() < 0.5 else -t - rng.uniform(3600.0, 86_400.0)
    machine.world.at(t, lambda: setattr(machine, "skew_seconds", jump))


def price_moves(machine: Machine, t: float) -> None:
    """Up to p-hat and down again, where the price is not fixed at rent."""
    if machine.cloud.price_is_fixed:
        return
    rng = machine.world.rng
    for offer in machine.offers:
        low, high = float(offer.usd_per_hour), worst_usd(machine, offer)
        set_price(machine, t, offer.offer_id, rng.uniform(low, high))
        set_price(machine, t + rng.uniform(60.0, 3600.0), offer.offer_id, rng.uniform(low, high))


def price_peaks_unseen(machine: Machine, t: float) -> None:
    """Up to p-hat just while the supervisor sees neither provider nor store."""
    seconds = machine.world.rng.uniform(200.0, 500.0)

    def change(by: int) -> None:
        machine.cloud.trouble.down += by
        machine.door.down += by

    interval(machine, t, seconds, lambda: change(1), lambda: change(-1))
    for offer in [] if machine.cloud.price_is_fixed else machine.offers:
        set_price(machine, t + 1.0, offer.offer_id, worst_usd(machine, offer))
        set_price(machine, t + seconds - 1.0, offer.offer_id, float(offer.usd_per_hour))


def price_above_bound(machine: Machine, t: float) -> None:
    for offer in machine.offers:
        set_price(machine, t, offer.offer_id, worst_usd(machine, offer) * machine.world.rng.uniform(1.1, 3.0))


def kill_late(machine: Machine, node: Node) -> None:
    """The guest hangs, and the provider's limit acts later than kappa."""
    node.hung = True
    node.kill_late(machine.world.rng.uniform(60.0, 600.0))


def create_late(machine: Machine, t: float) -> None:
    """What lives is taken, and the create that follows takes effect after everybody has given it up."""
    seconds = machine.world.rng.uniform(150.0, 400.0)

    def take() -> None:
        machine.cloud.trouble.create_late_seconds = seconds
        for node in machine.cloud.alive():
            machine.cloud.end(node)

    machine.world.at(t, take)


def worst_usd(machine: Machine, offer: Offer) -> float:
    return float(worst_price(offer, machine.cloud.terms.price_bound))


def set_price(machine: Machine, t: float, offer_id: str, price: float) -> None:
    changes = machine.cloud.prices[offer_id]
    changes.append((t, price))
    changes.sort()


HELD: dict[str, Install] = {
    "supervisor killed": supervisor_killed,
    "supervisor lost": supervisor_lost,
    "supervisor held up": supervisor_held_up,
    "two supervisors": another_supervisor(elsewhere=False),
    "supervisor moves": supervisor_moves,
    "two machines": another_supervisor(elsewhere=True),
    "network cut": network_cut,
    "node cut off": on_node(node_cut_off),
    "provider down": counted(lambda item: item.cloud.trouble, "down", 20.0, 1200.0),
    "provider slow": slow,
    "provider hides nodes": counted(lambda item: item.cloud.trouble, "hides", 5.0, MAX_LIE_SECONDS),
    "provider lags": list_lags,
    "create's reply lost": reply_lost,
    "create doubled": counted(lambda item: item.cloud.trouble, "doubled", 60.0, 2400.0),
    "terminate does not take": counted(lambda item: item.cloud.trouble, "deaf_to_stop", 30.0, 1800.0),
    "no capacity": counted(lambda item: item.cloud.trouble, "full", 30.0, 900.0),
    "preempted": on_node(preempted),
    "preempted with notice": on_node(preempted_with_notice),
    "guest hangs": on_node(guest_hangs),
    "guest reboots": on_node(guest_reboots),
    "guard killed": on_node(guard_killed),
    "provider timer fails": on_node(provider_timer_fails),
    "wall clock jumps": wall_clock_jumps,
    "price moves": price_moves,
    "price peaks unseen": price_peaks_unseen,
    "store down": counted(lambda item: item.door, "down", 10.0, 900.0),
    "store loses writes": counted(lambda item: item.door, "losing_writes", 10.0, 900.0),
    "store's replies lost": counted(lambda item: item.door, "losing_replies", 10.0, 300.0),
    "grants repeated": grants_repeated,
    "store reads stale": counted(lambda item: item.store, "stale_reads", 10.0, 900.0),
}
BROKEN: dict[str, Install] = {
    "price above bound": price_above_bound,
    "kill late": on_node(kill_late),
    "create late": create_late,
    "hangs unarmed": hangs_unarmed,
}
NEVER_TOGETHER = {frozenset({"guest hangs", "provider timer fails"}), frozenset({"kill late", "provider timer fails"})}


def disk_full(machine: Machine, t: float) -> None:
    seconds = machine.world.rng.uniform(30.0, 900.0)

    def pages(count: int) -> None:
        machine.db.execute(f"PRAGMA max_page_count = {count}")

    interval(machine, t, seconds, lambda: pages(1), lambda: pages(1_000_000))


HELD["disk full"] = disk_full
