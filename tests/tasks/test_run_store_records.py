"""What another machine wrote is taken as a stranger's: one clear line, or a whole record."""

from __future__ import annotations

import pytest

from tasks.run_store_records import Command, Failure, Grant, GuardRequest, Record
from trainer.run_store.envelope import RecordError, Writer

RECORDS = (
    GuardRequest(number=7, exit_code=10, noticed=True),
    Grant(fencing_token=2, number=7, duration_seconds=9.5, at_ms=1_800_000_000_000),
    Command(command="stop", number=1, reason="asked"),
    Failure(lease_id="lease-1", step=12, message="the loss is nan"),
)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_comes_back_as_it_was_written(record: Record) -> None:
    assert type(record).parse(record.to_bytes(Writer.NODE), "key") == record


@pytest.mark.parametrize("kind", [type(record) for record in RECORDS])
@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"number": "x", "step": []}', b'{"schema": 99}', b'{"number": NaN}']
)
def test_any_other_bytes_are_an_error_of_one_line_that_names_the_key(kind: type[Record], content: bytes) -> None:
    with pytest.raises(RecordError, match=r"^grants/a/0\.json in the run store ") as said:
        kind.parse(content, "grants/a/0.json")
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("seconds", ["-1", "NaN", "Infinity"])
def test_a_grant_lasts_a_finite_time_that_is_not_negative(seconds: str) -> None:
    content = f'{{"fencing_token": 1, "number": 1, "at_ms": 1, "duration_seconds": {seconds}}}'.encode()
    with pytest.raises(RecordError, match="is no Grant"):
        Grant.parse(content, "grants/a/0.json")
