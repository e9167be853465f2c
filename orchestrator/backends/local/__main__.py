"""`python -m orchestrator.backends.local --dir DIR`: started by the local backend when it needs it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cost.errors import SlmError
from orchestrator.backends.local.server import serve


def main() -> int:
    parser = argparse.ArgumentParser(prog="orchestrator.backends.local", description="Be the local cloud of one run.")
    parser.add_argument("--dir", type=Path, required=True, help="the market's own folder")
    try:
        return serve(parser.parse_args().dir)
    except SlmError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
