"""The checks can fail: each safeguard is broken on purpose in a copy of the project, and its tests must notice.

`python bench/prove_mutations.py [--only NAME] [--json]` prints each mutation with the first test that failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("orchestrator", "trainer", "tasks", "cost", "tests", "pyproject.toml", "Makefile", "docs", "README.md")
TIMEOUT_SECONDS = 600
AT_ONCE = 2


@dataclass(frozen=True)
class Mutation:
    """Text that occurs once in a file, its replacement, and tests of `make test` of which one at least must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "reserve before start",
        "orchestrator/supervisor/supervise.py",
        "        account = self.ledger.reserve(\n",
        "        self.backend.start(lease, self.command)\n        account = self.ledger.reserve(\n",
        ("tests/orchestrator/supervisor/test_supervise.py::test_the_reservation_is_in_the_ledger_before_the_rent",),
    ),
    Mutation(
        "the cap",
        "cost/ledger/ledger.py",
        "        if usd(rise_micro_usd) > free:\n",
        "        if usd(rise_micro_usd) > free * 2:\n",
        ("tests/cost/ledger/test_ledger.py::test_what_the_cap_cannot_pay_is_refused_and_leaves_no_trace",),
    ),
    Mutation(
        "guard",
        "tasks/guard/decision.py",
        "        return replace(state, ending=True), END_NODE\n    if answer is not None",
        "        pass\n    if answer is not None",
        ("tests/tasks/guard/test_decision.py::test_an_answer_that_is_read_after_the_deadline_comes_too_late",),
    ),
    Mutation(
        "two kinds of terminators",
        "tasks/guard/agent.py",
        "        if len(kinds) >= 2 or self",
        "        if len(kinds) >= 1 or self",
        ("tests/tasks/guard/test_terminators.py::test_a_node_with_terminators_of_one_kind_does_not_start",),
    ),
    Mutation(
        "a guard that hangs",
        "tasks/guard/watchdog.py",
        "and not pulse.beats():",
        "and False:",
        (
            "tests/tasks/guard/test_watchdog.py::test_a_stopped_guard_is_replaced_and_the_command_lives_on",
            "tests/tasks/guard/test_watchdog.py::test_the_watchdog_ends_the_node_of_a_stopped_guard",
        ),
    ),
    Mutation(
        "manifest last",
        "trainer/checkpoints/manager.py",
        "        parts = self._together(\n",
        "        early = Manifest(place.incarnation, place.step, self.world_size, (), staging.tensors, dict(facts))\n"
        "        self.store.write(place.prefix + keys.MANIFEST, early.to_bytes())\n"
        "        parts = self._together(\n",
        (
            "tests/trainer/checkpoints/test_manager.py"
            "::test_killed_at_any_change_of_the_store_a_run_loses_at_most_the_steps_since_its_last_save",
        ),
    ),
    Mutation(
        "the sampler's resume",
        "trainer/loop.py",
        "        batch = self.loader.batch(step, self.rank, self.world_size)\n",
        '        self.calls = getattr(self, "calls", -1) + 1\n'
        "        batch = self.loader.batch(self.calls, self.rank, self.world_size)\n",
        (
            "tests/trainer/checkpoints/test_manager.py"
            "::test_resumed_at_any_step_a_run_ends_with_bitwise_the_same_weights_and_losses",
        ),
    ),
    Mutation(
        "import rule",
        "cost/ledger/leases.py",
        "from cost.market.offers import Offer\n",
        "from cost.market.offers import Offer\nfrom trainer.config import TrainConfig as TrainConfig\n",
        ("tests/test_architecture.py::test_the_import_contracts_are_kept",),
    ),
)


def failing_test(mutation: Mutation) -> str | None:
    """The first test that fails with the mutation in place; None when none does."""
    with tempfile.TemporaryDirectory(prefix="slm-mutant-") as name:
        copy = Path(name)
        for part in COPIED:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, copy / part)
        path = copy / mutation.file
        text = path.read_text()
        if text.count(mutation.old) != 1:
            raise SystemExit(f"{mutation.name}: what is to be broken stands {text.count(mutation.old)} times in {path}")
        path.write_text(text.replace(mutation.old, mutation.new))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE)
    return failed[1] if done.returncode == 1 and failed else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one mutation by name")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    chosen = [item for item in MUTATIONS if arguments.only in (None, item.name)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(failing_test, chosen)
        caught = {mutation.name: test for mutation, test in zip(chosen, found, strict=True)}
    if arguments.json:
        print(json.dumps(caught, indent=1))
    else:
        for name, test in caught.items():
            print(f"{name:24} {'caught by ' + test if test else 'NOT NOTICED'}")
    return 0 if all(caught.values()) and caught else 1


if __name__ == "__main__":
    sys.exit(main())
