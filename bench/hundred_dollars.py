"""Writes docs/hundred-dollars.md from what the commands say with --json: what $100 buys today, where, and how surely.

    python -m bench.hundred_dollars [--budget 100] [--out docs/hundred-dollars.md]

Every number of the page is a command's; the page names the command. Prices are those of this machine: the cache that
`slm offers --refresh` fills, else the dated table that ships with slm.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.figures import bare, count, dollars, duration
from tasks.own_module import own_module

TOKENS_PER_PARAM = 20
DEADLINE = "48h"
UNGUARDED = "unguarded spot, no deadline"
SCENARIOS: Mapping[str, tuple[str, ...]] = {
    "spot, no deadline": ("--spot",),
    f"spot, {DEADLINE}": ("--spot", "--deadline", DEADLINE),
    "on-demand, no deadline": ("--on-demand",),
    f"on-demand, {DEADLINE}": ("--on-demand", "--deadline", DEADLINE),
    UNGUARDED: ("--spot", "--allow-unguarded"),
}
FEW_TOKENS = "5e9"
"""Unique tokens of a data set that has to be repeated."""
SIMULATED_RUNS = 500
SECONDS_PER_HOUR = 3600


@dataclass(frozen=True, slots=True)
class Said:
    """One command and its facts."""

    command: str
    facts: Any


def ask(*arguments: str) -> Said:
    """Run one `slm` command as a person would."""
    command = own_module("orchestrator.cli", *arguments, "--json")
    environment = {**os.environ, "SLM_REFRESH": "never"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"slm {shlex.join(arguments)}: {done.stderr}")
    return Said(shlex.join(["slm", *arguments]), json.loads(done.stdout))


def page(budget: str) -> str:
    """The whole page."""
    cap = ("--budget", budget)
    largest = {
        name: ask("plan", *cap, "--params", "max", "--tokens-per-param", str(TOKENS_PER_PARAM), *options)
        for name, options in SCENARIOS.items()
    }
    frontiers = {name: ask("frontier", *cap, *options) for name, options in SCENARIOS.items()}
    first = next(iter(frontiers.values()))
    chosen = lowest(first, mixture=False)
    same_shape = ask(
        "plan", *cap, "--spot", "--params", str(chosen["model"]["num_params"]),
        "--tokens-per-param", f"{chosen['model']['tokens_per_param']:.3g}",
    )  # fmt: skip
    repeated = ask("frontier", *cap, "--spot", "--dense", "--unique-tokens", FEW_TOKENS)
    simulated = ask("simulate", *shlex.split(same_shape.facts["next_command"])[2:], "--runs", str(SIMULATED_RUNS))
    return "\n".join(
        [
            *opening(budget, largest, frontiers, chosen, simulated),
            *sizes(largest),
            *optimum(frontiers, chosen),
            *data(chosen, repeated),
            *hardware(same_shape),
            *sureness(same_shape, simulated),
            *reproduce([*largest.values(), *frontiers.values(), repeated, same_shape, simulated]),
        ]
    )


# ---------------------------------------------------------------- parts of the page


def opening(
    budget: str, largest: Mapping[str, Said], frontiers: Mapping[str, Said], chosen: Any, simulated: Said
) -> list[str]:
    """The answer and the date of its prices."""
    first, soon = next(iter(frontiers.values())), lowest(frontiers[f"spot, {DEADLINE}"], mixture=False)
    by_name = {name: said.facts for name, said in largest.items()}
    spot, quick = by_name["spot, no deadline"], by_name[f"spot, {DEADLINE}"]
    prices = first.facts["prices"]
    asked_for = f"at {TOKENS_PER_PARAM} tokens per parameter"
    return [
        f"# What {budget} dollars buy",
        "",
        f"Made on {datetime.now(UTC).date()} by `python -m bench.hundred_dollars` from the commands below. Prices: "
        f"{prices['source']}, {prices['num_offers']} offers, dated {prices['oldest_date']} to {prices['newest_date']} "
        f"({prices['num_undated']} undated).",
        "",
        f"**The best model** is a dense one of {count(chosen['model']['num_params'])} parameters on "
        f"{count(chosen['model']['num_tokens'])} tokens ({chosen['model']['tokens_per_param']:.0f} per parameter), on "
        f"{machine(chosen['estimate'])}: {loss(chosen['estimate'])}. That takes {hours(chosen['estimate'])}. Within "
        f"{DEADLINE} it is {count(soon['model']['num_params'])} on {count(soon['model']['num_tokens'])} tokens on "
        f"{machine(soon['estimate'])}: {soon['estimate']['predicted_loss_nats']:.2f} nats.",
        "",
        likelihood(chosen["estimate"], simulated),
        "",
        without_guard(largest[UNGUARDED], frontiers[UNGUARDED]),
        "",
        f"**The largest model {asked_for}** has {count(spot['model']['num_params'])} parameters "
        f"({spot['best']['usd_per_param']:.2e} $/param) on {machine(spot['best'])}, which takes "
        f"{hours(spot['best'])}; within {DEADLINE} it is {count(quick['model']['num_params'])} "
        f"({quick['best']['usd_per_param']:.2e} $/param) on {machine(quick['best'])}. Of "
        f"{spot['chance']['num_draws']} simulated runs of each {100 * spot['chance']['finished_share']:.0f} % and "
        f"{100 * quick['chance']['finished_share']:.0f} % train all tokens.",
        "",
        "Nothing here has been measured on a GPU by slm yet: speeds come from constants pooled over published runs of "
        "other trainers, so their intervals are wide, and the loss is known to about the corpus, not to the recipe.",
        "",
    ]


def likelihood(item: Any, simulated: Said) -> str:
    """How often the best model is trained to its end, and what that hangs on."""
    finished = default_policy(simulated)["finished_share"]
    low, high = item["tokens_per_second_interval"]
    rests = {"measured": "was measured with slm"}.get(item["throughput_basis"], "is pooled over other programs")
    dear = item["total_usd"] * item["tokens_per_second"] / low
    return (
        f"**How likely:** {100 * finished:.0f} % of {simulated.facts['num_draws']} simulated runs of the best model "
        f"train all its tokens under the cap of ${simulated.facts['budget_usd']:g}; the others stop there with fewer. "
        f"The speed of {item['offer']['accelerator']} {rests}, {count(low)} to {count(high)}"
        f" tokens/s; at the lower end "
        f"all tokens would cost about {dollars(dear)}."
    )


def without_guard(largest: Said, frontier: Said) -> str:
    """What the price of a provider's own time limit is."""
    model, best, lowest_loss = largest.facts["model"], largest.facts["best"], lowest(frontier, mixture=False)
    return (
        "All of this is on clouds where something besides our own guard ends a node that hangs. With "
        f"`--allow-unguarded` the same money trains {count(model['num_params'])} parameters at {TOKENS_PER_PARAM} "
        f"tokens each on {machine(best)}, or reaches {lowest_loss['estimate']['predicted_loss_nats']:.2f} nats with "
        f"{count(lowest_loss['model']['num_params'])}; there a node that hangs costs on until somebody ends it."
    )


def sizes(largest: Mapping[str, Said]) -> list[str]:
    """The largest model in each scenario."""
    lines = [
        f"## The largest model at {TOKENS_PER_PARAM} tokens per parameter",
        "",
        "| | parameters | tokens | offer | time | expected $ | $/param | loss (nats), 80 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, said in largest.items():
        best, model = said.facts["best"], said.facts["model"]
        lines.append(
            f"| {name} | {count(model['num_params'])} | {count(model['num_tokens'])} | {machine(best)} | {hours(best)} "
            f"| {best['total_usd']:.2f} | {best['usd_per_param']:.2e} | {loss_cell(best)} |"
        )
    return [*lines, ""]


def optimum(frontiers: Mapping[str, Said], chosen: Any) -> list[str]:
    """Where the loss is lowest in each scenario."""
    lines = [
        "## The architecture and size with the lowest loss",
        "",
        "Each row spends the whole budget on new tokens. A mixture has 8 experts, of which 2 are active; its loss and "
        "its speed rest on assumptions (docs/planner.md), a dense model's on published runs.",
        "",
        "| | kind | parameters | active | tokens | per param | offer | time | loss (nats) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, said in frontiers.items():
        for mixture in (False, True):
            item = lowest(said, mixture=mixture)
            model, best = item["model"], item["estimate"]
            lines.append(
                f"| {name} | {'mixture' if mixture else 'dense'} | {count(model['num_params'])} "
                f"| {count(model['active_params'])} | {count(model['num_tokens'])} | {model['tokens_per_param']:.0f} "
                f"| {machine(best)} | {hours(best)} | {best['predicted_loss_nats']:.3f} |"
            )
    model = chosen["model"]
    return [
        *lines,
        "",
        f"The dense winner: {model['num_layers']} layers of width {model['width']}, {model['num_heads']} heads, hidden "
        f"size {model['hidden_size']}, vocabulary {model['vocab_size']}, {model['sequence_length']} tokens a sequence, "
        f"{model['global_batch_size']} sequences a step; RMSNorm, rotary positions, SwiGLU, QK-norm, Muon for the "
        "matrices. The minimum is flat, so a smaller model trained longer costs little loss and is cheaper to run.",
        "",
    ]


def data(chosen: Any, repeated: Said) -> list[str]:
    """Which text, how much of it, and what repeating costs."""
    again = lowest(repeated, mixture=False)
    gap = again["estimate"]["predicted_loss_nats"] - chosen["estimate"]["predicted_loss_nats"]
    return [
        "## The data",
        "",
        f"{count(chosen['model']['num_tokens'])} tokens. The choice of text matters more than any price: going from "
        "FineWeb-Edu to ClimbMix shortened nanochat's way to the same CORE score from 2 h 46 to 2 h 01. Mixing in 30 % "
        "code follows TinyLlama and Amber; below about half a billion parameters no gain in reasoning was shown for it "
        "(docs/research.md).",
        "",
        f"With only {count(float(FEW_TOKENS))} unique tokens the best size becomes "
        f"{count(again['model']['num_params'])} and the loss {gap:+.3f} nats: repeats count less, but the first few "
        "epochs cost little (Muennighoff et al. 2023).",
        "",
    ]


def hardware(said: Said) -> list[str]:
    """Compute, and the offers for the model with the lowest loss."""
    best, model = said.facts["best"], said.facts["model"]
    gpus = best["offer"]["gpus_per_node"] * best["layout"]["num_nodes"]
    bill = ", ".join(f"{line['name']} {dollars(line['usd'])}" for line in best["bill"] if line["usd"])
    lines = [
        "## Compute, hardware and cloud",
        "",
        f"{bare(model['total_flops'])} FLOP: {best['train_hours'] * gpus:.0f} GPU-hours of "
        f"{best['offer']['accelerator']} at {100 * best['mfu']:.0f} % MFU, {count(best['tokens_per_second'])} "
        f"tokens/s. The bill: {bill}.",
        "",
        "| offer | $/h | tokens/s | time | expected $ | preemptions | worst case $ |",
        "|---|---|---|---|---|---|---|",
    ]
    for fact in said.facts["ranked"][:8]:
        lines.append(
            f"| {machine(fact)} | {fact['usd_per_hour']:.2f} | {count(fact['tokens_per_second'])} | {hours(fact)} "
            f"| {fact['total_usd']:.2f} | {fact['expected_preemptions']:.1f} | {fact['worst_case_usd']:.0f} |"
        )
    return [*lines, "", "The cap stops a run before its worst case, with a checkpoint.", ""]


def sureness(said: Said, simulated: Said) -> list[str]:
    """What is unsure, with numbers."""
    best = said.facts["best"]
    low, high = best["tokens_per_second_interval"]
    policy = default_policy(simulated)
    scores = [
        f"{fact['benchmark']} {fact['low']:.2f} to {fact['high']:.2f} ({fact['num_rows']} published runs)"
        if fact["low"] is not None
        else f"{fact['benchmark']} unknown ({fact['basis']})"
        for fact in said.facts["scores"]
    ]
    unlucky = 100 * (1 - policy["finished_share"])
    return [
        "## How sure",
        "",
        f"- Speed: {count(low)} to {count(high)} tokens/s ({best['throughput_basis']} constants); dollars and hours "
        "move with it.",
        f"- Loss: {loss(best)}. Scores: {'; '.join(scores)}.",
        f"- {simulated.facts['num_draws']} simulated runs of this plan (hazard, capacity and speed drawn): "
        f"P10, P50, P90 of dollars {three(policy['total_usd'])}, hours {three(policy['hours'])}, preemptions "
        f"{three(policy['num_preemptions'])}; {unlucky:.0f} % do not finish all tokens under the cap.",
        f"- Hazard: {simulated.facts['interruptions_per_node_hour']:.2g} losses per node-hour "
        f"({simulated.facts['hazard_source']}).",
        "- Prices are lists, not promises: the cheapest spot offers are often not to be had, and `slm launch` then "
        "goes down the list.",
        "",
    ]


def reproduce(said: Sequence[Said]) -> list[str]:
    """The commands."""
    return ["## Commands", "", "```", *[answer.command for answer in said], "```", ""]


# ---------------------------------------------------------------- helpers


def default_policy(simulated: Said) -> Any:
    """What slm does, or the only thing that can be done."""
    policies = simulated.facts["policies"]
    return policies.get(simulated.facts["default_policy"]) or next(iter(policies.values()))


def lowest(said: Said, *, mixture: bool) -> Any:
    """The point with the lowest loss of its kind."""
    return next(fact for fact in said.facts["points"] if fact["has_lowest_loss"] and fact["is_mixture"] is mixture)


def machine(item: Any) -> str:
    """1 x 8xH100-SXM spot at aws us-east-2."""
    offer = item["offer"]
    where = "" if offer["region"] == "any" else f" {offer['region']}"
    kind = "spot" if offer["spot"] else "on-demand"
    node = f"{offer['gpus_per_node']}x{offer['accelerator']}"
    return f"{item['layout']['num_nodes']} x {node} {kind} at {offer['cloud']}{where}"


def hours(item: Any) -> str:
    """Billed time."""
    return duration(item["billed_hours"] * SECONDS_PER_HOUR)


def loss(item: Any) -> str:
    """In words."""
    if item["predicted_loss_nats"] is None:
        return f"no loss is predicted ({item['loss_unknown_reason']})"
    low, high = item["predicted_loss_interval_nats"]
    return f"a held-out loss of {item['predicted_loss_nats']:.2f} nats per token (80 %: {low:.2f} to {high:.2f})"


def loss_cell(item: Any) -> str:
    """In a table."""
    if item["predicted_loss_nats"] is None:
        return "unknown"
    low, high = item["predicted_loss_interval_nats"]
    return f"{item['predicted_loss_nats']:.2f} ({low:.2f} to {high:.2f})"


def three(spread: Any) -> str:
    """P10, P50 and P90."""
    return " / ".join(f"{spread[name]:.3g}" for name in ("p10", "p50", "p90"))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="100", help="dollars")
    parser.add_argument("--out", type=Path, default=Path("docs/hundred-dollars.md"))
    options = parser.parse_args(arguments)
    options.out.write_text(page(options.budget), encoding="utf-8")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
