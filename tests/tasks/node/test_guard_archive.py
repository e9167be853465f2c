"""The guard's zipapp: the same bytes for the same sources, and it runs on every python of this machine."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tasks.guard.processes import kill_family, start_time
from tasks.node.guard_archive import EARLIEST_ZIP_TIME, GUARD_ARCHIVE, guard_archive, write_guard_archive
from tests.support.guarded import SLEEPER, Node, guard_program, until

ASK_VERSION = "import sys; print(sys.version_info[1] if sys.version_info[0] == 3 else 0)"


def test_the_same_sources_give_the_same_bytes(tmp_path: Path) -> None:
    code = "import sys; from tasks.node.guard_archive import guard_archive; sys.stdout.buffer.write(guard_archive())"
    command = [sys.executable, "-c", code]
    elsewhere = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout
    assert elsewhere == guard_archive() == write_guard_archive(tmp_path).read_bytes()


def test_it_holds_nothing_but_sources_in_order_and_without_times(tmp_path: Path) -> None:
    with zipfile.ZipFile(write_guard_archive(tmp_path)) as archive:
        members = archive.infolist()
    names = [member.filename for member in members]
    assert names == sorted(names)
    assert names[0] == "__main__.py"
    assert all(name.startswith("guard/") and name.endswith(".py") for name in names[1:])
    assert {member.date_time for member in members} == {EARLIEST_ZIP_TIME}
    assert {member.compress_type for member in members} == {zipfile.ZIP_STORED}


def test_writing_it_leaves_nothing_else_behind(tmp_path: Path) -> None:
    write_guard_archive(tmp_path)
    write_guard_archive(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [GUARD_ARCHIVE]


def pythons() -> list[str]:
    """One interpreter of each version on this machine, from 3.8 on."""
    names = [f"python3.{minor}" for minor in range(8, 20)]
    paths = [Path(sys.executable), Path("/usr/bin/python3")]
    paths += [Path(found) for name in names if (found := shutil.which(name))]
    paths += sorted(Path("~/.pyenv/versions").expanduser().glob("3.*/bin/python"))
    by_version: dict[int, str] = {}
    for path in paths:
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            said = subprocess.run([path, "-c", ASK_VERSION], capture_output=True, text=True, timeout=20, check=True)
            by_version.setdefault(int(said.stdout), str(path))
    return [by_version[minor] for minor in sorted(by_version) if minor >= 8]


def test_any_python_of_this_machine_runs_it_without_anything_installed(tmp_path: Path) -> None:
    for python in pythons():
        command = [python, "-I", "-S", guard_program(), "--help"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("usage: guard.pyz")


def test_any_python_of_this_machine_runs_a_node_to_its_end(tmp_path: Path) -> None:
    others = [python for python in pythons() if python != sys.executable]
    if not others:
        pytest.skip("no python on this machine but the one that runs the tests")
    for number, python in enumerate(others):
        root = tmp_path / str(number)
        root.mkdir()
        each = Node(root, SLEEPER, first_grant=3.0, python=python)
        try:
            command = each.pid_of("command")
            each.grant(4.0)
            until(lambda each=each: each.deadline() > 3.5)
            until(lambda each=each: not each.alive())
            assert start_time(command) is None
            assert each.events()[-1] == "processes ended"
        finally:
            kill_family(each.mark)
            each.process.wait()
            each.log.close()
