"""GCP's own interfaces through Google's client library: the time limit, quotas, preemption, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost.ledger.leases import Lease
from cost.market.providers import TerminatorKind, provider, refusal
from orchestrator.backends.base import BackendError
from orchestrator.backends.gcp.account import GcpAccount
from orchestrator.backends.gcp.support import GcpSupport, ends_at
from orchestrator.backends.provider_account import ProviderRefused, RefusalReason
from orchestrator.backends.sky.terminators import armed_provider
from tests.support.backend_contract import OFFER, lease_of
from tests.support.gcp_cloud import COMPUTE, JOBS, LEASE, PROJECT, GcpCloud, gcp_cloud, refused

RECORD = {"provider_config": {"project_id": PROJECT, "region": "us-central1"}}


@pytest.fixture
def gcp() -> Iterator[GcpCloud]:
    with gcp_cloud() as made:
        yield made
        assert made.wrong == []


def a_lease(lease_id: str = LEASE, *, num_nodes: int = 1, **offer: Any) -> Lease:
    wanted = replace(OFFER, cloud="gcp", region="us-central1", accelerator="L4", gpus_per_node=2, **offer)
    return replace(lease_of(lease_id, num_nodes=num_nodes), offer=wanted)


def test_a_node_ends_by_its_job_and_not_before_it_is_paid_for(gcp: GcpCloud) -> None:
    ours, also_ours = gcp.start("head"), gcp.start("worker", zone="europe-west4-b")
    foreign = gcp.start("foreign", "slm-abcdef-demo-1-2")
    support = GcpSupport(gcp.account())
    support.limit(RECORD, a_lease(num_nodes=2), 600.0)
    assert len(gcp.jobs) == 2
    gcp.pass_time(599)
    assert set(gcp.instances) == {ours, also_ours, foreign}
    support.limit(RECORD, a_lease(num_nodes=2), 600.0)  # paid for anew: the same jobs, moved
    assert len(gcp.jobs) == 2
    gcp.pass_time(599)
    assert set(gcp.instances) == {ours, also_ours, foreign}
    gcp.pass_time(provider("gcp").kill_latency_seconds)
    assert set(gcp.instances) == {foreign}


def test_a_limit_that_is_due_at_once_acts_within_two_minutes_not_a_year_later(gcp: GcpCloud) -> None:
    gcp.start("head")
    GcpSupport(gcp.account()).limit(RECORD, a_lease(), 0.0)
    gcp.pass_time(120)
    assert gcp.instances == {}


@given(st.timedeltas(timedelta(0), timedelta(days=1000)), st.floats(0, 1e6))
def test_the_minute_is_never_before_the_end_nor_much_after_it(since: timedelta, seconds: float) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC) + since
    at = ends_at(now, seconds)
    late = (at - now).total_seconds() - max(seconds, 60.0)
    assert -1e-3 <= late < 60.0
    assert (at.second, at.microsecond) == (0, 0)


def test_times_are_gcp_s_whatever_this_machine_s_clock_says(gcp: GcpCloud) -> None:
    gcp.now += timedelta(hours=5)
    gcp.start("head")
    GcpSupport(gcp.account()).limit(RECORD, a_lease(), 600.0)
    gcp.pass_time(540)
    assert gcp.instances
    gcp.pass_time(180)
    assert not gcp.instances


def test_a_job_that_would_not_act_in_time_is_said(gcp: GcpCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    gcp.start("head")
    support = GcpSupport(gcp.account())
    support.limit(RECORD, a_lease(), 600.0)
    (job,) = gcp.jobs.values()
    job["state"] = "PAUSED"  # somebody's hand
    support.limit(RECORD, a_lease(), 600.0)
    assert job["state"] == "ENABLED"
    monkeypatch.setattr(gcp, "_told", lambda name: {**gcp.jobs[name], "scheduleTime": "2099-01-01T00:00:00Z"})
    with pytest.raises(BackendError, match=r"does not end it at .* UTC as asked"):
        support.limit(RECORD, a_lease(), 600.0)


def test_jobs_of_a_lease_that_is_gone_are_deleted_and_others_stay(gcp: GcpCloud) -> None:
    head = gcp.start("head")
    gcp.start("other", "slm-abcdef-demo-1-12")  # a name that begins with ours
    support = GcpSupport(gcp.account())
    support.limit(RECORD, a_lease(), 600.0)
    support.limit(RECORD, a_lease("slm-abcdef-demo-1-12"), 600.0)
    gcp.instances.pop(head)
    support.release(RECORD, a_lease())
    support.release(RECORD, a_lease())  # quiet where there is none
    (left,) = gcp.jobs
    assert "slm-end-slm-abcdef-demo-1-12-" in left


def test_a_machine_that_nothing_may_end_is_not_taken_for_armed(gcp: GcpCloud) -> None:
    gcp.start("head", account="")
    with pytest.raises(BackendError, match="no service account"):
        GcpSupport(gcp.account()).limit(RECORD, a_lease(), 600.0)


def test_a_preempted_machine_is_told_from_one_that_ended(gcp: GcpCloud) -> None:
    head = gcp.start("head")
    support = GcpSupport(gcp.account())
    assert support.why_gone(RECORD, a_lease()) == ""
    gcp.preempt(head)
    assert "head was preempted by GCP" in support.why_gone(RECORD, a_lease())
    gcp.refuse[COMPUTE] = (400, refused(400, "bad"))
    assert support.why_gone(RECORD, a_lease()) == ""


def test_a_quota_that_is_too_small_is_said_with_both_numbers(gcp: GcpCloud) -> None:
    gcp.quotas = [("NVIDIA_L4_GPUS", 8.0, 0.0), ("PREEMPTIBLE_NVIDIA_L4_GPUS", 4.0, 1.0)]
    support = GcpSupport(gcp.account())
    assert support.refusal(a_lease(num_nodes=2, spot=False)) is None
    assert support.refusal(a_lease(num_nodes=1, spot=True)) is None
    said = support.refusal(a_lease(num_nodes=2, spot=True))
    assert said is not None
    assert "GCP allows 4 PREEMPTIBLE_NVIDIA_L4_GPUS in us-central1, 1 are used and 4 are needed" in said


@pytest.mark.parametrize(
    ("reply", "reason", "said"),
    [
        (
            (403, refused(403, "has not been used in project", "SERVICE_DISABLED")),
            RefusalReason.DISABLED,
            f"gcloud services enable cloudscheduler.googleapis.com --project {PROJECT}",
        ),
        ((403, refused(403, "denied", "IAM_PERMISSION_DENIED")), RefusalReason.DENIED, "cloudscheduler.admin"),
        ((403, {"strange": 1}), RefusalReason.DENIED, "do not permit it"),
        ((401, refused(401, "invalid credentials")), RefusalReason.EXPIRED, "gcloud auth application-default login"),
        ((400, refused(400, "bad")), RefusalReason.OTHER, "GCP refused"),
    ],
)
def test_a_refusal_of_gcp_names_the_fix(
    gcp: GcpCloud, reply: tuple[int, dict[str, Any]], reason: RefusalReason, said: str
) -> None:
    gcp.start("head")
    gcp.refuse[JOBS] = reply
    with pytest.raises(ProviderRefused) as caught:
        GcpSupport(gcp.account()).limit(RECORD, a_lease(), 600.0)
    assert caught.value.reason is reason
    assert said in str(caught.value)


def test_without_cloud_scheduler_nothing_is_rented(gcp: GcpCloud) -> None:
    gcp.refuse[JOBS] = (403, refused(403, "not used", "SERVICE_DISABLED"))
    support = GcpSupport(gcp.account())
    said = support.refusal(a_lease())
    assert said is not None
    assert said.startswith("nothing would end a hung node:")
    gcp.refuse.clear()
    assert support.refusal(a_lease()) is None  # switched on meanwhile


def test_no_credentials_and_no_network_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, gcp: GcpCloud
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "missing.json"))
    with pytest.raises(
        ProviderRefused, match=r"no valid credentials for GCP .* run: gcloud auth application-default login"
    ):
        GcpSupport(GcpAccount()).limit({}, a_lease(), 600.0)
    away = GcpAccount(gcp.account()._credentials, PROJECT, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr("orchestrator.backends.gcp.account.NUM_RETRIES", 0)
    with pytest.raises(ProviderRefused, match="GCP does not answer"):
        GcpSupport(away).limit(RECORD, a_lease(), 600.0)


def test_with_the_job_a_hung_node_on_gcp_ends_so_it_may_be_rented() -> None:
    gcp = armed_provider(provider("gcp"), {"gcp": GcpSupport()})
    assert refusal(gcp, allow_unguarded=False) is None
    assert [terminator.name for terminator in gcp.terminators if terminator.kind is TerminatorKind.PROVIDER] == [
        "cloud-scheduler-delete"
    ]
