"""What the accounts of all clouds share: the provider's clock, its refusals and its paged lists."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest

from orchestrator.backends.aws.account import AwsAccount
from orchestrator.backends.gcp.account import GcpAccount
from orchestrator.backends.provider_account import ProviderAccount, RefusalReason, all_pages

NOON = datetime(2026, 11, 27, 12, tzinfo=UTC)
ONE_O_CLOCK = "Fri, 27 Nov 2026 13:00:00 GMT"


@pytest.mark.parametrize("kind", [AwsAccount, GcpAccount])
def test_an_account_tells_the_time_of_the_newest_reply(kind: type[AwsAccount] | type[GcpAccount]) -> None:
    account = kind(clock=lambda: NOON)
    assert account.now() == NOON
    account.learn_clock_offset({"date": ONE_O_CLOCK})
    account.learn_clock_offset({})  # a reply without a date changes nothing
    assert account.now().hour == 13


def test_every_page_is_fetched_once_and_an_empty_token_ends_the_list() -> None:
    pages: Mapping[str | None, Mapping[str, Any]] = {
        None: {"items": [1], "next": "a"},
        "a": {"items": [2], "next": ""},
    }
    assert [page["items"] for page in all_pages(pages.__getitem__, "next")] == [[1], [2]]


def test_a_refusal_names_the_call_the_place_the_reason_and_the_fix() -> None:
    class Account(ProviderAccount):
        provider = "Cloud"
        fixes = {RefusalReason.DISABLED: "enable {service}", RefusalReason.OTHER: "try again"}  # noqa: RUF012

    disabled = Account().refused("compute.list", "here", RefusalReason.DISABLED, "off", code="403", service="compute")
    assert str(disabled) == (
        "compute.list in here: the service is disabled in this account (403: off); enable compute."
    )
    other = Account().refused("compute.list", "here", RefusalReason.OTHER, "two\n words " + "x" * 500)
    assert str(other).startswith("compute.list in here: Cloud refused (two words xx")
    assert len(str(other)) < 300
