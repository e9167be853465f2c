"""Renting from real clouds: which of a plan's offers may be rented, on which terms, and the backend that does it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

from cost.errors import SlmError, UserError
from cost.ledger.leases import Lease
from cost.market.clouds import cloud_terms
from cost.market.offers import Offer
from cost.market.providers import Ttl, balance_refusal, provider, refusal
from orchestrator.backends.cloud_support import CloudSupport
from orchestrator.backends.registry import SKY_FOLDER, cloud_supports
from orchestrator.backends.sky.backend import SkyBackend, SkySettings
from orchestrator.backends.sky.terminators import armed_provider
from orchestrator.planning.history import record_start
from orchestrator.supervisor.lease_policy import Terms, TermsOf, terms_on, worst_price
from tasks.recipe.schema import Recipe
from trainer.run_store.base import Store

BOOT_SHARE = 0.9
"""A create is given up after this share of the provider's boot time, so that no first grant begins later."""


def terms_on_clouds(recipe: Recipe) -> TermsOf:
    """Each offer's terms: those of its provider, with what the recipe says of leases."""
    wish = recipe.cloud

    def terms(offer: Offer) -> Terms:
        item = provider(offer.cloud)
        found = terms_on(
            item,
            startup_seconds=cloud_terms(offer.cloud).startup_seconds,
            drain_seconds=wish.drain_seconds,
            balance_usd=wish.balance_usd.get(offer.cloud) if item.balance_only else None,
        )
        ttl = wish.ttl_seconds if wish.ttl_seconds is not None else found.fixed_ttl_seconds
        return replace(
            found,
            term_seconds=wish.lease_seconds,
            poll_seconds=wish.poll_seconds,
            fixed_ttl_seconds=ttl if item.ttl is Ttl.FIXED else found.fixed_ttl_seconds,
        )

    return terms


def rentable(
    offers: Sequence[Offer], recipe: Recipe, *, free_usd: Decimal, allow_unguarded: bool
) -> tuple[list[Offer], list[str]]:
    """Offers that may be rented, in the same order, and why the others may not."""
    known, reasons = cloud_supports(), dict[str, str]()
    found = []
    for offer in offers:
        reason = refused(offer, recipe, known, free_usd=free_usd, allow_unguarded=allow_unguarded)
        if reason is None:
            found.append(offer)
        else:
            reasons.setdefault(reason, offer.offer_id)
    return found, list(reasons)


def refused(
    offer: Offer, recipe: Recipe, known: Mapping[str, CloudSupport], *, free_usd: Decimal, allow_unguarded: bool
) -> str | None:
    """Why this offer may not be rented by this version."""
    item = provider(offer.cloud)
    reason = refusal(armed_provider(item, known), allow_unguarded=allow_unguarded)
    if reason is None:
        reason = balance_refusal(item, balance_usd=recipe.cloud.balance_usd.get(offer.cloud), free_usd=free_usd)
    if reason is None:
        try:
            worst_price(offer, item.price_bound)
        except SlmError as error:
            return str(error)
    return reason


def require_cloud_store(store: str | None) -> None:
    """Raises UserError for a run store that nodes of a cloud cannot reach."""
    if store is None or not store.startswith("s3://"):
        raise UserError(
            "nodes of a cloud reach no folder of this machine; give a bucket that you may write to: "
            "--store s3://bucket/prefix (of another provider: with ?endpoint_url=https://host)."
        )


def node_credentials() -> str | None:
    """The run store's credentials as AWS's tools write them, for a file on the nodes' disks; never printed.

    Raises:
        UserError: There are none.
    """
    import boto3

    found = boto3.session.Session().get_credentials()
    keys = None if found is None else found.get_frozen_credentials()
    if keys is None or not keys.access_key:
        raise UserError(
            "no credentials for the run store were found where AWS's tools look (environment, ~/.aws, role); nothing "
            "was rented. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run: aws configure"
        )
    lines = [f"aws_access_key_id = {keys.access_key}", f"aws_secret_access_key = {keys.secret_key}"]
    if keys.token:
        lines.append(f"aws_session_token = {keys.token}")
    return "\n".join(["[default]", *lines, ""])


def store_region(environ: Mapping[str, str] = os.environ) -> str:
    return environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or ""


def sky_backend(
    folder: Path,
    store: Store,
    offers: Sequence[Offer],
    recipe: Recipe,
    *,
    allow_unguarded: bool,
    known_leases: Callable[[], Sequence[str]],
    tell: Callable[[str], None],
    starts: Path,
) -> SkyBackend:
    """The backend of one run; `starts`: where it is kept how long nodes took to be set up."""

    def remember_start(lease: Lease, parts: dict[str, float]) -> None:
        rest = {name: seconds for name, seconds in parts.items() if name != "seconds"}
        record_start(starts, cloud=lease.offer.cloud, seconds=parts["seconds"], parts=rest)

    boots = [provider(offer.cloud).boot_seconds for offer in offers]
    settings = SkySettings(
        launch_seconds=BOOT_SHARE * min(boots, default=600.0),
        capacity_seconds=recipe.cloud.capacity_seconds,
        allow_unguarded=allow_unguarded,
    )
    return SkyBackend(
        folder / SKY_FOLDER,
        store,
        offers=offers,
        settings=settings,
        supports=cloud_supports(),
        known_leases=known_leases,
        credentials=node_credentials,
        region=store_region(),
        tell=tell,
        on_ready=remember_start,
    )
