"""One home per installation: private, named by the environment, with one owner id for good."""

from __future__ import annotations

import multiprocessing
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cost.errors import SlmError, UserError
from orchestrator.settings import Home, home_from

NOBODY = 65534


def test_the_home_is_what_the_environment_names(tmp_path: Path) -> None:
    assert home_from({"SLM_HOME": str(tmp_path / "a")}).root == tmp_path / "a"


@pytest.mark.parametrize("environ", [{}, {"SLM_HOME": ""}])
def test_without_a_name_the_home_is_in_the_users_folder(environ: dict[str, str]) -> None:
    assert home_from(environ).root == Path.home() / ".slm"


def test_a_relative_home_and_a_tilde_become_absolute() -> None:
    assert home_from({"SLM_HOME": "here"}).root == Path.cwd() / "here"
    assert home_from({"SLM_HOME": "~/there"}).root == Path.home() / "there"


def test_naming_a_home_creates_nothing(tmp_path: Path) -> None:
    home = home_from({"SLM_HOME": str(tmp_path / "a")})
    assert home.database.parent == home.store_dir("r").parents[1] == home.run_dir("r").parents[1]
    assert not home.root.exists()


def test_a_created_home_is_private(tmp_path: Path) -> None:
    root = Home(tmp_path / "a" / "b").create().root
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


def test_a_home_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match=r"SLM_HOME .*a cannot be made .*; set SLM_HOME to a folder"):
        Home(tmp_path / "a").create()


def test_a_home_that_cannot_be_written_to_is_refused() -> None:
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    try:
        with pytest.raises(UserError, match="cannot be written to; change its permissions"):
            as_nobody(Home(folder).create)
    finally:
        folder.rmdir()


def as_nobody(call: Callable[[], object]) -> None:
    """Root may write anywhere, so ask as somebody who may not."""
    if os.geteuid() != 0:
        call()
        return
    with multiprocessing.get_context("fork").Pool(1, os.setuid, (NOBODY,)) as pool:
        pool.apply(call)


def test_the_owner_id_is_six_hex_digits_and_stays(tmp_path: Path) -> None:
    owner = Home(tmp_path).owner_id()
    assert len(owner) == 6
    assert int(owner, 16) >= 0
    assert Home(tmp_path).owner_id() == owner
    assert sorted(path.name for path in tmp_path.iterdir()) == ["owner"]


def test_two_homes_have_two_owners(tmp_path: Path) -> None:
    owners = {Home(tmp_path / str(number)).owner_id() for number in range(4)}
    assert len(owners) > 1


def test_processes_that_start_together_agree_on_the_owner(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        owners = pool.map(Home.owner_id, [Home(tmp_path)] * 16)
    assert len(set(owners)) == 1


def test_a_damaged_owner_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "owner").write_text("someone\n")
    with pytest.raises(SlmError, match=r"owner holds 'someone', not 6 hex digits; write back the digits"):
        Home(tmp_path).owner_id()
