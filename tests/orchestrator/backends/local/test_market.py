"""The spot market's schedule and ledger, without processes."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest

from cost.errors import UserError
from orchestrator.backends.local.records import (
    Anchor,
    Journal,
    MarketBroken,
    Node,
    State,
    load_state,
    save_state,
    true_bill,
)
from orchestrator.backends.local.schedule import CapacityTrace, Hazard, Moment, NodeView, Script, Spot, load, resolve

START = Moment(0.0, 0.0)


def view(rank: int, *, ordinal: int = 1, started: Moment = START) -> NodeView:
    return NodeView(f"node-{rank}-{ordinal}", rank, ordinal, started)


def taken(spot: Spot, now: Moment, *nodes: NodeView) -> list[tuple[str, float]]:
    return [(strike.instance_id, strike.notice_seconds) for strike in spot.strikes(now, nodes)]


# -- hazard ----------------------------------------------------------------------------------------


def test_a_calm_market_takes_nothing_and_has_no_end_of_nodes() -> None:
    calm = load("calm", seed=1, time_scale=60.0)
    assert taken(calm, Moment(1e9, 1e9), view(0)) == []
    assert calm.capacity(START) is None


def test_lifetimes_agree_in_a_replay_and_differ_between_nodes() -> None:
    first, again, other = (load("hazard:2", seed=seed, time_scale=60.0) for seed in (7, 7, 8))
    assert isinstance(first, Hazard) and isinstance(again, Hazard) and isinstance(other, Hazard)
    fates = [first.fate(rank, ordinal) for rank in (0, 1) for ordinal in (1, 2)]
    assert fates == [again.fate(rank, ordinal) for rank in (0, 1) for ordinal in (1, 2)]
    assert len({lifetime for lifetime, _ in fates}) == 4
    assert other.fate(0, 1) != first.fate(0, 1)


def test_the_mean_lifetime_is_one_over_the_hazard_and_half_are_announced() -> None:
    hazard = Hazard(2.0, seed=0, time_scale=1.0)
    fates = [hazard.fate(0, ordinal) for ordinal in range(4000)]
    assert sum(lifetime for lifetime, _ in fates) / 4000 == pytest.approx(1800, rel=0.05)
    assert sum(notice > 0 for _, notice in fates) / 4000 == pytest.approx(0.5, abs=0.03)


def test_a_node_is_taken_when_its_billed_time_is_over_and_told_real_seconds_before() -> None:
    hazard = Hazard(1.0, seed=0, time_scale=60.0, notice_share=1.0, notice_seconds=10.0)
    lifetime, notice = hazard.fate(0, 1)
    assert notice == 10.0
    started = Moment(5.0, 300.0)
    before = Moment(0.0, 300.0 + lifetime - 10.5 * 60)
    assert taken(hazard, before, view(0, started=started)) == []
    after = Moment(0.0, 300.0 + lifetime - 9.0 * 60)
    ((name, seconds),) = taken(hazard, after, view(0, started=started))
    assert name == "node-0-1"
    assert seconds == pytest.approx(9.0)


def test_options_say_how_often_and_how_long_before_notice_is_given() -> None:
    assert load("hazard:3,notice=1,notice_seconds=25", seed=0, time_scale=1.0) == Hazard(3.0, 0, 1.0, 1.0, 25.0)


# -- traces of capacity ----------------------------------------------------------------------------


def test_a_trace_of_counts_limits_and_takes(tmp_path: Path) -> None:
    path = tmp_path / "zone.json"
    path.write_text(json.dumps({"metadata": {"gap_seconds": 60}, "data": [2, 1, 0, 2]}))
    spot = load(f"trace:{path},notice=0", seed=0, time_scale=1.0)
    assert [spot.capacity(Moment(0.0, billed)) for billed in (0, 59, 60, 120, 180, 239, 240, 300)] == [
        2, 2, 1, 0, 2, 2, 2, 1,
    ]  # fmt: skip
    assert taken(spot, Moment(0.0, 30.0), view(0), view(1)) == []
    assert len(taken(spot, Moment(0.0, 60.0), view(0), view(1))) == 1
    assert len(taken(spot, Moment(0.0, 120.0), view(0), view(1))) == 2
    several = load(f"trace:{path},times=4", seed=0, time_scale=1.0)
    assert several.capacity(Moment(0.0, 60.0)) == 4


def test_whom_a_trace_takes_is_seeded(tmp_path: Path) -> None:
    path = tmp_path / "zone.json"
    path.write_text(json.dumps({"metadata": {"gap_seconds": 60}, "data": [1]}))
    nodes = [view(rank) for rank in range(8)]
    victims = {
        seed: [name for name, _ in taken(load(f"trace:{path}", seed=seed, time_scale=1.0), START, *nodes)]
        for seed in range(5)
    }
    assert victims[0] == [name for name, _ in taken(load(f"trace:{path}", seed=0, time_scale=1.0), START, *nodes)]
    assert len({tuple(names) for names in victims.values()}) > 1
    assert all(len(names) == 7 for names in victims.values())


def test_a_trace_of_single_nodes_counts_them_from_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "group.csv"
    path.write_text("480000,add,a\n480000,add,b\n540000,remove,a\n600000,add,c\n")
    spot = load(f"trace:{path}", seed=0, time_scale=1.0)
    assert [spot.capacity(Moment(0.0, billed)) for billed in (0, 59, 60, 120)] == [2, 2, 1, 2]


SHARED_TRACES = Path(__file__).parents[5] / "shared" / "data" / "traces"


@pytest.mark.skipif(not SHARED_TRACES.is_dir(), reason="the public spot traces are not beside this checkout")
def test_real_traces_are_understood() -> None:
    for path in SHARED_TRACES.rglob("*.*"):
        if path.suffix in (".json", ".csv"):
            spot = load(f"trace:{path}", seed=0, time_scale=1.0)
            assert isinstance(spot, CapacityTrace)
            assert max(spot.counts) >= 1
            assert spot.length > 3600


# -- our own events --------------------------------------------------------------------------------


def events(tmp_path: Path, text: str) -> Spot:
    path = tmp_path / "events.yaml"
    path.write_text(text)
    return load(f"trace:{path}", seed=0, time_scale=60.0)


def test_events_strike_in_real_seconds_and_wait_for_their_node(tmp_path: Path) -> None:
    spot = events(
        tmp_path,
        """
        - {at_seconds: 20, action: notice, rank: 0, notice_seconds: 15, back_seconds: 3}
        - {at_seconds: 10, action: kill, rank: 1, min_age_seconds: 8}
        """,
    )
    assert taken(spot, Moment(9.9, 1e6), view(0), view(1)) == []
    assert taken(spot, Moment(10.0, 0.0), view(0), view(1)) == [("node-1-1", 0.0)]
    assert taken(spot, Moment(10.0, 0.0), view(0)) == []
    assert taken(spot, Moment(12.0, 0.0), view(1, started=Moment(5.0, 0.0))) == []
    (strike,) = spot.strikes(Moment(20.0, 0.0), [view(0)])
    assert (strike.notice_seconds, strike.back_seconds) == (15, 3)
    assert spot.capacity(Moment(99.0, 0.0)) is None


def test_events_limit_what_can_be_started(tmp_path: Path) -> None:
    spot = events(
        tmp_path,
        "events: [{at_seconds: 5, action: capacity, capacity: 1}, {at_seconds: 9, action: capacity, capacity: 3}]",
    )
    assert [spot.capacity(Moment(real, 0.0)) for real in (0, 5, 8.9, 9)] == [None, 1, 1, 3]
    assert taken(spot, Moment(6.0, 0.0), view(0), view(1)) == []


def test_the_demo_kills_one_node_and_announces_another() -> None:
    assert resolve("trace:demo").endswith("tasks/recipe/recipes/markets/demo.yaml")
    spot = load("trace:demo", seed=0, time_scale=1.0)
    assert isinstance(spot, Script)
    assert [event.action for event in spot.events] == ["kill", "notice"]


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("market", "message"),
    [
        ("wild", "no market 'wild'; write calm, hazard:PER_HOUR"),
        ("hazard:often", "no market 'hazard:often'"),
        ("hazard:-1", "no market 'hazard:-1'"),
        ("hazard:nan", "no market 'hazard:nan'"),
        ("trace:", "no market 'trace:'"),
        ("hazard:1,notise=1", "no market option 'notise'; there are notice, notice_seconds and times"),
        ("hazard:1,notice=often", "market option notice=often: 'often' is no number"),
        ("trace:/no/such/file.json", "cannot read the market trace /no/such/file.json: No such file"),
    ],
)
def test_a_wrong_market_is_named(market: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(market, seed=0, time_scale=1.0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "cannot understand the market trace"),
        ("a.yaml", "- [", "cannot understand the market trace"),
        ("a.json", '{"metadata": {"gap_seconds": 60}, "data": []}', "it is empty"),
        ("a.csv", "0,started,a", "'started' is neither add nor remove"),
        ("a.csv", "", "it is empty"),
        ("a.json", '[{"at_seconds": 1, "action": "explode"}]', "action 'explode' is none of kill, notice, capacity"),
        ("a.json", '[{"at_seconds": 1, "action": "notice"}]', "needs notice_seconds above 0"),
        ("a.json", '[{"at_seconds": 1, "action": "capacity"}]', "needs the field capacity"),
        ("a.json", '[{"at_second": 1, "action": "kill"}]', "an event has no field 'at_second'"),
        ("a.json", '"text"', "it is no list of events"),
    ],
)
def test_a_wrong_trace_is_explained(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load(f"trace:{tmp_path / name}", seed=0, time_scale=1.0)


# -- ledger -----------------------------------------------------------------------------------------


def node(name: str = "a", **changes: object) -> Node:
    fields: dict[str, object] = {
        "instance_id": name,
        "lease_id": "lease",
        "run_id": "run",
        "rank": 0,
        "ordinal": 1,
        "usd_per_hour": "3.00",
        "node_dir": "/nowhere",
        "tmp_dir": "/nowhere",
        "started": (0.0, 0.0),
        "started_at": "2026-11-01T00:00:00+00:00",
        "ttl_at": 10.0,
    }
    return Node(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    state = State(anchor=Anchor("boot", 1.0, 2.0, 3.0, 60.0), nodes=[node(guard=(7, "start"), ended=(1.0, 60.0))])
    save_state(tmp_path, state)
    assert load_state(tmp_path) == state


def test_a_broken_state_is_told(tmp_path: Path) -> None:
    (tmp_path / "instances.json").write_text('{"anchor": null}')
    with pytest.raises(MarketBroken, match=r"instances.json cannot be read"):
        load_state(tmp_path)


def test_the_bill_is_time_times_price_whatever_else_was_written_twice(tmp_path: Path) -> None:
    save_state(tmp_path, State(anchor=Anchor("boot", 100.0, 0.0, 0.0, 60.0)))
    bill = Journal(tmp_path / "bill.jsonl")
    for name, price, start in (("a", "3.00", 0.0), ("b", "1.50", 1800.0), ("a", "3.00", 0.0)):
        bill.add(event="start", instance_id=name, usd_per_hour=price, billed_seconds=start)
    bill.add(event="end", instance_id="a", billed_seconds=3600.0)
    bill.add(event="end", instance_id="a", billed_seconds=9999.0)
    bill.flush()
    # a: one hour at $3.00; b lives: from half an hour to two hours (120 real seconds x 60) at $1.50.
    assert true_bill(tmp_path, boottime=220.0) == Decimal("5.25")


def test_a_journal_keeps_what_could_not_be_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "missing" / "bill.jsonl")
    journal.add(event="start")
    with pytest.raises(OSError, match="No such file"):
        journal.flush()
    (tmp_path / "missing").mkdir()
    journal.flush()
    assert [line["event"] for line in journal.lines()] == ["start"]


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "bill.jsonl"
    path.write_text('{"event": "start"}\n{"event": "en')
    journal = Journal(path)
    journal.add(event="end")
    journal.flush()
    assert [line["event"] for line in journal.lines()] == ["start", "end"]
