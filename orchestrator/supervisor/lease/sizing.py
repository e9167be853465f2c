"""How much a new lease reserves: its worst-case price, its first term or fixed limit, and what a prepaid account holds.

The first term, or the limit, shrinks to what is affordable.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal

from cost.ledger.leases import Lease, lease_id_for, usd
from cost.ledger.ledger import Ledger
from cost.ledger.recovery import Candidate
from cost.market.offers import Offer
from cost.market.providers import Ttl
from orchestrator.clock import Clock
from orchestrator.supervisor.incidentals import Incidentals
from orchestrator.supervisor.lease_policy import Terms, TermsOf, worst_price

RENT_SLACK_SECONDS = 5.0
"""What an otherwise exhausted budget keeps, so that it still pays when the rent comes so long after the reservation."""


@dataclass(frozen=True, slots=True)
class LeaseSizing:
    """Sizes the leases of one run by what its ledger has left; changes nothing."""

    run_id: str
    owner: str
    ledger: Ledger
    clock: Clock
    terms: TermsOf
    incidentals: Incidentals | None

    def new_lease(self, offer: Offer, num_nodes: int) -> Lease:
        """The run's next lease, as long as is wanted and affordable."""
        attempt = 1 + max((account.lease.attempt for account in self.ledger.accounts()), default=0)
        terms = self.terms(offer)
        worst = worst_price(offer, terms.price_bound)
        fixed = terms.first_seconds(terms.kill_latency_seconds) + RENT_SLACK_SECONDS
        incidental_hourly, incidental_once = self._incidental_usd(offer, num_nodes)
        free = self.ledger.balance().free_usd - incidental_once
        affordable = seconds_for(free, worst * num_nodes + incidental_hourly, self.clock.scale) - fixed
        ttl = min(terms.fixed_ttl_seconds, affordable) if terms.ttl is Ttl.FIXED else 0.0
        if terms.balance_usd is not None:  # paid to the last cent of it: what a hung node would use up
            ttl = seconds_for(self._balance_left(offer, terms), worst * num_nodes, self.clock.scale)
        term = min(max(terms.term_seconds, terms.startup_seconds + terms.drain_seconds), affordable)
        return Lease(
            lease_id=lease_id_for(self.owner, self.run_id, attempt),
            run_id=self.run_id,
            attempt=attempt,
            offer=offer,
            num_nodes=num_nodes,
            worst_usd_per_hour=worst,
            first_grant_seconds=max(min(term, ttl) if ttl else term, 1.0),
            kill_latency_seconds=terms.kill_latency_seconds,
            fencing_token=self.ledger.fencing_token,
            minimum_billed_seconds=terms.minimum_billed_seconds,
            ttl_seconds=max(ttl, 1.0) if ttl else 0.0,
        )

    def with_prepaid_accounts(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Candidates with all that renting them reserves: of a prepaid account everything that is left on it.

        Those whose account holds too little for a useful lease are left out.
        """
        found = []
        for candidate in candidates:
            terms = self.terms(candidate.offer)
            if terms.balance_usd is None:
                found.append(candidate)
                continue
            left = self._balance_left(candidate.offer, terms)
            hours = Decimal(terms.first_seconds(terms.kill_latency_seconds) * self.clock.scale) / 3600
            beyond = worst_price(candidate.offer, terms.price_bound) * candidate.num_nodes * hours
            if left >= candidate.needed_usd:
                found.append(replace(candidate, needed_usd=left + beyond))
        return found

    def _incidental_usd(self, offer: Offer, num_nodes: int) -> tuple[Decimal, Decimal]:
        """A lease's disks and transfers: dollars per billed hour, and those due once that are not yet reserved."""
        if self.incidentals is None:
            return Decimal(0), Decimal(0)
        once = Decimal(0) if self.ledger.accounts() else self.incidentals.download(offer)
        return self.incidentals.rates(offer).usd_per_hour(num_nodes), once

    def _balance_left(self, offer: Offer, terms: Terms) -> Decimal:
        """What is left on the prepaid account of that cloud, from which only this run pays."""
        spent = sum(
            account.spent_micro_usd for account in self.ledger.accounts() if account.lease.offer.cloud == offer.cloud
        )
        return max(Decimal(0), (terms.balance_usd or Decimal(0)) - usd(spent))


def seconds_for(amount_usd: Decimal, usd_per_hour: Decimal, scale: float) -> float:
    """How many real seconds the money pays for, where `scale` billed seconds pass in each."""
    return float(amount_usd / usd_per_hour) * 3600 / scale
