"""Every key of the run store is spelled once, and the two copies on a bare node agree with it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks import run_store_keys as keys
from tasks.node import bootstrap

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("orchestrator", "tasks", "trainer", "cost", "bench")
SPELLED_IN = ("trainer/run_store/keys.py", "tasks/run_store_keys.py")
COPIES = ("tasks/guard", "tasks/node/bootstrap.py")
"""Programs that run before anything of ours is installed; the tests below hold them to the module."""
KEY = re.compile(
    r"(spec|result)\.json|(ledger|guard|grants|control|progress|metrics|profile|incarnations|checkpoints"
    r"|compile|failures|phases|logs|clusters|setup|data)/.*|incarnation=.*"
)
NO_KEYS = {
    "data/calibration.csv": "a file of our own package",
}
EXIT_CODE = re.compile(r"(?m)^\s*(EXIT_[A-Z]+)\b.*= *\d")


def sources() -> Iterator[tuple[str, str]]:
    """Path and text of every module that could name a key."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name not in SPELLED_IN and not name.startswith(COPIES):
                yield name, path.read_text(encoding="utf-8")


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of all string constants but docstrings; of an f-string its parts."""
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield node.lineno, node.value


def test_no_other_module_spells_a_key() -> None:
    found = [
        f"{name}:{line}: {text}"
        for name, source in sources()
        for line, text in strings(ast.parse(source))
        if KEY.fullmatch(text) and text not in NO_KEYS
    ]
    assert not found, "take these keys from tasks.run_store_keys:\n" + "\n".join(found)


def test_no_other_module_numbers_an_exit_code_of_the_nodes_command() -> None:
    found = [f"{name}: {match[1]}" for name, source in sources() for match in EXIT_CODE.finditer(source)]
    assert not found


@pytest.mark.parametrize("text", ["spec.json", "grants/", "metrics/incarnation=", "incarnation="])
def test_the_search_sees_a_key(text: str) -> None:
    tree = ast.parse(f'store.read(f"{text}{{lease}}")')
    assert any(KEY.fullmatch(found) for _, found in strings(tree))


def test_the_bootstrap_has_the_same_log_and_exit_code() -> None:
    assert bootstrap.NODE_LOG.format(lease_id="lease-1", rank=2) == keys.node_log("lease-1", 2)
    assert bootstrap.EXIT_BROKEN == keys.EXIT_BROKEN


def test_keys_read_back_what_they_were_made_of() -> None:
    assert keys.incarnation_number(keys.incarnation(12)) == 12
    assert keys.incarnation_of_metrics(keys.metrics_part(3, 7)) == 3
    assert keys.checkpoint_file(keys.checkpoint_folder(3, 40) + keys.checkpoint_part(1)) == (3, 40, "part-00001.bin")
    assert keys.incarnation_number(keys.PROGRESS) is None
    assert keys.checkpoint_file(keys.newest_checkpoint(3)) is None
