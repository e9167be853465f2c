"""export, generate, import: a run's weights in use."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.commands.options import JsonOption, RunArgument
from orchestrator.settings import home_from


class FormatName(StrEnum):
    """Format of exported weights."""

    HF = "hf"


def export(
    run: RunArgument = None,
    format_: Annotated[
        FormatName, typer.Option("--format", help="Output format; hf is the format of Hugging Face transformers.")
    ] = FormatName.HF,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to create. [default: RUN-hf]")] = None,
    as_json: JsonOption = False,
) -> None:
    """Export the weights of a run's latest checkpoint to another format.

    Works for the presets llama, qwen3 and gpt2; needs safetensors (pip install 'slm-spot[export]').

    \b
    Examples:
      slm export demo-1
      slm export demo-1 --format hf --out ~/models/demo
    """
    from orchestrator.runs import models

    source = models.source_of(run, home_from(os.environ).create())
    _show(models.export(source, out or Path(f"{source.run_id}-{format_.value}")), as_json)


def generate(
    run: Annotated[str, typer.Argument(metavar="RUN", show_default=False)],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", show_default=False)],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Maximum number of tokens to generate.")] = 100,
    temperature: Annotated[
        float,
        typer.Option("--temperature", min=0.0, help="Sampling temperature; 0 always takes the most likely token."),
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, help="Sample among the N most likely tokens; 0 means all.")
    ] = 50,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same text.")] = 0,
) -> None:
    """Generate text from a run's latest checkpoint.

    \b
    Examples:
      slm generate demo-1 "def main("
      slm generate demo-1 "The module" --tokens 200 --temperature 0
    """
    from orchestrator.runs import models

    source = models.source_of(run, home_from(os.environ).create())
    options = ["--tokens", str(tokens), "--temperature", str(temperature), "--top-k", str(top_k), "--seed", str(seed)]
    models.generate(source, prompt, options)


def import_(
    folder: Annotated[Path, typer.Argument(metavar="HF_DIR", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to create. [default: models/NAME in SLM_HOME]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Import weights from Hugging Face transformers as the initial weights of a run.

    Reads Llama, Qwen3 and GPT-2 models in safetensors format; needs safetensors (pip install 'slm-spot[export]').
    Prints the model settings that a recipe needs besides training.initial_weights=FOLDER.

    \b
    Examples:
      slm import ~/models/TinyLlama-1.1B
      slm import ./demo-1-hf --out ./demo-weights
    """
    from orchestrator.runs import models

    home = home_from(os.environ).create()
    target = out or home.root / "models" / folder.expanduser().resolve().name
    _show(models.import_folder(folder.expanduser(), target.expanduser()), as_json)


def _show(facts: dict[str, Any], as_json: bool) -> None:
    from orchestrator.views import runs as render
    from orchestrator.views.facts.document import print_json

    if as_json:
        print_json(facts)
        return
    console = render.console_on(sys.stdout)
    for name, value in facts.items():
        if isinstance(value, list):
            value = " ".join(f"--set {setting}" for setting in value)
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        console.print(f"{name.replace('_', ' ')}: {shown}", markup=False, highlight=False, soft_wrap=True)
