"""Notices of preemption: each source returns the seconds until the cloud takes the node, or None."""

from __future__ import annotations

import datetime
import functools
import time
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

from .credentials import Metadata
from .http import Request, call, http_moment


def aws_notice(metadata: Metadata) -> Optional[float]:
    """`spot/instance-action` of the metadata service. A rebalance recommendation is no notice."""
    reply = metadata.aws("meta-data/spot/instance-action")
    if reply.status == 404:
        return None
    now = http_moment(reply.headers["date"]) if "date" in reply.headers else time.time()
    return seconds_of_instance_action(reply.json(), now)


def seconds_of_instance_action(document: Mapping[str, str], now: float) -> float:
    """From {"action": "terminate", "time": "2017-09-18T08:22:00Z"}, at most the two minutes that AWS gives."""
    moment = datetime.datetime.strptime(document["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.timezone.utc)
    return min(120.0, max(0.0, moment.timestamp() - now))


class GcpNotice:
    """`instance/preempted`: the first look asks, later ones wait for a change. Compute Engine gives 30 seconds."""

    SECONDS, WAIT_SECONDS = 30.0, 60

    def __init__(self) -> None:
        self.etag = ""

    def __call__(self, metadata: Metadata) -> Optional[float]:
        wait = f"?wait_for_change=true&timeout_sec={self.WAIT_SECONDS}&last_etag={self.etag}" if self.etag else ""
        reply = metadata.gcp(f"instance/preempted{wait}", timeout=self.WAIT_SECONDS + 10.0)
        self.etag = reply.checked().headers.get("etag", "")
        return self.SECONDS if reply.body.strip() == b"TRUE" else None


class AzureNotice:
    """Scheduled events of type Preempt or Terminate that name this machine."""

    def __init__(self) -> None:
        self.name = ""

    def __call__(self, metadata: Metadata) -> Optional[float]:
        if not self.name:
            self.name = metadata.azure("instance?api-version=2021-02-01").json()["compute"]["name"]
        # The first answer may take two minutes: Azure switches the service on when it is first asked.
        reply = metadata.azure("scheduledevents?api-version=2020-07-01", timeout=130.0)
        now = http_moment(reply.headers["date"]) if "date" in reply.headers else time.time()
        return seconds_of_azure_events(reply.json(), self.name, now)


def seconds_of_azure_events(document: Mapping[str, Any], name: str, now: float) -> Optional[float]:
    """Seconds until the first event that ends machine `name`; an event that has started has no NotBefore."""
    ends = [
        max(0.0, http_moment(event["NotBefore"]) - now) if event.get("NotBefore") else 0.0
        for event in document.get("Events", [])
        if event.get("EventType") in ("Preempt", "Terminate") and name in event.get("Resources", [])
    ]
    return min(ends) if ends else None


def url_notice(url: str, _: Metadata) -> Optional[float]:
    """{"seconds": S} at a URL that answers 404 while there is no notice."""
    reply = call(Request("GET", url, {}), 2.0)
    return None if reply.status == 404 else float(reply.json()["seconds"])


def notice_source(word: str) -> Tuple[Callable[[Metadata], Optional[float]], float]:
    """How to look, and the pause between two looks; raises ValueError."""
    if word.startswith("url:http"):
        return functools.partial(url_notice, word[len("url:") :]), 1.0
    sources: Dict[str, Tuple[Callable[[Metadata], Optional[float]], float]]
    sources = {"aws": (aws_notice, 5.0), "gcp": (GcpNotice(), 0.2), "azure": (AzureNotice(), 1.0)}
    if word not in sources:
        raise ValueError(f"no notice source is called {word!r}; there are aws, gcp, azure and url:URL")
    return sources[word]
