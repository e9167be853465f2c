"""The worst-case price of an offer."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import pytest

from cost.errors import SlmError
from cost.market.providers import PriceBound
from orchestrator.supervisor.lease_policy import worst_price
from tests.support.supervised_run import PRICE, offer_in


def test_the_worst_price_is_on_demand_unless_the_price_is_fixed() -> None:
    offer = offer_in("zone-0")
    assert worst_price(offer, PriceBound.FIXED) == PRICE
    assert worst_price(offer, PriceBound.ON_DEMAND) == Decimal("1.20")


def test_an_offer_whose_price_nothing_bounds_is_not_rented() -> None:
    with pytest.raises(SlmError, match="nothing bounds the future price"):
        worst_price(replace(offer_in("zone-0"), on_demand_usd_per_hour=None), PriceBound.ON_DEMAND)
