"""`python -m tasks time-processor`: prints how fast this processor multiplies the matrices of a recipe's model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tasks.recipe.load import recipe_from_json


def main(argv: Sequence[str]) -> int:
    """One line of JSON, the fields of `trainer.processor.ProcessorSpeed`."""
    parser = argparse.ArgumentParser(prog="python -m tasks time-processor", description=__doc__)
    parser.add_argument("--recipe-json", type=Path, required=True)
    recipe = recipe_from_json(parser.parse_args(argv).recipe_json)

    from trainer.matrix_speed import time_processor

    sys.stdout.write(json.dumps(asdict(time_processor(recipe.model, recipe.training.micro_batch_size))) + "\n")
    return 0
