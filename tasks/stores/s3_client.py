"""A client of S3 that repeats nothing by itself, and how long its requests are waited for.

boto3 is imported only when a client is made.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import Any

from cost.errors import UserError
from tasks.stores.s3_errors import refusal_of
from trainer.run_store.base import StoreError

ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
MOST_CONNECTIONS = 32


@dataclass(frozen=True)
class Patience:
    """How a request that failed for a passing reason is repeated."""

    attempts: int = 9
    first_wait_seconds: float = 0.1
    longest_wait_seconds: float = 10.0
    reply_seconds: float = 60.0
    """How long a connection may be silent."""

    def wait_seconds(self, failures: int) -> float:
        """Doubled each time, with chance in it so that many nodes do not come back together."""
        longest = min(self.longest_wait_seconds, self.first_wait_seconds * 2.0 ** (failures - 1))
        return longest * random.uniform(0.5, 1.0)


def endpoint_of_environment() -> str | None:
    """Where AWS's own tools would go, None for AWS itself."""
    return next((os.environ[name] for name in ENDPOINT_VARIABLES if os.environ.get(name)), None)


def make_client(endpoint_url: str | None, patience: Patience) -> Any:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise UserError(
            f"a run store on S3 needs boto3 ({error}); install it with: pip install 'slm-spot[cloud]'"
        ) from error
    config = Config(
        connect_timeout=min(10.0, patience.reply_seconds),
        read_timeout=patience.reply_seconds,
        # Repeated here instead: only we know which repetition is safe, and what a lost reply means.
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=MOST_CONNECTIONS,
        s3={"addressing_style": "path"} if endpoint_url else {},
    )
    try:
        return boto3.session.Session().client("s3", endpoint_url=endpoint_url, config=config)
    except (BotoCoreError, ValueError) as error:
        fact, fix = refusal_of(error).value
        raise StoreError(f"cannot open a run store on S3: {fact} ({error}); {fix}") from error
