"""A home of an earlier version: its runs are shown, and not continued; each refusal is one line.

tests/fixtures/home_of_format_4 was made by a demo of the version before fencing tokens, incarnations and envelopes,
without its data and the bytes of its checkpoints.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest

from cost.ledger.database import MIGRATIONS, connect
from cost.ledger.ledger import Ledger, replay
from orchestrator import cli
from orchestrator.settings import Home
from tasks.hub.weights import newest_weights
from tasks.run_store_keys import OLD_PREFIXES, PROGRESS
from trainer.run_store.base import DirectoryStore
from trainer.run_store.envelope import OldRunStore, RecordError, unwrap

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "home_of_format_4"
REFUSED = "was written by an earlier slm (it holds books/)"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    shutil.copytree(FIXTURE, tmp_path / "home")
    monkeypatch.setenv("SLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SLM_REFRESH", "never")
    return Home(tmp_path / "home")


@pytest.fixture
def slm(home: Home, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return run


def test_the_database_is_migrated(home: Home) -> None:
    before = sqlite3.connect(home.database)
    assert before.execute("PRAGMA user_version").fetchone()[0] == 4 < len(MIGRATIONS)
    before.close()
    db = connect(home.database)
    row = db.execute("SELECT fencing_token FROM runs WHERE run_id = 'demo-1'").fetchone()
    ledger = Ledger(db, "demo-1", fencing_token=row["fencing_token"])
    assert row["fencing_token"] == 1
    assert (len(ledger.entries()), ledger.balance().spent_usd, ledger.balance().held_usd) == (88, Decimal("8.00139"), 0)
    assert replay(ledger.entries()) == (8_001_390, 0)


def test_status_and_ledger_show_the_old_run(slm: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = slm("status", "--json")
    (run,) = json.loads(out)["runs"]
    assert code == 0
    assert (run["state"], run["step"], run["num_steps"], run["spent_usd"]) == ("SUCCEEDED", 500, 500, 8.00139)
    assert (run["loss"], run["heldout_loss"]) == (2.810567259788513, 3.1751497983932495)
    code, out, _ = slm("ledger", "--json")
    assert (code, len(json.loads(out)["entries"])) == (0, 88)


def test_the_old_run_is_not_resumed(slm: Callable[..., tuple[int, str, str]], home: Home) -> None:
    code, _, err = slm("resume")
    assert (code, err.count("\n")) == (2, 1)  # it has finished
    db = connect(home.database)
    db.execute("UPDATE runs SET state = 'STOPPED'")
    db.close()
    code, _, err = slm("resume")
    assert code == 1 and REFUSED in err and err.count("\n") == 1
    assert connect(home.database).execute("SELECT state, fencing_token FROM runs").fetchone()[:] == ("STOPPED", 1)


def test_the_old_run_is_not_recovered(slm: Callable[..., tuple[int, str, str]], home: Home) -> None:
    code, _, err = slm("recover", "--store", str(home.store_dir("demo-1")))
    assert code == 1 and REFUSED in err and err.count("\n") == 1


def test_the_weights_of_the_old_run_are_not_taken_for_none(home: Home) -> None:
    with pytest.raises(OldRunStore, match="finish or export it with the slm that began it"):
        newest_weights(DirectoryStore(home.store_dir("demo-1")))


def test_each_old_prefix_is_in_that_run_store(home: Home) -> None:
    for prefix in OLD_PREFIXES:
        assert (home.store_dir("demo-1") / prefix).is_dir()


def test_an_old_record_is_read_by_its_new_names(home: Home) -> None:
    progress = unwrap((home.store_dir("demo-1") / PROGRESS).read_bytes(), PROGRESS)
    assert progress["incarnation"] == 0 and "epoch" not in progress


@pytest.mark.parametrize("content", [b"", b"[]", b'"x"', b"{", b"\xff", b"null", b"[" * 100_000])
def test_bytes_that_are_no_record_are_an_error_of_one_line(content: bytes) -> None:
    with pytest.raises(
        RecordError, match=r"^spec.json in the run store is not .*; bring it back from a copy\.$"
    ) as said:
        unwrap(content, "spec.json")
    assert "\n" not in str(said.value)
