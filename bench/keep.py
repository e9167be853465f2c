"""Run a benchmark that prints JSON and keep what it printed with date, machine and command.

`python bench/keep.py NAME -- python bench/policy.py FOLDER --json` writes `bench/results/DATE-NAME.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "ray", "lightning", "skypilot")


def machine() -> dict[str, object]:
    """What a reader needs to compare: processor, cores, load, versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_before": [round(load, 1) for load in os.getloadavg()],
        "system": platform.system(),
        "python": platform.python_version(),
        **versions,
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of the result, such as policy")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --: prints one JSON document")
    arguments = parser.parse_args()
    command = [part for part in arguments.command if part != "--"]
    before = machine()
    run = [sys.executable if command[0] == "python" else command[0], *command[1:]]
    done = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=False)
    sys.stdout.write(done.stdout)
    if done.returncode != 0:
        return done.returncode
    now = datetime.now(UTC)
    kept = {
        "date": now.isoformat(timespec="seconds"),
        "command": " ".join(command),
        "machine": before,
        "result": json.loads(done.stdout),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{now:%Y-%m-%d}-{arguments.name}.json"
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(f"kept as {path.name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
