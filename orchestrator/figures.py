"""Numbers as people read them: dollars, counts, durations. One place, so that all tables round alike."""

from __future__ import annotations

from decimal import Decimal

SECONDS_PER_MINUTE = 60
SECONDS_PER_HOUR = 3600
SECONDS_PER_DAY = 86_400
UNKNOWN = "-"


def dollars(usd: Decimal | float | None) -> str:
    """$1,234.56; below a dollar three significant digits, so that small sums do not all read $0.00."""
    if usd is None:
        return UNKNOWN
    amount = float(usd)
    if amount != 0 and abs(amount) < 0.995:
        return f"${amount:#.3g}" if abs(amount) >= 0.0001 else f"${amount:.1e}"
    return f"${amount:,.2f}"


def count(number: float | None) -> str:
    """Three significant digits with K, M, B or T; small whole numbers as they are."""
    if number is None:
        return UNKNOWN
    for suffix, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= 0.9995 * unit:
            return f"{number / unit:#.3g}".rstrip(".") + suffix
    return f"{number:.3g}"


def usd_per_param(usd: Decimal | float | None) -> str:
    """Dollars of the whole run per parameter: around 1e-8, so always as a power of ten."""
    return UNKNOWN if usd is None else f"{float(usd):.2e}"


def bare(number: float) -> str:
    """Five significant digits; whole numbers below a million as they are, the very large and small as powers."""
    if abs(number) < 1e6 and number == int(number):
        return f"{int(number):,}"
    return f"{number:.5g}"


def duration(seconds: float | None) -> str:
    """The two largest units that matter."""
    if seconds is None:
        return UNKNOWN
    whole = round(max(0.0, seconds))
    if whole < SECONDS_PER_MINUTE:
        return f"{whole} s"
    if whole < SECONDS_PER_HOUR:
        return f"{whole // SECONDS_PER_MINUTE} min {whole % SECONDS_PER_MINUTE:02d} s"
    minutes = round(seconds / SECONDS_PER_MINUTE)
    if minutes < SECONDS_PER_DAY // SECONDS_PER_MINUTE:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / SECONDS_PER_HOUR)
    return f"{hours // 24} d {hours % 24:02d} h"


def nats(loss: float | None) -> str:
    """A loss in nats per token."""
    return UNKNOWN if loss is None else f"{loss:.3f}"


def bar(share: float, width: int) -> str:
    """A bar of text, filled to `share` (0..1); what is above is shown full."""
    filled = round(min(1.0, max(0.0, share)) * width)
    return "█" * filled + "░" * (width - filled)


def plural(number: int, noun: str) -> str:
    """1 node, 2 nodes."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
