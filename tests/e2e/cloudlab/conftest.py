"""One lab, one bucket and one SkyPilot home for all scenarios; each scenario has a home of its own for slm."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.e2e.cloudlab.cluster import Lab, Late, NoLab, lab_on_this_machine
from tests.e2e.cloudlab.people import Bucket, User, bucket_on_the_bridge, first_user, one_more

SCENARIO_SECONDS = 900


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    try:
        with lab_on_this_machine() as item:
            yield item
    except NoLab as refusal:
        pytest.skip(f"no lab on this machine: {refusal}")


@pytest.fixture(scope="session")
def bucket(lab: Lab) -> Iterator[Bucket]:
    with bucket_on_the_bridge() as item:
        yield item


@pytest.fixture(scope="session")
def sky_user(lab: Lab, bucket: Bucket) -> Iterator[User]:
    with first_user(lab, bucket) as item:
        yield item


@pytest.fixture
def user(sky_user: User, request: pytest.FixtureRequest) -> Iterator[User]:
    with one_more(sky_user, request.node.name.removeprefix("test_")[:24].strip("_").replace("_", "-")) as item:
        yield item


@pytest.fixture(autouse=True)
def bounded(user: User) -> Iterator[None]:
    """Each wait has its bound; this one is for all of them together."""

    def interrupt(*_: object) -> None:
        raise Late(f"the scenario took longer than {SCENARIO_SECONDS} s:\n{user.said()}")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(SCENARIO_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
