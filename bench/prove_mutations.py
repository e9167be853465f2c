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
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("orchestrator", "trainer", "tasks", "cost", "tests", "pyproject.toml", "Makefile", "docs", "README.md")
TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Mutation:
    """Text that stands once in a file, what stands there instead, and the tests that `make test` runs for it."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = (
    Mutation(
        "reserve before start",
        "orchestrator/supervisor/supervise.py",
        "        account = self.ledger.reserve(\n",
        "        self.backend.start(lease, self.command)\n        account = self.ledger.reserve(\n",
        "tests/orchestrator/supervisor/test_supervise.py",
    ),
    Mutation(
        "the cap",
        "cost/ledger/ledger.py",
        "        if usd(rise_micro_usd) > free:\n",
        "        if usd(rise_micro_usd) > free * 2:\n",
        "tests/cost/ledger/test_ledger.py",
    ),
    Mutation(
        "guard",
        "tasks/guard/decision.py",
        "        return replace(state, ending=True), END_NODE\n    if answer is not None",
        "        pass\n    if answer is not None",
        "tests/tasks/guard/test_decision.py",
    ),
    Mutation(
        "two kinds of terminators",
        "tasks/guard/agent.py",
        "        if len(kinds) >= 2 or self",
        "        if len(kinds) >= 1 or self",
        "tests/tasks/guard/test_terminators.py",
    ),
    Mutation(
        "a guard that hangs",
        "tasks/guard/watchdog.py",
        "and not pulse.beats():",
        "and False:",
        "tests/tasks/guard/test_watchdog.py",
    ),
    Mutation(
        "manifest last",
        "trainer/checkpoints/manager.py",
        '        key = f"part-{self.rank:05d}.bin"\n',
        '        key = f"part-{self.rank:05d}.bin"\n'
        "        early = Manifest(place.incarnation, place.step, self.world_size, (), staging.tensors, dict(facts))\n"
        '        self.store.write(place.prefix + "manifest.json", early.to_bytes())\n',
        "tests/trainer/checkpoints/test_manager.py",
    ),
    Mutation(
        "the sampler's resume",
        "trainer/loop.py",
        "        batch = self.loader.batch(step, self.rank, self.world_size)\n",
        '        self.calls = getattr(self, "calls", -1) + 1\n'
        "        batch = self.loader.batch(self.calls, self.rank, self.world_size)\n",
        "tests/trainer/checkpoints/test_manager.py tests/trainer/test_loop.py",
    ),
    Mutation(
        "import rule",
        "cost/ledger/leases.py",
        "from cost.market.offers import Offer\n",
        "from cost.market.offers import Offer\nfrom trainer.config import TrainConfig as TrainConfig\n",
        "tests/test_architecture.py",
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
        tests = [test for test in mutation.tests.split() if (copy / test).exists()]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
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
    caught = {mutation.name: failing_test(mutation) for mutation in chosen}
    if arguments.json:
        print(json.dumps(caught, indent=1))
    else:
        for name, test in caught.items():
            print(f"{name:24} {'caught by ' + test if test else 'NOT NOTICED'}")
    return 0 if all(caught.values()) and caught else 1


if __name__ == "__main__":
    sys.exit(main())
