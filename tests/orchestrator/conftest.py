"""No test of a command times this machine's processor, which takes seconds; those that should say so."""

from __future__ import annotations

import pytest

from orchestrator.planning import processor


@pytest.fixture(autouse=True)
def no_timing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "times_processor" not in request.keywords:
        monkeypatch.setattr(processor, "time_in_child", lambda recipe: None)
