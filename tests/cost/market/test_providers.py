"""Profiles of the clouds: complete, sourced, and refused where nothing would end a hung node."""

from __future__ import annotations

import csv
from dataclasses import replace
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path

import pytest

from cost.market.clouds import cloud_terms
from cost.market.offers import load_reference_offers
from cost.market.providers import Armed, PriceBound, TerminatorKind, Ttl, balance_refusal, provider, providers, refusal

DATA = Path(__file__).resolve().parents[3] / "cost" / "data"
GUARDED = {"local", "aws", "gcp", "azure", "runpod", "vast", "cudo", "hyperbolic", "kubernetes", "ssh", "slurm"}


def test_every_cloud_that_skypilot_serves_has_a_profile() -> None:
    spec = find_spec("sky")
    if spec is None or spec.origin is None:
        pytest.skip("SkyPilot is not installed: pip install 'slm-spot[cloud]'")
    modules = {path.stem for path in (Path(spec.origin).parent / "clouds").glob("*.py")} - {"__init__", "cloud"}
    served = {"lambda" if name == "lambda_cloud" else name for name in modules}
    assert served <= set(providers())


def test_every_cloud_of_the_price_table_has_a_profile() -> None:
    assert {offer.cloud for offer in load_reference_offers().offers} <= set(providers())


def test_every_row_says_where_it_comes_from() -> None:
    for name in ("providers.csv", "terminators.csv"):
        for row in csv.DictReader((DATA / name).read_text(encoding="utf-8").splitlines()):
            empty = [key for key, value in row.items() if key.endswith("source") and not value.strip()]
            assert not empty, f"{name}: {row['cloud']} has no {empty}"


def test_no_terminator_stands_under_a_cloud_without_a_profile() -> None:
    rows = csv.DictReader((DATA / "terminators.csv").read_text(encoding="utf-8").splitlines())
    assert {row["cloud"] for row in rows} == {*providers(), "*"}


@pytest.mark.parametrize("name", sorted(providers()))
def test_a_profile_does_not_contradict_itself(name: str) -> None:
    item = provider(name)
    limits = [terminator for terminator in item.terminators if terminator.kind is TerminatorKind.PROVIDER]
    assert (item.ttl is Ttl.NONE) == (not limits), "a time limit is a terminator of the provider's"
    assert all(terminator.survives_hung_guest for terminator in limits)
    assert not any(
        terminator.survives_hung_guest
        for terminator in item.terminators
        if terminator.kind in (TerminatorKind.GUEST, TerminatorKind.KERNEL, TerminatorKind.SKY)
    )
    armed_later = any(terminator.armed is Armed.AFTER_CREATE for terminator in limits)
    assert (item.arm_seconds > 0) == armed_later, "the unguarded window is that of a limit armed after the create"
    if not item.guest_shutdown_stops_billing:
        assert all(terminator.kind is not TerminatorKind.KERNEL for terminator in item.terminators)
    assert item.kill_latency_seconds > 0


def test_notice_and_minimum_are_those_of_the_clouds_table() -> None:
    assert provider("aws").notice_seconds == cloud_terms("aws").notice_seconds == 120
    assert provider("verda").minimum_billed_seconds == cloud_terms("verda").minimum_billed_seconds == 600


def test_the_latency_is_that_of_the_slowest_terminator_that_needs_no_guest() -> None:
    aws = provider("aws")
    slowest = max(terminator.latency_seconds for terminator in aws.terminators if terminator.survives_hung_guest)
    assert aws.kill_latency_seconds == slowest == 120
    assert provider("lambda").kill_latency_seconds == 120, "with nothing else the guard itself is relied on"


def test_these_clouds_may_be_rented_from() -> None:
    assert {
        name for name, each_provider in providers().items() if refusal(each_provider, allow_unguarded=False) is None
    } == GUARDED


def test_a_cloud_where_nothing_ends_a_hung_node_is_refused_with_the_fix() -> None:
    reason = refusal(provider("lambda"), allow_unguarded=False)
    assert reason is not None
    assert "lambda" in reason
    assert "guard (guest)" in reason
    assert "--allow-unguarded" in reason
    assert refusal(provider("lambda"), allow_unguarded=True) is None


def test_one_kind_of_terminator_is_too_few_even_if_it_needs_no_guest() -> None:
    aws = provider("aws")
    at_provider = tuple(terminator for terminator in aws.terminators if terminator.kind is TerminatorKind.PROVIDER)
    limit_only = replace(aws, terminators=at_provider)
    reason = refusal(limit_only, allow_unguarded=False)
    assert reason is not None
    assert "fewer than 2 kinds" in reason


def test_skypilots_daemon_never_counts() -> None:
    aws = provider("aws")
    kept = (TerminatorKind.PROVIDER, TerminatorKind.SKY)
    two = replace(aws, terminators=tuple(terminator for terminator in aws.terminators if terminator.kind in kept))
    assert refusal(two, allow_unguarded=False) is not None


def test_a_cloud_that_nobody_wrote_a_profile_for_has_no_terminator_of_the_providers() -> None:
    unknown = provider("brand-new-cloud")
    assert unknown.name == "brand-new-cloud"
    assert unknown.ttl is Ttl.NONE
    assert unknown.price_bound is PriceBound.UNKNOWN
    assert "brand-new-cloud" in str(refusal(unknown, allow_unguarded=False))


@pytest.mark.parametrize(
    ("balance", "free", "said"),
    [
        (None, "100", "its balance is unknown"),
        ("60", "59.99", "$60.00 lies on the prepaid account"),
        ("60", "60", None),
    ],
)
def test_a_balance_must_fit_into_the_free_budget(balance: str | None, free: str, said: str | None) -> None:
    known = None if balance is None else Decimal(balance)
    reason = balance_refusal(provider("runpod"), balance_usd=known, free_usd=Decimal(free))
    assert (reason is None) == (said is None)
    assert said is None or said in str(reason)


def test_a_balance_matters_only_where_nothing_else_works() -> None:
    assert provider("vast").balance_only
    assert not provider("aws").balance_only
    assert not provider("lambda").balance_only
    assert balance_refusal(provider("aws"), balance_usd=None, free_usd=Decimal(0)) is None


def test_the_page_is_what_the_tables_say() -> None:
    from bench.providers_page import page

    assert (DATA.parents[1] / "docs" / "providers.md").read_text(encoding="utf-8") == page(), (
        "write it anew: python -m bench.providers_page"
    )
