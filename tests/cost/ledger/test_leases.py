"""The name of a lease holds its owner, its run and its attempt."""

from __future__ import annotations

from cost.ledger.leases import lease_id_for, run_id_from_lease_id


def test_the_run_is_read_from_the_name_of_its_lease() -> None:
    assert lease_id_for("abcdef", "my-run.5B", 12) == "slm-abcdef-my-run.5B-12"
    assert run_id_from_lease_id("slm-abcdef-my-run.5B-12") == "my-run.5B"


def test_a_name_that_is_no_lease_has_no_run() -> None:
    assert run_id_from_lease_id("web-server") == ""
