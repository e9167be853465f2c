"""The import rule, held from outside: what may import what, and what stays out of a process that only plans."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

from orchestrator.settings import DISTRIBUTION

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("orchestrator", "tasks", "trainer", "cost")
HEAVY = ("torch", "ray", "sky", "lightning", "numpy", "boto3", "pandas", "pyarrow")
TORCH_FREE = (
    "tasks.recipe.load",
    "tasks.run_store_keys",
    "tasks.run_store_records",
    "tasks.spec",
    "tasks.stages.registry",
    "tasks.stages.manifest",
    "tasks.stores.opening",
    "tasks.guard.decision",
    "tasks.node.guard_archive",
    "tasks.own_module",
    "trainer.config",
    "trainer.run_store.base",
    "trainer.run_store.envelope",
    "trainer.run_store.keys",
)
TRAINER_NEEDS = {"torch", "lightning", "numpy"}
OLDEST_PYTHON_OF_A_NODE = (3, 8)
GUARD = ROOT / "tasks" / "guard"


def python(code: str) -> str:
    """What a fresh interpreter prints for `code`, run in the project's folder."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def heavy_modules_after(code: str) -> list[str]:
    """Which of the heavy modules a fresh interpreter has loaded when `code` has run."""
    report = f"import json, sys\nprint(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    loaded = json.loads(python(f"{code}\n{report}").splitlines()[-1])
    assert isinstance(loaded, list)
    return loaded


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache'])"
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": str(folder), "PATH": "", "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def imported_modules(path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, inside functions too.

    Only the guard may import relatively, within its own folder: it is shipped under another name.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                assert path.parent == GUARD and node.level == 1, f"{path}: relative import"
                module = f"tasks.guard.{module}".rstrip(".")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def own_file(module: str) -> Path | None:
    """The file of one of our modules; None for a name that is no module of ours."""
    path = ROOT.joinpath(*module.split("."))
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    return path / "__init__.py" if (path / "__init__.py").is_file() else None


def files_reached_from(package: str) -> dict[Path, set[str]]:
    """Every file of ours that the package imports, directly or not, with the top names that it imports."""
    waiting = sorted((ROOT / package).rglob("*.py"))
    reached: dict[Path, set[str]] = {}
    while waiting:
        path = waiting.pop()
        if path in reached:
            continue
        modules = list(imported_modules(path))
        reached[path] = {module.partition(".")[0] for module in modules}
        waiting += [file for module in modules if (file := own_file(module)) is not None]
    return reached


def test_the_import_contracts_are_kept() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("cost/ledger/leases.py", "import trainer.config"),
        ("cost/ledger/leases.py", "def f():\n    import rich"),
        ("trainer/config.py", "import tasks.recipe.schema"),
        ("trainer/config.py", "import cost.ledger.ledger"),
        ("tasks/recipe/schema.py", "import orchestrator.settings"),
        ("tasks/recipe/schema.py", "def f():\n    import torch"),
        ("orchestrator/settings.py", "import numpy"),
        ("tasks/guard/timer.py", "import tasks.node.processes"),
        ("tasks/guard/timer.py", "def f():\n    import cost.errors"),
    ],
)
def test_a_broken_import_rule_is_noticed(tmp_path: Path, file: str, line: str) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a", encoding="utf-8") as source:
        source.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert "BROKEN" in done.stdout


@pytest.mark.parametrize("module", TORCH_FREE)
def test_what_the_orchestrator_imports_is_torch_free(module: str) -> None:
    assert heavy_modules_after(f"import {module}") == []


def test_reading_a_recipe_loads_nothing_heavy() -> None:
    code = "from tasks.data.corpus import fingerprint\nfrom tasks.recipe.load import load_recipe\n"
    code += "recipe = load_recipe('demo')\nrecipe.workload()"
    assert heavy_modules_after(code + "\nfingerprint(recipe)") == []


def test_the_command_line_loads_nothing_heavy() -> None:
    assert heavy_modules_after("import orchestrator.cli") == []


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["plan", "demo"], ["plan", "demo", "--json"]])
def test_help_and_plan_load_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
from orchestrator.cli import main
try:
    main({arguments!r})
except SystemExit as end:
    assert not end.code, end.code
"""
    assert heavy_modules_after(code) == []


def test_help_loads_neither_the_planner_nor_pydantic() -> None:
    names = "('pydantic', 'cost.plan.planner', 'sqlite3')"
    code = f"import orchestrator.cli, sys\nprint([n for n in {names} if n in sys.modules])"
    assert python(code).strip() == "[]"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_other_distribution_owns_our_names(package: str) -> None:
    assert set(packages_distributions().get(package, [DISTRIBUTION])) == {DISTRIBUTION}
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin == str(ROOT / package / "__init__.py")


@pytest.mark.parametrize("path", sorted(GUARD.rglob("*.py")), ids=lambda path: path.stem)
def test_the_guard_is_for_any_python_from_3_8_and_imports_nothing_but_the_standard_library(path: Path) -> None:
    assert path.parent == GUARD, "the archive holds one folder"
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=OLDEST_PYTHON_OF_A_NODE)
    relative = {node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
    beside = {
        name for node in relative for name in ([node.module] if node.module else [one.name for one in node.names])
    }
    assert all((GUARD / f"{name}.py").is_file() for name in beside)
    tops = {module.partition(".")[0] for module in imported_modules(path) if not module.startswith("tasks.guard")}
    newer = {"tomllib", "zoneinfo", "graphlib"}
    assert tops <= set(sys.stdlib_module_names) - newer


def test_the_guard_s_import_contract_forbids_everything_else_of_ours() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (contract,) = [contract for contract in contracts if contract.get("source_modules") == ["tasks.guard"]]
    siblings = {f"tasks.{path.parent.name}" for path in (ROOT / "tasks").glob("*/__init__.py")}
    siblings |= {f"tasks.{path.stem}" for path in (ROOT / "tasks").glob("[a-z]*.py")}
    assert set(contract["forbidden_modules"]) == (siblings | set(PACKAGES)) - {"tasks", "tasks.guard"}


def test_the_trainer_needs_only_torch_lightning_and_numpy() -> None:
    allowed = TRAINER_NEEDS | set(sys.stdlib_module_names) | {"trainer", "cost"}
    beyond = {str(path): tops - allowed for path, tops in files_reached_from("trainer").items() if tops - allowed}
    assert beyond == {}


def test_what_the_trainer_uses_of_cost_needs_only_the_standard_library() -> None:
    allowed = set(sys.stdlib_module_names) | {"cost"}
    used = {path: tops for path, tops in files_reached_from("trainer").items() if path.is_relative_to(ROOT / "cost")}
    assert {str(path): tops - allowed for path, tops in used.items() if tops - allowed} == {}
