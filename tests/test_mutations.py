"""The safeguards that `bench/prove_mutations.py` breaks, and the tests that must notice, exist under their names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load_mutations() -> tuple[Any, ...]:
    spec = importlib.util.spec_from_file_location("prove_mutations", ROOT / "bench" / "prove_mutations.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return tuple(module.MUTATIONS)


@pytest.mark.parametrize("mutation", load_mutations(), ids=lambda mutation: mutation.name)
def test_what_is_broken_on_purpose_occurs_once_and_its_tests_exist(mutation: Any) -> None:
    assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1
    for test in mutation.tests:
        file, name = test.split("::")
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")
