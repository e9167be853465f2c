"""The largest model that a budget pays for, without a range."""

from __future__ import annotations

from decimal import Decimal

import pytest

from cost.errors import UserError
from cost.market.offers import Offer, load_reference_offers
from cost.plan.frontier import choose_model, model_shape
from cost.plan.planner import make_plan
from cost.plan.sizes import largest_range

OFFERS: tuple[Offer, ...] = tuple(offer for offer in load_reference_offers().offers if offer.accelerator == "H100-SXM")


@pytest.mark.parametrize("budget", [10, 1000])
def test_the_lower_end_can_be_paid_for_and_the_upper_cannot(budget: int) -> None:
    low, high = largest_range(OFFERS, budget_usd=Decimal(budget), tokens_per_param=20.0)
    assert high == 2 * low
    affordable = [make_plan(model_shape(size), OFFERS, budget_usd=Decimal(budget)).affordable for size in (low, high)]
    assert affordable == [True, False]


def test_more_money_never_trains_a_smaller_model() -> None:
    sizes = []
    for budget in (30, 100, 300):
        low, high = largest_range(OFFERS, budget_usd=Decimal(budget), tokens_per_param=20.0)
        chosen = choose_model(OFFERS, low=low, high=high, budget_usd=Decimal(budget)).chosen
        assert chosen is not None
        sizes.append(chosen.workload.num_params)
    assert sizes == sorted(sizes)


def test_a_budget_for_nothing_is_told() -> None:
    with pytest.raises(UserError, match=r"\$0.01 does not pay for even 1e\+07 parameters at 20 tokens each"):
        largest_range(OFFERS, budget_usd=Decimal("0.01"), tokens_per_param=20.0)
