"""Figures of the frontier and of simulations, as .png, .svg or a self-contained .html file.

matplotlib comes with the extra `plot` and is imported only when something is drawn. Nothing here computes: the numbers
are those of the tables.
"""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cost.errors import UserError
from cost.plan.plans import known_loss
from cost.plan.policy import DEFAULT
from orchestrator.figures import count

if TYPE_CHECKING:
    from cost.plan.frontier import Point
    from cost.plan.simulate import Simulation, Spread

SUFFIXES = (".png", ".svg", ".html")
DOTS_PER_INCH = 160
ROOM_FOR_LABELS = 0.22
"""Share of the height of the curves that is kept free below them."""
DENSE, MIXTURE, OTHER, INK, FAINT = "#1f5fa8", "#c2571a", "#8a93a0", "#20262e", "#d9dde3"
STYLE = {
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "grid.color": FAINT,
    "svg.fonttype": "path",
    "svg.hashsalt": "slm",
}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{margin:2rem auto;max-width:68rem;font-family:sans-serif}}svg{{width:100%;height:auto}}</style></head>
<body>{svg}</body></html>
"""


def check(path: Path) -> None:
    """Refuse early, before minutes of arithmetic.

    Raises:
        UserError: The file's kind is unknown, its folder is missing, or matplotlib is.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--plot {path} should end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--plot {path}: there is no folder {path.absolute().parent}.")
    if find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib, which is not installed: pip install 'slm-spot[plot]'")


def frontier(points: Sequence[Point], budget_usd: float, path: Path) -> None:
    """Loss and hours against parameters, dense and mixtures."""
    figure, (above, below) = _figure(2, (9.0, 7.0), height_ratios=(3, 1.4), sharex=True)
    for is_mixture, colour, name in ((False, DENSE, "dense"), (True, MIXTURE, "8 experts, 2 active")):
        mine = [point for point in points if point.is_mixture == is_mixture and known_loss(point.estimate) is not None]
        if not mine:
            continue
        sizes = [choice.workload.num_params for choice in mine]
        losses = [choice.predicted.nats_per_token for choice in mine]
        above.plot(sizes, losses, "o-", color=colour, markersize=4, linewidth=1.8, label=name)
        below.plot(sizes, [choice.estimate.hours for choice in mine], "o-", color=colour, markersize=4, linewidth=1.8)
        best = min(mine, key=lambda choice: choice.predicted.nats_per_token)
        _mark(above, best, colour, above_curve=not is_mixture)
    above.set_xscale("log")
    above.set_ylabel("predicted loss (nats per token)")
    above.set_title(f"What ${budget_usd:,.0f} buys at each size: the loss after all the tokens that it pays for")
    low, high = above.get_ylim()
    above.set_ylim(low - ROOM_FOR_LABELS * (high - low), high)
    above.grid(True, axis="y")
    above.legend(frameon=False, loc="upper right")
    below.set_yscale("log")
    below.set_ylabel("billed hours")
    below.set_xlabel(f"parameters in total\n{_spread_note(points)}")
    below.grid(True, axis="y")
    _counts(below)
    _save(figure, path, f"slm frontier for ${budget_usd:,.0f}")


def simulation(done: Simulation, budget_usd: float, name: str, path: Path) -> None:
    """P10 to P90 of dollars, hours, tokens, preemptions and waste of each policy."""
    names = list(done.policies)[::-1]
    panels: list[tuple[str, Any, float]] = [
        ("dollars", lambda item: item.usd, 1.0),
        ("billed hours", lambda item: item.hours, 1.0),
        ("tokens (billions)", lambda item: item.tokens, 1e-9),
        ("preemptions", lambda item: item.preemptions, 1.0),
        ("held hours wasted (%)", lambda item: item.wasted_share, 100.0),
    ]
    figure, axes = _figure(len(panels), (12.5, 1.4 + 0.45 * len(names)), columns=True)
    for axis, (label, spread, scale) in zip(axes, panels, strict=True):
        for row, policy in enumerate(names):
            _bar(axis, row, spread(done.policies[policy]), scale, DENSE if policy == DEFAULT else OTHER)
        axis.set_title(label, fontsize=10)
        axis.set_ylim(-0.6, len(names) - 0.4)
        right = max(axis.get_xlim()[1], budget_usd * 1.05 if axis is axes[0] else 0.0)
        axis.set_xlim(-0.03 * right, right)
        axis.grid(True, axis="x")
        axis.tick_params(length=0)
        axis.set_yticks(range(len(names)), [_label(done, policy) for policy in names] if axis is axes[0] else [])
    axes[0].axvline(budget_usd, color=MIXTURE, linewidth=1, linestyle="--")
    figure.suptitle(
        f"{name}: {done.num_runs} draws, cap ${budget_usd:,.0f} (dashed); lines from P10 to P90, dots at P50",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    _save(figure, path, f"slm simulate {name}")


# ---------------------------------------------------------------- parts


def _figure(panels: int, size: tuple[float, float], *, columns: bool = False, **options: Any) -> Any:
    """A figure without a window, so that nothing needs a display."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    mpl.rcParams.update(STYLE)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = (
        figure.subplots(1, panels)
        if columns
        else figure.subplots(panels, 1, sharex=True, height_ratios=options["height_ratios"])
    )
    return figure, axes


def _mark(axis: Any, best: Point, colour: str, *, above_curve: bool) -> None:
    work, loss = best.workload, best.predicted.nats_per_token
    active = f" ({count(work.active_params)} active)" if best.is_mixture else ""
    axis.plot([work.num_params], [loss], "o", color=colour, markersize=9, markerfacecolor="white", markeredgewidth=2)
    axis.annotate(
        f"lowest: {count(work.num_params)}{active}, {loss:.2f} nats\n{count(work.num_tokens)} tokens, "
        f"{best.estimate.layout.world_size}x{best.estimate.offer.accelerator}",
        (work.num_params, loss),
        xytext=(0, 34 if above_curve else -34),
        textcoords="offset points",
        ha="center",
        va="bottom" if above_curve else "top",
        color=colour,
        fontsize=9,
        arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8},
    )


def _spread_note(points: Sequence[Point]) -> str:
    known = [loss for point in points if not point.is_mixture and (loss := known_loss(point.estimate)) is not None]
    if not known:
        return ""
    half = (known[0].high_nats - known[0].low_nats) / 2
    return f"80 % interval: {half:.2f} nats up and down, shared by all sizes. Law: {known[0].law}."


def _bar(axis: Any, row: int, spread: Spread, scale: float, colour: str) -> None:
    axis.plot([spread.p10 * scale, spread.p90 * scale], [row, row], color=colour, linewidth=3, solid_capstyle="round")
    axis.plot([spread.p50 * scale], [row], "o", color=colour, markersize=7)


def _label(done: Simulation, policy: str) -> str:
    return f"{policy.replace('_', ' ')} ({100 * done.policies[policy].finished_share:.0f} % finish)"


def _counts(axis: Any) -> None:
    """100M, 1B and so on under a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    def shown(value: float, _: int) -> str:
        return f"{value / 1e9:g}B" if value >= 1e9 else f"{value / 1e6:g}M"

    axis.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(shown))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _save(figure: Any, path: Path, title: str) -> None:
    """Write the file; the svg has no date, so that the same numbers give the same file."""
    if path.suffix.lower() == ".png":
        figure.savefig(path, dpi=DOTS_PER_INCH)
        return
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    if path.suffix.lower() == ".html":
        svg = PAGE.format(title=html.escape(title), svg=svg[svg.index("<svg") :])
    path.write_text(svg, encoding="utf-8")
