"""Our step beside the peers': runs `peers.py` for each in turn, several times over, and prints the medians as JSON.

`python bench/keep.py peers -- python bench/peers_table.py ../shared/bench/peers.py --rounds 5` keeps them; `--python`
is the interpreter of an environment with torch, Lightning, litgpt and transformers. On a shared machine only
`pct_of_yard` (the step's FLOP/s over those of a matrix product timed beside it) compares.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PLUGIN = Path(__file__).resolve().parent / "peers_plugin.py"
IMPLEMENTATIONS = ("litgpt", "hf", "plugin")


def one(python: str, script: Path, implementation: str, size: str, dtype: str) -> dict[str, Any]:
    """A process of its own, compiled."""
    with tempfile.TemporaryDirectory(prefix="slm-peers-") as folder:
        out = Path(folder) / "out.jsonl"
        command = [python, str(script), "--impl", implementation, "--size", size, "--dtype", dtype, "--compile", "1"]
        command += ["--plugin", str(PLUGIN), "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)
        found: dict[str, Any] = json.loads(out.read_text().splitlines()[-1])
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, help="peers.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", default="S,M")
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS))
    parser.add_argument("--python", default=sys.executable)
    arguments = parser.parse_args()
    names = arguments.implementations.split(",")
    cases = [(size, dtype) for size in arguments.sizes.split(",") for dtype in arguments.dtypes.split(",")]
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for number in range(arguments.rounds):
        for size, dtype in cases:
            for name in names:  # interleaved: a busy minute slows all alike
                row = one(arguments.python, arguments.script.resolve(), name, size, dtype)
                found.setdefault((size, dtype, name), []).append(row)
                told = f"{row['tok_s']:.0f} tokens/s, {row['pct_of_yard']} % of the yardstick"
                print(f"round {number + 1}: {size} {dtype} {name}: {told}", file=sys.stderr)
    table = []
    for size, dtype in cases:
        medians = {name: statistics.median(row["pct_of_yard"] for row in found[size, dtype, name]) for name in names}
        best = max((value for name, value in medians.items() if name != "plugin"), default=None)
        for name in names:
            rows = found[size, dtype, name]
            table.append(
                {
                    "size": size,
                    "dtype": dtype,
                    "implementation": name,
                    "pct_of_yard": medians[name],
                    "pct_of_yard_of_each_round": [row["pct_of_yard"] for row in rows],
                    "over_best_peer": medians[name] / best if best and name == "plugin" else None,
                    "tokens_per_second": statistics.median(row["tok_s"] for row in rows),
                    "yardstick_gflops": statistics.median(row["yard_gflops"] for row in rows),
                    "num_params": rows[0]["params"],
                    "memory_gb": statistics.median(row["rss_gb"] for row in rows),
                    "last_loss": rows[-1]["lossN"],
                }
            )
    print(json.dumps({"rounds": arguments.rounds, "table": table}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
