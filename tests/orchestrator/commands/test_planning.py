"""plan --params, estimate, frontier, simulate, offers and gpus: exit code, first line and facts."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cost.market.offers import load_reference_offers
from orchestrator import cli
from orchestrator.commands import tables
from orchestrator.prices import table as prices
from orchestrator.prices.table import Prices
from orchestrator.settings import Home

COMMANDS = ("estimate", "frontier", "simulate", "offers", "gpus")
QUICK_FRONTIER = ("frontier", "--gpus", "H100-SXM", "--params", "5e8..8e9")
QUICK_SIMULATION = ("simulate", "1.5b", "--gpus", "H100-SXM", "--clouds", "aws", "--runs", "20")
TRACES = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "traces" / "aws-v100-feb-2023"


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Slm = Callable[..., Ended]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("SLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SLM_REFRESH", "never")
    monkeypatch.delenv("COLUMNS", raising=False)
    return Home(tmp_path / "home")


@pytest.fixture
def slm(home: Home) -> Slm:
    def run(*arguments: str) -> Ended:
        out, err = io.StringIO(), io.StringIO()
        with pytest.raises(SystemExit) as end, redirect_stdout(out), redirect_stderr(err):
            cli.main(arguments)
        code = end.value.code
        return Ended(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())

    return run


def facts(slm: Slm, *arguments: str) -> Any:
    ended = slm(*arguments, "--json")
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def cached(home: Home) -> Prices:
    """A cache as a refresh writes it, of the shipped offers at half their price."""
    from dataclasses import replace

    offers = tuple(replace(offer, usd_per_hour=offer.usd_per_hour / 2) for offer in load_reference_offers().offers)
    found = Prices(offers, "SkyPilot 0.14.1 catalogs", read_at=datetime.now(UTC), enabled=("aws", "gcp"))
    prices.write_cache(found, home.create().offers)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples_and_json(slm: Slm, command: str) -> None:
    shown = slm(command, "--help")
    assert shown.code == 0
    assert f"Examples:\n    slm {command}" in shown.out
    assert "--json" in shown.out
    assert max(len(line) for line in shown.out.splitlines()) <= 110


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "demo", "--params", "1e9"], "--params chooses the model, so it cannot be combined with a recipe"),
        (["plan", "--params", "1e9", "--market", "calm"], "--params plans for real clouds"),
        (["plan", "--params", "max", "--clouds", "lambda", "--spot"], "offers matches these clouds, GPUs and kinds"),
        (["frontier", "--clouds", "lambda", "--spot"], "offers matches these clouds, GPUs and kinds"),
        (["plan", "--params", "3e9..1e9"], "goes down; write the smaller count first."),
        (["plan", "--params", "big"], "'big' is not a count such as 1.1e9, 1.1B or 350M."),
        (["plan", "--params", "7e9..9e9"], "raise one of them, lower --tokens-per-param, or use --params max"),
        (["plan", "--params", "1e15"], "no offer can train"),
        (["plan", "demo", "--tokens-per-param", "20"], "for a recipe use --set training.tokens_per_param=20"),
        (["plan", "demo", "--objective", "size"], "'size' is not one of 'usd_per_param', 'loss', 'dollars', 'hours'"),
        (["plan", "demo", "--deadline", "soon"], "'soon' is not a time such as 48h, 3d or 90min."),
        (["plan", "demo", "--deadline", "1.1.1h"], "is not a time such as 48h, 3d or 90min."),
        (["plan", "demo", "--corpus", "books"], "there is no scaling law for corpus 'books'; choose one of fineweb"),
        (["estimate", "--model", "demo", "--gpu", "H10"], "no GPU is called 'H10'"),
        (["estimate", "--model", "demo", "--gpu", "H100"], "H100 is a family of GPUs; choose one of H100-"),
        (["estimate", "--model", "7e9", "--gpu", "T4"], "T4: T4 has no bf16 units."),
        (["estimate", "--model", "70e9", "--gpu", "RTX4090"], "needs"),
        (["estimate", "--model", "1e9", "--gpu", "A100-40GB", "--set", "seed=1"], "--set changes a recipe"),
        (["frontier", "--plot", "f.gif"], "--plot f.gif should end in .png, .svg or .html."),
        (["frontier", "--plot", "/no/such/folder/f.png"], "there is no folder /no/such/folder."),
        (
            ["frontier", "--params", "1e12..2e12"],
            "does not pay for a single step of any model between 1e+12 and 2e+12 parameters",
        ),
        (["simulate", "1.5b", "--market", "storm"], "should be calm, hazard:PER_HOUR, or trace:"),
        (["simulate", "1.5b", "--market", "hazard:often"], "should be calm, hazard:PER_HOUR, or trace:"),
        (["simulate", "1.5b", "--market", "trace:/no/such"], "there is no trace at /no/such"),
        (["simulate", "1.5b", "--runs", "0"], "Invalid value for '--runs'"),
        (["offers", "--cloud", "awz"], "did you mean aws?"),
        (["gpus", "H10"], "no GPU is called 'H10'"),
    ],
)
def test_a_mistake_is_one_clear_message_and_exit_code_2(slm: Slm, arguments: list[str], message: str) -> None:
    ended = slm(*arguments)
    assert ended.code == 2
    assert message in ended.err
    assert "Traceback" not in ended.err


# ---------------------------------------------------------------- plan


def test_the_largest_model_is_the_answer_of_a_range(slm: Slm) -> None:
    asked = ("plan", "--budget", "100", "--params", "8e8..3e9", "--tokens-per-param", "20")
    shown = slm(*asked)
    assert shown.out.startswith("Largest: ")
    assert "$/param, predicted loss 2." in shown.out.splitlines()[0]
    assert "(prices: reference table, " in shown.out.splitlines()[0]
    found = facts(slm, *asked)
    affordable = [entry["num_params"] for entry in found["sizes"] if entry["is_affordable"]]
    assert found["model"]["num_params"] == max(affordable)
    assert found["best"]["total_usd"] <= 100
    assert found["model"]["tokens_per_param"] == pytest.approx(20, rel=1e-3)
    assert found["best"]["usd_per_param"] == pytest.approx(found["best"]["total_usd"] / max(affordable))


def test_a_range_that_only_unguarded_offers_train_is_answered_with_a_warning(slm: Slm) -> None:
    asked = ("plan", "--budget", "100", "--params", "1.1e9..3e9", "--tokens-per-param", "20")
    shown = slm(*asked)
    assert shown.out.startswith("Largest: 1.")
    assert shown.out.splitlines()[1].startswith("Warning: ")
    found = facts(slm, *asked)
    assert found["guard"]["refusal"] is not None
    assert "--allow-unguarded" in found["warning"]
    assert "the smallest model of the range" in found["warning"], "what the guarded offers would take"
    assert "--allow-unguarded" in found["next_command"], "or the next command would refuse it"
    admitted = facts(slm, *asked, "--allow-unguarded")
    assert admitted["best"] == found["best"]
    assert admitted["warning"] is None


def test_an_unguarded_offer_is_refused_with_what_would_have_been(slm: Slm) -> None:
    plain, admitted = facts(slm, "plan", "1.5b", "--spot"), facts(slm, "plan", "1.5b", "--spot", "--allow-unguarded")
    assert plain["guard"]["refusal"] is None
    assert admitted["best"]["total_usd"] < plain["best"]["total_usd"]
    reasons = {item["offer_id"]: item["reason"] for item in plain["rejected"]}
    assert "nothing ends a node whose guest hangs" in reasons[admitted["best"]["offer"]["offer_id"]]
    assert plain["num_ranked"] + len(plain["rejected"]) == admitted["num_ranked"] + len(admitted["rejected"])
    text = " ".join(slm("plan", "1.5b", "--spot").out.split())
    assert "- refused: 1 x " in text
    assert "- ends a node without us at aws: guard, power-off, eventbridge-terminate" in text
    assert "eventbridge-terminate is armed up to 5 min 00 s after a node's start" in text


def test_a_cloud_that_only_an_empty_account_stops_says_how_much_may_lie_there(slm: Slm) -> None:
    text = " ".join(slm("plan", "1.5b", "--clouds", "vast").out.split())
    assert "keep at most $100.00 there, with automatic payment off" in text


def test_the_next_command_plans_the_very_same_model(slm: Slm) -> None:
    import shlex

    found = facts(slm, "plan", "--params", "1.2e9", "--budget", "200", "--spot", "--deadline", "30d")
    words = shlex.split(found["next_command"])
    again = facts(slm, *words[1:])
    assert again["num_params"] == found["model"]["num_params"]
    assert again["best"]["offer"]["offer_id"] == found["best"]["offer"]["offer_id"]
    assert again["best"]["total_usd"] == pytest.approx(found["best"]["total_usd"], rel=0.01)


def test_max_finds_the_range_by_itself(slm: Slm) -> None:
    found = facts(slm, "plan", "--params", "max", "--gpus", "H100-SXM", "--budget", "50")
    sizes = [entry["num_params"] for entry in found["sizes"]]
    assert sizes[-1] / sizes[0] == pytest.approx(2, rel=0.05)
    assert found["sizes"][0]["is_affordable"]
    assert not found["sizes"][-1]["is_affordable"]


@pytest.mark.parametrize(("objective", "key"), [("hours", "billed_hours"), ("dollars", "total_usd")])
def test_the_objective_decides_what_comes_first(slm: Slm, objective: str, key: str) -> None:
    found = facts(slm, "plan", "350m", "--objective", objective, "--top", "50")
    within = [entry[key] for entry in found["ranked"] if entry["within_budget"]]
    assert within == sorted(within)
    assert found["objective"] == objective


def test_explain_shows_formula_inputs_and_source_of_every_number(slm: Slm) -> None:
    shown = slm("plan", "1.5b", "--explain").out
    for name in ("tokens_per_second", "train_hours", "checkpoint_interval", "total", "usd_per_param", "predicted_loss"):
        assert f"\n  {name} = " in shown
    assert shown.count("formula:") == shown.count("inputs:") == shown.count("source:") > 15
    found = facts(slm, "plan", "1.5b", "--explain")
    by_name = {entry["name"]: entry for entry in found["explanations"]}
    assert by_name["total"]["value"] == pytest.approx(found["best"]["total_usd"])
    assert all(entry["formula"] and entry["source"] for entry in found["explanations"])
    assert facts(slm, "plan", "1.5b")["explanations"] is None
    assert "predicted_loss" not in {fact["name"] for fact in facts(slm, "plan", "demo", "--explain")["explanations"]}


def test_a_cache_is_read_first_and_only_enabled_clouds_rank(slm: Slm, home: Home) -> None:
    cached(home)
    shown = slm("plan", "1.5b")
    assert "(prices: SkyPilot 0.14.1 catalogs, read just now)" in shown.out.splitlines()[0]
    assert "--all-clouds ranks it too" in " ".join(shown.out.split())
    found = facts(slm, "plan", "1.5b", "--top", "400")
    assert {entry["offer"]["cloud"] for entry in found["ranked"]} <= {"aws", "gcp"}
    everywhere = facts(slm, "plan", "1.5b", "--top", "400", "--all-clouds")
    assert len(everywhere["ranked"]) > len(found["ranked"])
    assert found["num_ranked"] + len(found["rejected"]) == len(cached(home).offers)


def test_credentials_for_clouds_without_offers_are_told(slm: Slm, home: Home) -> None:
    from dataclasses import replace

    prices.write_cache(replace(cached(home), enabled=("ibm",)), home.offers)
    for arguments in (["plan", "--params", "1e9"], ["frontier"], ["plan", "1.5b"]):
        ended = slm(*arguments)
        assert ended.code == 2
        assert "--all-clouds ranks" in ended.err
    assert slm("plan", "--params", "1e9", "--all-clouds", "--gpus", "H100-SXM").code == 0


def test_a_plan_that_rents_refreshes_old_prices_and_the_local_cloud_does_not(
    slm: Slm, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Home] = []
    monkeypatch.setattr(prices, "refresh_when_stale", lambda where, *_: asked.append(where))
    slm("plan", "demo")
    assert asked == []
    slm("plan", "1.5b")
    assert asked == [home]


# ---------------------------------------------------------------- estimate


def test_estimate_answers_speed_utilization_memory_and_bound(slm: Slm) -> None:
    asked = ("estimate", "--model", "tinyllama-1.1b", "--gpu", "H100-SXM", "--gpus", "8")
    first = slm(*asked).out.splitlines()[0]
    assert first.startswith("tinyllama-1.1b on 1 x 8xH100-SXM: ")
    assert "tokens/s" in first
    assert "% MFU" in first
    assert first.endswith("bound by matmul")
    found = facts(slm, *asked)
    low, high = found["tokens_per_second_interval"]
    assert low < found["tokens_per_second"] < high
    assert sum(found["memory_parts_bytes"].values()) == pytest.approx(found["peak_memory_gib"] * 2**30)
    assert sum(found["step_parts_seconds"].values()) == pytest.approx(found["step_seconds"])
    assert found["train_hours"] == pytest.approx(found["model"]["num_tokens"] / found["tokens_per_second"] / 3600)


def test_estimate_takes_sizes_overrides_and_nodes(slm: Slm) -> None:
    item = facts(slm, "estimate", "--model", "1e9", "--gpu", "A100-80GB-SXM", "--gpus", "8", "--tokens-per-param", "10")
    two = facts(slm, "estimate", "--model", "1e9", "--gpu", "A100-80GB-SXM", "--gpus", "8", "--nodes", "2")
    assert item["model"]["num_params"] == pytest.approx(1e9, rel=0.05)
    assert item["model"]["tokens_per_param"] == pytest.approx(10, rel=1e-3)
    assert two["layout"]["num_nodes"] == 2
    shorter = facts(slm, "estimate", "--model", "350m", "--gpu", "RTX4090", "--set", "model.sequence_length=1024")
    assert shorter["model"]["sequence_length"] == 1024


# ---------------------------------------------------------------- frontier


def test_the_frontier_names_the_size_with_the_lowest_loss(slm: Slm) -> None:
    shown = slm(*QUICK_FRONTIER)
    assert shown.out.startswith("Lowest loss for $100.00: ")
    assert re.search(r"dense: more than \S+ parameters raise the loss at this budget", shown.out)
    found = facts(slm, *QUICK_FRONTIER)
    for mixture in (False, True):
        mine = [entry for entry in found["points"] if entry["is_mixture"] is mixture]
        losses = [choice["estimate"]["predicted_loss_nats"] for choice in mine]
        (best,) = [choice for choice in mine if choice["has_lowest_loss"]]
        assert best["estimate"]["predicted_loss_nats"] == min(losses)
        assert all(choice["estimate"]["total_usd"] <= 100 for choice in mine)
        assert all((choice["model"]["active_params"] < choice["model"]["num_params"]) is mixture for choice in mine)
    assert not any(fact["is_mixture"] for fact in facts(slm, *QUICK_FRONTIER, "--dense")["points"])


@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
def test_figures_are_written(slm: Slm, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"figure.{suffix}"
    assert f"Plot: {path}" in slm(*QUICK_FRONTIER, "--plot", str(path)).out
    head = path.read_bytes()[:200]
    assert {"png": b"\x89PNG", "svg": b"<?xml", "html": b"<!doctype html>"}[suffix] in head
    if suffix == "html":
        text = path.read_text()
        assert text.count("<svg") == 1
        assert "<script" not in text
        assert "src=" not in text
    slm(*QUICK_SIMULATION, "--plot", str(path))
    assert path.read_bytes()[:5000] != head


def test_a_plot_without_matplotlib_is_refused_before_the_work(slm: Slm, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.views import plots

    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    ended = slm(*QUICK_FRONTIER, "--plot", "f.png")
    assert ended.code == 2
    assert "pip install 'slm-spot[plot]'" in ended.err


# ---------------------------------------------------------------- simulate


def test_a_simulation_is_repeatable_and_orders_its_quantiles(slm: Slm) -> None:
    found = facts(slm, *QUICK_SIMULATION, "--seed", "7")
    assert found == facts(slm, *QUICK_SIMULATION, "--seed", "7")
    assert found["policies"] != facts(slm, *QUICK_SIMULATION, "--seed", "8")["policies"]
    assert found["default_policy"] in found["policies"]
    for policy in found["policies"].values():
        for name in ("total_usd", "hours", "num_tokens", "num_preemptions", "wasted_share"):
            assert policy[name]["p10"] <= policy[name]["p50"] <= policy[name]["p90"]
        assert policy["total_usd"]["p90"] <= found["budget_usd"] + 1e-6


def test_a_calm_market_preempts_nobody_and_a_rough_one_does(slm: Slm) -> None:
    calm = facts(slm, *QUICK_SIMULATION, "--market", "calm")["policies"]["default"]
    rough = facts(slm, *QUICK_SIMULATION, "--market", "hazard:1.5")["policies"]["default"]
    assert calm["num_preemptions"]["p90"] == 0
    assert rough["num_preemptions"]["p50"] > 2
    assert rough["wasted_share"]["p50"] > calm["wasted_share"]["p50"]


@pytest.mark.skipif(not TRACES.is_dir(), reason=f"no traces in {TRACES}")
def test_real_traces_can_be_played(slm: Slm) -> None:
    zones = facts(slm, *QUICK_SIMULATION, "--market", f"trace:{TRACES}", "--deadline", "100h")
    assert zones["num_zones"] == len(list(TRACES.glob("*.json")))
    single = next(iter(sorted(TRACES.glob("*.json"))))
    assert facts(slm, *QUICK_SIMULATION, "--market", f"trace:{single}", "--deadline", "100h")["num_zones"] == 1


def test_an_on_demand_plan_has_one_policy(slm: Slm) -> None:
    found = facts(slm, *QUICK_SIMULATION, "--on-demand", "--budget", "1000")
    assert list(found["policies"]) == ["on_demand"]
    assert slm(*QUICK_SIMULATION, "--on-demand", "--budget", "1000").code == 0


# ---------------------------------------------------------------- offers, gpus


def test_offers_are_sorted_by_gpu_hour_with_date_and_source(slm: Slm) -> None:
    found = facts(slm, "offers", "--gpu", "H100", "--spot")["offers"]
    prices_per_gpu = [entry["usd_per_gpu_hour"] for entry in found]
    assert prices_per_gpu == sorted(prices_per_gpu)
    assert all(entry["accelerator"].startswith("H100") and entry["spot"] for entry in found)
    assert all(entry["as_of"] and entry["source"] for entry in found)
    assert slm("offers", "--cloud", "aws", "--top", "3").out.count("\naws ") == 3
    assert slm("offers", "--cloud", "lambda", "--spot").out.startswith("No offer matches (prices: ")


def test_gpus_show_their_sources_and_the_cheapest_price(slm: Slm) -> None:
    shown = slm("gpus", "H100-SXM", "V100").out
    assert shown.startswith("2 GPUs; dense tensor-core peaks")
    assert "- H100-SXM: " in shown
    found = facts(slm, "gpus")["gpus"]
    h100 = next(entry for entry in found if entry["name"] == "H100-SXM")
    assert h100["bf16_flops"] == pytest.approx(989e12, rel=0.01)
    cheapest = facts(slm, "offers", "--gpu", "H100-SXM", "--spot")["offers"][0]
    assert h100["spot_usd_per_gpu_hour"] == cheapest["usd_per_gpu_hour"]
    assert next(entry for entry in found if entry["name"] == "V100")["bf16_flops"] is None
    assert all(entry["sources"] for entry in found)


def test_refresh_without_skypilot_says_what_to_install(slm: Slm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prices, "has_skypilot", lambda: False)
    ended = slm("offers", "--refresh")
    assert ended.code == 2
    assert "pip install 'slm-spot[cloud]'" in ended.err


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (1, "no cloud's catalog could be read, so prices were not changed"),
        (3, "installed but cannot be imported"),
        (4, "another price refresh is running"),
    ],
)
def test_a_refresh_that_fails_is_told(slm: Slm, monkeypatch: pytest.MonkeyPatch, code: int, message: str) -> None:
    monkeypatch.setattr(prices, "has_skypilot", lambda: True)
    monkeypatch.setattr(prices, "refresh_command", lambda _: [sys.executable, "-c", f"raise SystemExit({code})"])
    ended = slm("offers", "--refresh")
    assert ended.code == 1
    assert message in ended.err


def test_a_refresh_that_hangs_is_ended(slm: Slm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prices, "has_skypilot", lambda: True)
    monkeypatch.setattr(prices, "refresh_command", lambda _: [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(tables, "REFRESH_SECONDS", 1)
    ended = slm("offers", "--refresh")
    assert ended.code == 1
    assert "took longer than 1 s" in ended.err


# ---------------------------------------------------------------- weight


MANY_OFFERS = 2500
MOST_SECONDS = 1.5
MOST_MIB = 300


@pytest.mark.parametrize("arguments", [["plan", "tinyllama-1.1b", "--nodes", "2"], ["plan", "--params", "1.1e9..3e9"]])
def test_thousands_of_offers_are_planned_quickly_and_in_little_memory(home: Home, arguments: list[str]) -> None:
    from dataclasses import replace

    table = load_reference_offers().offers
    many = tuple(
        replace(table[n % len(table)], region=f"{table[n % len(table)].region}-{n // len(table)}")
        for n in range(MANY_OFFERS)
    )
    prices.write_cache(Prices(many, "test", read_at=datetime.now(UTC)), home.create().offers)
    code = f"""
import pathlib, resource, sys
from orchestrator.cli import main
try:
    main({[*arguments, "--json"]!r})
except SystemExit as end:
    assert not end.code, end.code
used = resource.getrusage(resource.RUSAGE_SELF)
status = pathlib.Path("/proc/self/status")
if status.exists():  # on Linux ru_maxrss begins at what the process that forked us had
    kib = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
else:
    kib = used.ru_maxrss / (2**10 if sys.platform == "darwin" else 1)
print(used.ru_utime + used.ru_stime, kib / 2**10, file=sys.stderr)
"""
    command = [sys.executable, "-c", code]
    root = Path(cli.__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=120)
    seconds, mib = map(float, done.stderr.split())
    assert json.loads(done.stdout)["prices"]["num_offers"] == MANY_OFFERS
    # Processor seconds, since this machine may do other things; the plan reads no network and waits for nothing.
    assert seconds < MOST_SECONDS
    assert mib < MOST_MIB


@pytest.mark.parametrize(
    "arguments",
    [
        ["estimate", "--model", "1e9", "--gpu", "H100-SXM"],
        ["plan", "--params", "1e9", "--gpus", "H100-SXM"],
        ["offers", "--json"],
        ["gpus"],
    ],
)
def test_nothing_heavy_is_loaded(home: Home, arguments: list[str]) -> None:
    code = f"""
import sys
from orchestrator.cli import main
try:
    main({arguments!r})
except SystemExit as end:
    assert not end.code, end.code
heavy = [name for name in ("torch", "ray", "sky", "numpy", "matplotlib", "pandas") if name in sys.modules]
print(heavy, file=sys.stderr)
"""
    root = Path(cli.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr.strip() == "[]"
