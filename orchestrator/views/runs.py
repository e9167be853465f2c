"""Terminal output of runs, ledgers and recipes: the answer first, the next command last.

Everything here takes facts and a console and returns nothing; `views/facts` has the same facts for `--json`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, TextIO

from cost.ledger.leases import usd
from orchestrator.figures import count, dollars, duration, nats, plural
from orchestrator.views.facts.runs import billed_time

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from orchestrator.runs.stage_status import StageStatus
    from orchestrator.runs.status import LedgerView, RunStatus, RunSummary
    from tasks.recipe.load import RecipeSummary

WIDTH_WITHOUT_TERMINAL = 100


def console_on(stream: TextIO) -> Console:
    """A console as wide as the terminal, or of a fixed width where there is none."""
    from rich.console import Console

    width = None if stream.isatty() or os.environ.get("COLUMNS") else WIDTH_WITHOUT_TERMINAL
    return Console(file=stream, width=width, highlight=False, emoji=False, soft_wrap=False)


def table(*columns: str, right: Sequence[str] = (), fold: Sequence[str] = (), gap: int = 2) -> Table:
    """A table without lines; figures are aligned to the right, and only `fold` columns may break."""
    from rich.table import Table

    made = Table(box=None, padding=(0, gap, 0, 0), header_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(
            column,
            justify="right" if column in right else "left",
            no_wrap=column not in fold,
            overflow="fold" if column in fold else "ellipsis",
        )
    return made


def say(console: Console, *parts: RenderableType) -> None:
    """Print texts as they are: no markup, since names of runs and paths may hold brackets."""
    for part in parts:
        console.print(part, markup=False)


def tell(console: Console, line: str) -> None:
    """A line to copy from, a command or a path: never broken, however narrow the terminal."""
    console.print(line, markup=False, soft_wrap=True)


def following(console: Console, command: str) -> None:
    """The end of every output: what a person most likely wants to do next."""
    console.print()
    tell(console, f"Next: {command}")


def bullets(console: Console, lines: Sequence[str]) -> None:
    """A list whose long lines go on under their own beginning."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 1, 0, 0))
    for line in lines:
        grid.add_row("-", line)
    say(console, grid)


# ---------------------------------------------------------------- runs


def statuses(runs: Sequence[RunStatus], console: Console) -> None:
    """One run in full, several as a table."""
    if not runs:
        say(console, "There are no runs yet.")
        following(console, "slm launch demo")
    elif len(runs) == 1:
        _status(runs[0], console)
    else:
        _status_table(runs, console)


def state_words(run: RunStatus) -> str:
    """The state in words, and whether somebody acts on it."""
    words = str(run.state).lower().replace("_", " ")
    return words if run.supervisor_alive or is_final(run) else f"{words}, unsupervised"


def is_final(run: RunStatus) -> bool:
    """Whether the run has ended and holds nothing."""
    return str(run.state) in FINAL_STATES


FINAL_STATES = frozenset({"SUCCEEDED", "FAILED", "STOPPED", "OUT_OF_BUDGET"})


def next_command(run: RunStatus) -> str:
    """What a person most likely wants to do now."""
    state = str(run.state)
    if state == "SUCCEEDED":
        return f"slm ledger {run.run_id}"
    if state == "OUT_OF_BUDGET":
        return f"slm resume {run.run_id} --budget MORE   (more than {dollars(run.cap_usd)})"
    if state == "FAILED":
        return f"slm logs {run.run_id}"
    if state == "STOPPED" or not run.supervisor_alive:
        return f"slm resume {run.run_id}"
    return f"slm logs {run.run_id} -f"


def _status(run: RunStatus, console: Console) -> None:
    say(console, f"{run.run_id} is {state_words(run)}: {_where(run)}.", "")
    facts = table("", "")
    facts.show_header = False
    rows = [
        ("recipe", run.recipe_name),
        ("step", f"{_number(run.step)} of {_number(run.num_steps)}, {count(run.tokens)} tokens"),
        ("loss (nats)", f"{nats(run.loss)}, held-out {nats(run.heldout_loss)}"),
        ("speed", f"{count(run.tokens_per_second)} tokens/s {_on(run)}"),
        ("offer", str(run.offer or "-")),
        ("spent", f"{dollars(run.spent_usd)} of {dollars(run.cap_usd)}, {dollars(run.held_usd)} reserved"),
        ("interruptions", f"{plural(run.preemptions, 'preemption')}, {plural(run.failures, 'failure')}"),
        ("left", duration(run.eta_seconds)),
        ("updated", f"{run.updated_at.astimezone():%Y-%m-%d %H:%M:%S}"),
    ]
    if len([stage for stage in run.stages if stage.kind != "prepare"]) > 1:
        rows.insert(1, ("stages", ", ".join(_stage(stage) for stage in run.stages)))
    for name, value in rows:
        facts.add_row(name, value)
    say(console, facts)
    if not run.supervisor_alive and not is_final(run):
        say(console, "", "No supervisor is running: the nodes terminate when their grants expire.")
    following(console, next_command(run))


def _stage(stage: StageStatus) -> str:
    """A stage in a few words."""
    reserved = f", {dollars(stage.reserved_usd)} reserved" if stage.reserved_usd else ""
    step = f" at {stage.step}/{_number(stage.num_steps)}" if stage.step is not None and stage.state == "running" else ""
    return f"{stage.name} {stage.state.replace('_', ' ')}{step}{reserved}"


def _status_table(runs: Sequence[RunStatus], console: Console) -> None:
    live = sum(not is_final(run) for run in runs)
    spent = sum((run.spent_usd for run in runs), Decimal(0))
    say(console, f"{plural(len(runs), 'run')}, {live} unfinished, {dollars(spent)} spent in total.", "")
    figures = ("steps", "loss (nats)", "tokens/s", "spent $", "cap $", "lost", "left")
    shown = table("run", "state", *figures, right=figures, fold=("run",))
    for run in runs:
        shown.add_row(
            run.run_id,
            state_words(run),
            f"{_number(run.step)}/{_number(run.num_steps)}",
            nats(run.heldout_loss if run.heldout_loss is not None else run.loss),
            count(run.tokens_per_second),
            f"{run.spent_usd:.2f}",
            f"{run.cap_usd:.2f}",
            str(run.preemptions),
            "-" if is_final(run) else duration(run.eta_seconds),
        )
    say(console, shown)
    following(console, f"slm status {runs[-1].run_id}")


def _on(run: RunStatus) -> str:
    return f"on {plural(run.num_nodes, 'node')}" if run.num_nodes else "when it last trained"


def _where(run: RunStatus) -> str:
    share = f" ({100 * run.step / run.num_steps:.0f} %)" if run.step is not None and run.num_steps else ""
    step = f"step {_number(run.step)} of {_number(run.num_steps)}{share}"
    left = f", about {duration(run.eta_seconds)} left" if run.eta_seconds and not is_final(run) else ""
    return f"{step}, {dollars(run.spent_usd)} of {dollars(run.cap_usd)} spent{left}"


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def summary(ended: RunSummary, console: Console) -> None:
    """How a run ended, what it cost and what it learnt."""
    run, result = ended.status, ended.result or {}
    say(console, "", f"{_headline(ended)}.", "")
    facts = table("", "")
    facts.show_header = False
    start, end, entropy = (result.get(key) for key in ("first_heldout_loss", "heldout_loss", "unigram_entropy"))
    if start is not None and end is not None:
        facts.add_row("held-out loss (nats)", f"{nats(start)} -> {nats(end)}, fell by {nats(start - end)}")
    if entropy is not None and end is not None:
        side = "below" if end <= entropy else "above"
        facts.add_row("unigram entropy (nats)", f"{nats(entropy)}; the model ends {nats(abs(entropy - end))} {side} it")
    facts.add_row("trained", f"step {_number(run.step)} of {_number(run.num_steps)}, {count(run.tokens)} tokens")
    share = 100 * float(run.spent_usd / run.cap_usd) if run.cap_usd else 0.0
    facts.add_row("spent", f"{dollars(run.spent_usd)} of the {dollars(run.cap_usd)} cap ({share:.0f} %)")
    facts.add_row("interruptions", f"{plural(run.preemptions, 'preemption')}, {plural(run.failures, 'failure')}")
    if ended.goodput is not None:
        kept = f"{100 * ended.goodput:.0f} % of the billed time became training steps that were kept"
        facts.add_row("goodput", kept)
    facts.add_row("billed", f"{duration(ended.billed_seconds)} of node time, in {duration(ended.wall_seconds)} here")
    say(console, facts)
    following(console, next_command(run))


def _headline(ended: RunSummary) -> str:
    run = ended.status
    state = str(run.state)
    cost = f"{dollars(run.spent_usd)} of {dollars(run.cap_usd)} spent"
    if state == "SUCCEEDED":
        return f"{run.run_id} finished in {duration(ended.wall_seconds)}; {cost}"
    if state == "OUT_OF_BUDGET":
        saved = "nothing is saved yet" if run.checkpoint_step is None else f"step {run.checkpoint_step} is saved"
        return f"{run.run_id} stopped at its cap: {saved}, {cost}"
    if state == "FAILED":
        return f"{run.run_id} failed: {run.reason or 'see its logs'}; {cost}"
    return f"{run.run_id} is {state_words(run)}: {_where(run)}"


# ---------------------------------------------------------------- ledger


def ledger(view: LedgerView, console: Console) -> None:
    """The balance, then every entry; amounts are changes, to the millionth."""
    balance = view.balance
    left = f"{dollars(balance.held_usd)} reserved, {dollars(balance.free_usd)} free"
    say(console, f"{view.run_id} has spent {dollars(balance.spent_usd)} of {dollars(balance.cap_usd)}; {left}.", "")
    figures = ("#", "spent $", "reserved $")
    shown = table(
        *("#", "billed time (UTC)", "stage", "lease", "entry", *figures[1:], "note"),
        right=figures,
        fold=("note",),
        gap=1,
    )
    for entry in view.entries:
        shown.add_row(
            str(entry.seq),
            f"{billed_time(entry.at_ms):%m-%d %H:%M:%S}",
            entry.stage,
            entry.lease_id.rpartition("-")[2],
            entry.kind.value,
            _change(entry.spent_micro_usd),
            _change(entry.held_micro_usd),
            entry.note,
        )
    spent, held = f"{balance.spent_usd:.6f}", f"{balance.held_usd:.6f}"
    shown.add_row("", "", "", "", "balance", spent, held, f"{balance.free_usd:.6f} free", style="bold")
    say(console, shown)
    following(console, f"slm status {view.run_id}")


def _change(micro_usd: int) -> str:
    return f"{usd(micro_usd):+.6f}" if micro_usd else ""


# ---------------------------------------------------------------- recipes


def recipes(lines: Sequence[RecipeSummary], console: Console) -> None:
    """The recipes that have a name."""
    say(console, f"{plural(len(lines), 'built-in recipe')}; commands also accept the path of a YAML file.", "")
    shown = table("recipe", "params", "tokens", "description", right=("params", "tokens"), fold=("description",))
    for line in lines:
        shown.add_row(line.name, count(line.num_params), count(line.num_tokens), line.description)
    say(console, shown)
    following(console, f"slm plan {lines[0].name if lines else 'PATH'}")
