"""What our clients of a cloud account share, whatever the cloud: its clock, its refusals and its paged lists.

A time limit that is set at a provider is set in the provider's time, so each reply's Date header teaches the account
how far this machine's clock is off. A call that fails raises `ProviderRefused`, sorted by what can be done about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Any, ClassVar

from orchestrator.backends.base import BackendError

LEASE_LABEL = "slm-lease"
"""Label of every instance that we rent, where the cloud has labels; its value is `sky.task.label(lease_id)`."""
LONGEST_DETAIL = 200
"""Characters of a provider's own message that ours repeats."""


def utc_now() -> datetime:
    return datetime.now(UTC)


class RefusalReason(StrEnum):
    """Why a provider did not do what it was asked."""

    CREDENTIALS = "credentials"
    EXPIRED = "expired"
    DISABLED = "disabled"
    DENIED = "denied"
    NETWORK = "network"
    QUOTA = "quota"
    CAPACITY = "capacity"
    MISSING = "missing"
    UNSUPPORTED = "unsupported"
    OTHER = "other"


FACTS: Mapping[RefusalReason, str] = {
    RefusalReason.CREDENTIALS: "there are no valid credentials for {provider}",
    RefusalReason.EXPIRED: "the {provider} credentials have expired",
    RefusalReason.DISABLED: "the service is disabled in this account",
    RefusalReason.DENIED: "these {provider} credentials do not permit it",
    RefusalReason.NETWORK: "{provider} does not answer",
}
"""What a message says; for every other reason, that the provider refused."""


class ProviderRefused(BackendError):
    """One call to a provider that failed: which call, where, why, and the fix."""

    def __init__(
        self, provider: str, call: str, place: str, reason: RefusalReason, detail: str, *, fix: str, code: str = ""
    ) -> None:
        """`code`: the provider's own name of the error, where it has one; `place`: the region or the project."""
        self.reason = reason
        self.code = code
        fact = FACTS.get(reason, "{provider} refused").format(provider=provider)
        quoted = " ".join(detail.split())[:LONGEST_DETAIL]
        super().__init__(f"{call} in {place}: {fact} ({f'{code}: ' if code else ''}{quoted}); {fix}.")


class ProviderAccount:
    """One account at one provider."""

    provider: ClassVar[str]
    """As messages call it."""
    fixes: ClassVar[Mapping[RefusalReason, str]]
    """What to do about each reason that this provider can have."""

    def __init__(self, clock: Callable[[], datetime] = utc_now) -> None:
        self._clock = clock
        self._clock_offset = timedelta(0)
        """By how much the provider's clock was ahead of this machine's at the newest reply."""

    def now(self) -> datetime:
        """The provider's time: what is set there must not depend on this machine's clock."""
        return self._clock() + self._clock_offset

    def learn_clock_offset(self, headers: Mapping[str, str]) -> None:
        """From the headers of one reply, in lower case; without a date nothing changes."""
        date = headers.get("date")
        if date:
            self._clock_offset = parsedate_to_datetime(date) - self._clock()

    def refused(
        self, call: str, place: str, reason: RefusalReason, detail: str, *, code: str = "", **names: str
    ) -> ProviderRefused:
        """The error of one failed call; `names` fill the words in braces of the fix."""
        fix = self.fixes[reason].format(**names)
        return ProviderRefused(self.provider, call, place, reason, detail, fix=fix, code=code)


def all_pages(fetch: Callable[[str | None], Mapping[str, Any]], token_field: str) -> Iterator[Mapping[str, Any]]:
    """Every page of a list: `fetch` gets the token of the page, None for the first; a page names the next one's."""
    token: str | None = None
    while True:
        page = fetch(token)
        yield page
        token = page.get(token_field)
        if not token:
            return
