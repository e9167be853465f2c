"""EC2's own time limit: a one-time schedule that terminates an instance, and a power-off that terminates it.

EventBridge Scheduler calls TerminateInstances at a time that can be moved; it works while the guest hangs and no
supervisor is left. There is one schedule per instance, since TerminateInstances refuses a call that names one unknown
id. SkyPilot's template sets no InstanceInitiatedShutdownBehavior, whose default is to stop, and a stopped machine's
disk is still billed; it is read, set and read again here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from orchestrator.backends.aws.account import AwsAccount, Ec2Instance
from orchestrator.backends.base import BackendError
from orchestrator.backends.provider_account import ProviderRefused, RefusalReason

ROLE_NAME = "slm-end-nodes"
"""The role that the scheduler acts as; made when a node is first rented, one for all runs of an account."""
SCHEDULE_PREFIX = "slm-end-"
TARGET_ARN = "arn:aws:scheduler:::aws-sdk:ec2:terminateInstances"
MOST_ATTEMPTS = 185
OLDEST_SECONDS = 86_400
"""How often and how long the scheduler repeats a call that failed temporarily (its own limits)."""
ROLE_TRIES = 10
ROLE_PAUSE_SECONDS = 3.0
"""A role that was just made is not known everywhere at once."""
TERMINATE = "terminate"


class Ec2Limit:
    """Time limits of instances in one account. Each call may be repeated."""

    def __init__(self, account: AwsAccount, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._account = account
        self._sleep = sleep
        self._role_arn = ""
        self._powers_off: set[str] = set()
        """Instances that are known to terminate, not stop, when their guest powers off."""

    def arm(self, region: str, instances: Iterable[Ec2Instance], seconds: float) -> None:
        """Terminate them `seconds` from now unless called again; a power-off from inside terminates them at once.

        Raises:
            BackendError: Some could not be armed; the message names what is missing.
        """
        nodes = list(instances)
        for node in nodes:
            self.schedule(region, node.instance_id, seconds)
        for node in nodes:
            self.terminate_on_shutdown(region, node)

    # -- the schedule ------------------------------------------------------------------------------

    def schedule(self, region: str, instance_id: str, seconds: float) -> None:
        """Make the schedule, or move the existing one. It deletes itself after it has run."""
        for attempt in range(ROLE_TRIES):
            wanted = self.request(instance_id, seconds)
            try:
                self._put(region, wanted)
                return
            except ProviderRefused as refused:
                if refused.code != "ValidationException" or "assume" not in str(refused) or attempt == ROLE_TRIES - 1:
                    raise
                self._sleep(ROLE_PAUSE_SECONDS)

    def _put(self, region: str, wanted: dict[str, Any]) -> None:
        try:
            self._account.ask("scheduler", region, "update_schedule", **wanted)
        except ProviderRefused as refused:
            if refused.reason is not RefusalReason.MISSING:
                raise
            self._account.ask("scheduler", region, "create_schedule", **wanted)

    def request(self, instance_id: str, seconds: float) -> dict[str, Any]:
        """The arguments of create and update; an update replaces everything, so both are complete."""
        role = self.role_arn()
        at = self._account.now() + timedelta(seconds=seconds)
        return {
            "Name": SCHEDULE_PREFIX + instance_id,
            "Description": "terminates a node whose paid time is over",
            "ScheduleExpression": f"at({at.astimezone(UTC):%Y-%m-%dT%H:%M:%S})",
            "ScheduleExpressionTimezone": "UTC",
            "FlexibleTimeWindow": {"Mode": "OFF"},
            "ActionAfterCompletion": "DELETE",
            "State": "ENABLED",
            "Target": {
                "Arn": TARGET_ARN,
                "RoleArn": role,
                "Input": json.dumps({"InstanceIds": [instance_id]}),
                "RetryPolicy": {"MaximumRetryAttempts": MOST_ATTEMPTS, "MaximumEventAgeInSeconds": OLDEST_SECONDS},
            },
        }

    def ends_at(self, region: str, instance_id: str) -> datetime | None:
        """When the schedule runs, as AWS shows it; None where there is none."""
        try:
            found = self._account.ask("scheduler", region, "get_schedule", Name=SCHEDULE_PREFIX + instance_id)
        except ProviderRefused as refused:
            if refused.reason is RefusalReason.MISSING:
                return None
            raise
        text = str(found["ScheduleExpression"]).removeprefix("at(").removesuffix(")")
        return datetime.fromisoformat(text).replace(tzinfo=UTC)

    def release(self, region: str, instance_ids: Sequence[str]) -> None:
        """Delete the schedules of instances that are gone; quiet where there are none."""
        for instance_id in instance_ids:
            try:
                self._account.ask("scheduler", region, "delete_schedule", Name=SCHEDULE_PREFIX + instance_id)
            except ProviderRefused as refused:
                if refused.reason is not RefusalReason.MISSING:
                    raise

    def role_arn(self) -> str:
        """The role that the scheduler acts as; made, with its only permission, where it is missing."""
        if not self._role_arn:
            try:
                found = self._account.ask("iam", "us-east-1", "get_role", RoleName=ROLE_NAME)
            except ProviderRefused as refused:
                if refused.reason is not RefusalReason.MISSING:
                    raise
                trust = json.dumps(trust_policy())
                found = self._account.ask(
                    "iam", "us-east-1", "create_role", RoleName=ROLE_NAME, AssumeRolePolicyDocument=trust
                )
            # Written each time, since a create that was cut off leaves a role that may do nothing.
            document = json.dumps(role_policy())
            self._account.ask(
                "iam", "us-east-1", "put_role_policy", RoleName=ROLE_NAME, PolicyName="end", PolicyDocument=document
            )
            self._role_arn = found["Role"]["Arn"]
        return self._role_arn

    # -- power-off ---------------------------------------------------------------------------------

    def terminate_on_shutdown(self, region: str, instance: Ec2Instance) -> None:
        """Let a power-off of the guest terminate the instance.

        Raises:
            BackendError: It would still only stop.
        """
        if instance.instance_id in self._powers_off:
            return
        if self.shutdown_behaviour(region, instance.instance_id) != TERMINATE:
            try:
                self._account.ask(
                    "ec2",
                    region,
                    "modify_instance_attribute",
                    InstanceId=instance.instance_id,
                    Attribute="instanceInitiatedShutdownBehavior",
                    Value=TERMINATE,
                )
            except ProviderRefused as refused:
                # A one-time spot request knows no stop, and some attributes of it cannot be modified.
                if not (instance.is_spot and refused.reason is RefusalReason.UNSUPPORTED):
                    raise
            else:
                behaviour = self.shutdown_behaviour(region, instance.instance_id)
                if behaviour != TERMINATE:
                    raise BackendError(
                        f"{instance.instance_id} in {region} would {behaviour} when it powers off, and its disk would "
                        "still be billed; its schedule terminates it, or terminate it now with: slm stop"
                    )
        self._powers_off.add(instance.instance_id)

    def shutdown_behaviour(self, region: str, instance_id: str) -> str:
        """What AWS does when the guest powers off: stop or terminate."""
        found = self._account.ask(
            "ec2",
            region,
            "describe_instance_attribute",
            InstanceId=instance_id,
            Attribute="instanceInitiatedShutdownBehavior",
        )
        return str((found.get("InstanceInitiatedShutdownBehavior") or {}).get("Value", ""))


def trust_policy() -> dict[str, Any]:
    """Who may act as the role: the scheduler."""
    return {
        "Version": "2012-10-17",
        "Statement": [
            {"Effect": "Allow", "Principal": {"Service": "scheduler.amazonaws.com"}, "Action": "sts:AssumeRole"}
        ],
    }


def role_policy() -> dict[str, Any]:
    """What the role may do: terminate instances that carry our label."""
    return {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Action": "ec2:TerminateInstances",
                "Resource": "arn:aws:ec2:*:*:instance/*",
                "Condition": {"StringLike": {"aws:ResourceTag/slm-lease": "slm-*"}},
            }
        ],
    }
