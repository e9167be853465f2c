"""Where AWS credentials come from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tasks.guard.credentials import read_credentials
from tasks.guard.signing import Credentials


def test_credentials_are_read_from_json_and_from_the_file_of_the_aws_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_json, as_ini = tmp_path / "key.json", tmp_path / "credentials"
    as_json.write_text('{"aws_access_key_id": "A", "aws_secret_access_key": "B", "aws_session_token": "C"}')
    as_ini.write_text(
        "[default]\naws_access_key_id = D\naws_secret_access_key = E%F\n[other]\naws_access_key_id=G\n"
        "aws_secret_access_key=H\naws_session_token=I\n"
    )
    assert read_credentials(str(as_json)) == Credentials("A", "B", "C")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    assert read_credentials(str(as_ini)) == Credentials("D", "E%F", "")
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert read_credentials(str(as_ini)) == Credentials("G", "H", "I")
    monkeypatch.setenv("AWS_PROFILE", "none")
    with pytest.raises(OSError, match=r"no section \[none\]"):
        read_credentials(str(as_ini))


def test_the_environment_of_this_test_holds_no_keys() -> None:
    assert "AWS_ACCESS_KEY_ID" not in os.environ
