"""Numbers as people read them."""

from __future__ import annotations

from decimal import Decimal

import pytest

from orchestrator.figures import bar, count, dollars, duration, nats, plural, usd_per_param


@pytest.mark.parametrize(
    ("usd", "text"),
    [
        (Decimal(100), "$100.00"),
        (Decimal("1234.567"), "$1,234.57"),
        (Decimal("0.999"), "$1.00"),
        (Decimal("0.0421"), "$0.0421"),
        (Decimal("0.00002"), "$2.0e-05"),
        (Decimal(0), "$0.00"),
        (None, "-"),
    ],
)
def test_dollars_keep_small_sums_apart(usd: Decimal | None, text: str) -> None:
    assert dollars(usd) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1.00K"),
        (12_345, "12.3K"),
        (99_970, "100K"),
        (123_456, "123K"),
        (999.6, "1.00K"),
        (999_999, "1.00M"),
        (1_100_048_384, "1.10B"),
        (22e12, "22.0T"),
        (None, "-"),
    ],
)
def test_counts_have_three_digits(number: float | None, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (-3, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (80, "1 min 20 s"),
        (3600, "1 h 00 min"),
        (86_399, "1 d 00 h"),
        (200_000, "2 d 08 h"),
        (None, "-"),
    ],
)
def test_durations_show_two_units(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_small_figures() -> None:
    assert usd_per_param(Decimal("0.0000000312")) == "3.12e-08"
    assert usd_per_param(None) == nats(None) == "-"
    assert nats(4.1234) == "4.123"
    assert [plural(1, "node"), plural(2, "node")] == ["1 node", "2 nodes"]


@pytest.mark.parametrize(("share", "text"), [(0, "░░░░"), (0.5, "██░░"), (1, "████"), (1.7, "████"), (-1, "░░░░")])
def test_a_bar_is_always_as_wide_as_asked(share: float, text: str) -> None:
    assert bar(share, 4) == text
