"""Options of a run: what an earlier version wrote is read, what a later one wrote is refused in one line."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from orchestrator.runs.options import LossBelief, OptionsUnreadable, RunOptions

WRITTEN_BEFORE_OPTIONS_WERE_TYPED = """
{"allow_unguarded": false, "backend": "local", "checkpoint_interval_seconds": 14.25, "expected_usd": {
"aws/us-east-1/L4x1/g6.xlarge/spot": "9.104300000000001"}, "losses": {"losses": 2.0, "node_hours": 4.0,
"restart_seconds": 25.0, "saved_at_notice": 0.9, "time_scale": 60.0}, "market": "/home/me/.slm/runs/demo-1/market",
"offers": [{"accelerator": "L4", "as_of": "2026-07-20", "cloud": "aws", "gpu_memory_gib": 24.0, "gpus_per_node": 1,
"instance_type": "g6.xlarge", "on_demand_usd_per_hour": "0.8048", "region": "us-east-1", "source": "reference",
"spot": true, "usd_per_hour": "0.3219", "zone": null}], "owners": ["1f2e3d"], "planned_speed": {
"aws/us-east-1/L4x1/g6.xlarge/spot": 9000.0}, "single_supervisor": false, "store": "s3://bucket/runs/slm-1f2e3d-demo-1"}
"""


def test_options_written_before_they_were_typed_are_read() -> None:
    options = RunOptions.from_json(WRITTEN_BEFORE_OPTIONS_WERE_TYPED)
    (offer,) = options.offers
    assert options.is_local and options.checkpoint_interval_seconds == 14.25
    assert (offer.offer_id, offer.usd_per_hour) == ("aws/us-east-1/L4x1/g6.xlarge/spot", Decimal("0.3219"))
    assert options.expected_usd[offer.offer_id] == Decimal("9.104300000000001")
    assert options.losses == LossBelief(2.0, 4.0, saved_at_notice=0.9, restart_seconds=25.0, time_scale=60.0)
    assert (options.owners, options.store) == (("1f2e3d",), "s3://bucket/runs/slm-1f2e3d-demo-1")


def test_they_are_written_as_they_were_beside_fields_that_are_new() -> None:
    before = json.loads(WRITTEN_BEFORE_OPTIONS_WERE_TYPED)
    assert json.loads(RunOptions.from_json(WRITTEN_BEFORE_OPTIONS_WERE_TYPED).to_json()) == {
        **before,
        "precision_reason": None,
    }


def test_what_an_older_run_lacks_has_a_default() -> None:
    assert RunOptions.from_json('{"backend": "sky", "offers": []}') == RunOptions("sky")


def test_a_run_that_never_finishes_in_its_market_is_expected_to_cost_without_end() -> None:
    options = RunOptions("sky", expected_usd={"a": Decimal("Infinity")})
    assert RunOptions.from_json(options.to_json()) == options


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"backend": "sky", "colour": 1}', r"\(colour: unexpected .*another version of slm wrote them"),
        ('{"offers": []}', r"\(backend: field required\)"),
        ("{", r"are no JSON: .*; bring back a copy"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(OptionsUnreadable, match=said):
        RunOptions.from_json(text)
