"""What carries our name and is in nobody's ledger is ended, and nothing else is touched."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.backends.fake import FakeBackend
from orchestrator.clock import ManualClock
from orchestrator.supervisor.reconcile import end_unknown_instances
from tests.support.backend_contract import lease_of


def a_cloud(*names: str) -> FakeBackend:
    backend = FakeBackend(ManualClock())
    for name in names:
        backend.start(replace(lease_of(name), first_grant_seconds=1e6), ["train"])
    return backend


def test_only_strangers_of_ours_are_ended() -> None:
    backend = a_cloud("slm-me-run-1-1", "slm-me-run-2-1", "slm-you-run-1-1", "web-server")
    messages = end_unknown_instances(backend, {"slm-me-run-1-1"}, owner="me")
    assert messages == ["ended 2 nodes of slm-me-run-2-1, which the ledger does not know as open"]
    assert {item.lease_id for item in backend.list_alive()} == {"slm-me-run-1-1", "slm-you-run-1-1", "web-server"}


def test_an_interface_that_does_not_answer_is_told() -> None:
    backend = a_cloud("slm-me-run-1-1")
    backend.fail_next = 1
    messages = end_unknown_instances(backend, set(), owner="me")
    assert messages == ["could not end slm-me-run-1-1: the fake cloud did not answer"]
