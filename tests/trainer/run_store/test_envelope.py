"""Every record of the run store says its format, its writer, and has room for a tag."""

from __future__ import annotations

import json

import pytest

from trainer.run_store.envelope import SCHEMA, RecordError, Writer, unwrap, wrap


def test_a_payload_comes_back_from_its_envelope() -> None:
    payload = {"step": 3, "loss": None, "parent": {"incarnation": 0, "step": 2}}
    data = wrap(payload, Writer.TRAINER)
    assert json.loads(data) == {"schema": SCHEMA, "writer": "trainer", "tag": "", **payload}
    assert unwrap(data, "progress/latest.json") == payload


@pytest.mark.parametrize("schema", [SCHEMA + 1, 0, True, "1", None])
def test_another_format_is_refused_by_name(schema: object) -> None:
    data = json.dumps({"schema": schema, "step": 3}).encode()
    with pytest.raises(RecordError, match=r"spec.json in the run store has format .*, this slm reads up to 1; upgrade"):
        unwrap(data, "spec.json")


def test_a_payload_cannot_pose_as_its_envelope() -> None:
    with pytest.raises(AssertionError, match="'tag'"):
        wrap({"tag": "mine"}, Writer.NODE)
