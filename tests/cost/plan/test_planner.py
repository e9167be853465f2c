"""Plans over a handful of offers with prices to check by hand, and over the reference table."""

from __future__ import annotations

from decimal import Decimal

import pytest

from cost.errors import UserError
from cost.market.clouds import cloud_terms
from cost.market.offers import Offer, load_reference_offers
from cost.market.preemption import Hazard, Hazards
from cost.performance.layouts import NoLayout, Placement, fastest_layout, machine, placed
from cost.performance.throughput import default_calibration
from cost.performance.workload import Workload
from cost.plan.bill import make_bill, rhythm, worst_usd_per_hour
from cost.plan.planner import Emulation, Market, Plan, make_plan
from tests.support.builders import make_offer

HUNDRED = Decimal(100)


def offer(
    price: str,
    *,
    cloud: str = "verda",
    region: str = "here",
    accelerator: str = "H100-SXM",
    gpus: int = 1,
    memory: float = 80.0,
    spot: bool = False,
    on_demand: str | None = None,
) -> Offer:
    usual = None if on_demand is None else Decimal(on_demand)
    return make_offer(
        cloud=cloud,
        region=region,
        instance_type="type",
        accelerator=accelerator,
        gpus_per_node=gpus,
        gpu_memory_gib=memory,
        spot=spot,
        usd_per_hour=price,
        on_demand_usd_per_hour=usual,
    )


def small(**changes: object) -> Workload:
    shape: dict[str, object] = {
        "num_tokens": 2_000_000_000,
        "num_layers": 12,
        "width": 768,
        "num_heads": 12,
        "hidden_size": 2048,
        "vocab_size": 32768,
        "sequence_length": 1024,
        "global_batch_size": 512,
    }
    return Workload.from_shape(**(shape | changes))  # type: ignore[arg-type]


def plan(*offers: Offer, work: Workload | None = None, **options: object) -> Plan:
    return make_plan(work or small(), offers, **({"budget_usd": HUNDRED} | options))  # type: ignore[arg-type]


def test_a_bill_by_hand() -> None:
    # 10 h of training at $2/h, no losses: 10 h and 390 s of start-up are paid; 1e9 parameters are 12 GB.
    bill = make_bill(
        offer("2"),
        cloud_terms("verda"),
        Hazard(0, 1.0, "none"),
        rhythm(1_000_000_000, cloud_terms("verda"), num_nodes=1, world_size=1),
        num_nodes=1,
        num_params=1_000_000_000,
        train_hours=10.0,
    )
    assert bill is not None
    usd = {line.name: line.usd for line in bill.lines}
    assert usd["compute"] == Decimal(20)
    assert usd["start-up"] == Decimal("0.216667")
    # One save in the whole run: 0.2 s + 12 GB at 10 GB/s.
    assert usd["checkpoints"] == Decimal("0.000778")
    assert usd["preemptions"] == 0
    # 100 GB at $0.10 and 36 GB at $0.015 a month of 730 h, for 10.11 h.
    assert usd["disks"] == pytest.approx(Decimal("0.138475"), abs=Decimal("0.00001"))
    assert usd["run store"] == pytest.approx(Decimal("0.007478"), abs=Decimal("0.00001"))
    assert bill.total_usd == sum(usd.values())


def test_preempted_hours_are_paid_for() -> None:
    quiet, busy = (
        plan(offer("2", spot=True), market=Market(hazards=Hazards(fixed_per_node_hour=0.0))),
        plan(offer("2", spot=True), market=Market(hazards=Hazards(fixed_per_node_hour=1.0))),
    )
    assert quiet.best is not None
    assert busy.best is not None
    assert quiet.best.expected_preemptions == 0
    assert busy.best.expected_preemptions == pytest.approx(busy.best.bill.waste.losses * busy.best.train_hours)
    assert busy.best.total_usd > quiet.best.total_usd
    assert busy.best.checkpoint_interval_seconds < quiet.best.checkpoint_interval_seconds


def test_the_worst_price_is_on_demand_or_a_multiple() -> None:
    assert worst_usd_per_hour(offer("1", spot=True, on_demand="3")) == 3
    assert worst_usd_per_hour(offer("1", spot=True)) == 4
    assert worst_usd_per_hour(offer("1")) == 1
    best = plan(offer("1", spot=True, on_demand="3")).best
    assert best is not None
    assert best.worst_case_usd > 3 * best.bill.lines[0].usd


def test_the_cheaper_of_two_equal_machines_wins() -> None:
    found = plan(offer("3", region="dear"), offer("2", region="cheap"))
    assert [estimate.offer.region for estimate in found.ranked] == ["cheap", "dear"]


def test_hours_and_dollars_may_disagree() -> None:
    item, eight = offer("2", region="one"), offer("20", region="eight", gpus=8)
    assert plan(item, eight, objective="dollars").best.offer is item  # type: ignore[union-attr]
    assert plan(item, eight, objective="hours").best.offer is eight  # type: ignore[union-attr]


def test_every_offer_is_ranked_or_rejected_with_a_reason() -> None:
    offers = load_reference_offers().offers
    found = make_plan(small(), offers, budget_usd=HUNDRED, clouds=["verda", "aws", "runpod"], spot=True, max_nodes=2)
    assert len(found.ranked) + len(found.rejected) == len(offers)
    assert {id(estimate.offer) for estimate in (*found.ranked, *found.rejected)} == {id(offer) for offer in offers}
    assert all(rejection.reason for rejection in found.rejected)
    reasons = {rejection.reason for rejection in found.rejected}
    assert {"cloud gcp was not asked for", "on-demand was not asked for", "V100 has no bf16 units"} <= reasons


def test_dollars_are_the_sum_of_the_lines_shown() -> None:
    found = make_plan(small(), load_reference_offers().offers, budget_usd=HUNDRED)
    assert len(found.ranked) > 100
    for estimate in found.ranked:
        assert sum((line.usd for line in estimate.lines), Decimal(0)) == estimate.total_usd


def test_a_model_too_large_for_a_device_is_refused_with_the_numbers() -> None:
    huge = small(num_layers=96, width=12288, num_heads=96, hidden_size=4 * 12288, global_batch_size=8)
    found = plan(offer("2"), work=huge)
    assert found.best is None
    assert "GiB per device; H100-SXM has 80 GiB, of which 73.6 GiB are usable" in found.rejected[0].reason


def test_a_layout_never_needs_more_memory_than_the_device_has() -> None:
    for estimate in make_plan(small(), load_reference_offers().offers, budget_usd=HUNDRED, max_nodes=4).ranked:
        assert estimate.peak_memory_gib <= estimate.offer.gpu_memory_gib


def test_more_devices_than_sequences_is_refused() -> None:
    found = plan(offer("2", gpus=8), work=small(global_batch_size=4))
    assert found.rejected[0].reason == "the cluster has 8 devices, but a step has only 4 sequences"


def test_every_card_computes_in_fp32_but_not_every_one_in_bf16() -> None:
    cards = (offer("2", accelerator="L40S", memory=48.0), offer("2", accelerator="V100", memory=16.0))
    assert len(plan(*cards, work=small(precision="fp32")).ranked) == 2
    assert [rejection.reason for rejection in plan(*cards).rejected] == ["V100 has no bf16 units"]


def test_over_budget_says_how_many_tokens_the_budget_buys() -> None:
    rich, poor = plan(offer("2")), plan(offer("2"), budget_usd=Decimal(1))
    assert rich.affordable
    assert not poor.affordable
    assert poor.best is not None
    assert 0 < poor.best.num_tokens < small().num_tokens
    assert rich.best is not None
    assert poor.best.predicted.nats_per_token > rich.best.predicted.nats_per_token


def test_a_deadline_prefers_what_meets_it() -> None:
    item, eight = offer("2", region="one"), offer("30", region="eight", gpus=8)
    assert plan(item, eight).best.offer is item  # type: ignore[union-attr]
    hours = plan(item).best.hours  # type: ignore[union-attr]
    found = plan(item, eight, deadline_hours=hours / 2)
    assert found.best is not None
    assert found.best.offer is eight
    assert [estimate.within_deadline for estimate in found.ranked] == [True, False]


def test_emulated_nodes_bill_real_time_by_the_scale() -> None:
    work = small(num_tokens=512 * 1024)
    slow = plan(offer("2"), work=work, emulation=Emulation(2, 1.0, 4, tokens_per_second=1024.0)).best
    fast = plan(offer("2"), work=work, emulation=Emulation(2, 60.0, 4, tokens_per_second=1024.0)).best
    assert slow is not None
    assert fast is not None
    # 524,288 tokens at 1,024 a second are 512 s.
    assert slow.train_hours == pytest.approx(512 / 3600)
    assert fast.train_hours == pytest.approx(60 * 512 / 3600)
    assert fast.bill.lines[0].usd == pytest.approx(Decimal("17.066667"))
    assert slow.layout.gpus_per_node == 1


def test_emulated_speed_is_that_of_this_machine_for_every_offer() -> None:
    found = plan(offer("2"), offer("3", accelerator="V100", memory=16.0), emulation=Emulation(2, 60.0, 4))
    assert len({estimate.tokens_per_second for estimate in found.ranked}) == 1
    assert [estimate.offer.accelerator for estimate in found.ranked] == ["H100-SXM", "V100"]


def test_requests_that_make_no_sense_are_named() -> None:
    with pytest.raises(UserError, match="no objective 'speed'; choose one of usd_per_param"):
        plan(offer("2"), objective="speed")
    with pytest.raises(UserError, match="nodes from 3 to 2 is not a valid range"):
        plan(offer("2"), min_nodes=3, max_nodes=2)
    with pytest.raises(UserError, match="no accelerator 'H9000' in the hardware table"):
        plan(offer("2"), gpus=["H9000"])


def test_a_machine_without_an_offer_is_estimated_too() -> None:
    work = small()
    found = fastest_layout(work, machine("H100-SXM", gpus_per_node=8), default_calibration())
    assert isinstance(found, Placement)
    assert found.layout.world_size == 8
    same = placed(work, machine("H100-SXM", gpus_per_node=8), found.layout, default_calibration())
    assert same == found
    tight = fastest_layout(work, machine("H100-SXM", memory_gib=2.0), default_calibration())
    assert isinstance(tight, NoLayout)
    assert "H100-SXM has 2 GiB, of which 1.8 GiB are usable" in tight.reason


def test_each_offer_gets_the_faster_precision_that_its_card_has() -> None:
    both = Market(precisions=("bf16", "fp32"))
    new, old = offer("2"), offer("0.3", accelerator="V100", memory=16.0)
    found = plan(new, old, market=both)
    chosen = {estimate.offer.accelerator: estimate for estimate in found.ranked}
    assert {name: offer.layout.precision for name, offer in chosen.items()} == {"H100-SXM": "bf16", "V100": "fp32"}
    for estimate in found.ranked:
        (alone,) = plan(estimate.offer, work=small(precision=estimate.layout.precision)).ranked
        assert (alone.total_usd, alone.placement) == (estimate.total_usd, estimate.placement)
        assert estimate.workload.precision == estimate.layout.precision
    assert found.workload is found.ranked[0].workload


def test_where_no_precision_fits_the_reason_is_the_memory() -> None:
    huge = small(num_layers=96, width=12288, num_heads=96, hidden_size=4 * 12288)
    found = plan(offer("0.3", accelerator="V100", memory=16.0), work=huge, market=Market(precisions=("bf16", "fp32")))
    assert "GiB per device; V100 has 16 GiB" in found.rejected[0].reason


def test_the_local_cloud_is_planned_in_the_faster_precision_too() -> None:
    emulation = Emulation(num_cores=2.0, micro_batch_size=4)
    speed = {
        name: plan(offer("2"), emulation=emulation, market=Market(precisions=names)).ranked[0].tokens_per_second
        for name, names in {"bf16": ("bf16",), "fp32": ("fp32",), "both": ("bf16", "fp32")}.items()
    }
    assert speed["both"] == max(speed["bf16"], speed["fp32"]) > min(speed["bf16"], speed["fp32"])
