"""What ends a node: requests as the providers document them, their order, and the refusal to start with too few."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from tasks import guard
from tasks.guard import Killer, killers_of, unarmed
from tests.support.guarded import KILLERS, SLEEPER, Node, node, until
from tests.support.moto_cloud import REGION, Cloud, moto_cloud
from tests.support.small_server import Route, aws_metadata, azure_metadata, gcp_metadata, small_server

__all__ = ["node"]
WORDS = ("--lease", "l", "--rank", "0", "--first-grant", "1", "--mark", "m", "--node-dir", "d")
SYSTEM_COMMANDS = ("systemctl", "systemd-run", "shutdown")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="powering off is for root")


@pytest.fixture(scope="module")
def cloud() -> Iterator[Cloud]:
    with moto_cloud() as made:
        yield made


def killer(word: str, *options: str) -> Killer:
    """The only one of a name."""
    (found,) = killers_of(guard.parse([*WORDS, "--kill", word, *options, "--", "true"]))
    return found


def fire(killer: Killer) -> str:
    assert killer.fire is not None
    return killer.fire()


# -- each provider's API ---------------------------------------------------------------------------


def test_terminate_ec2_ends_its_own_instance_with_the_role_of_the_instance(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ec2 = cloud.client("ec2")
    image = ec2.describe_images()["Images"][0]["ImageId"]
    started = ec2.run_instances(ImageId=image, MinCount=2, MaxCount=2)["Instances"]
    mine, other = (instance["InstanceId"] for instance in started)
    role = {"AccessKeyId": cloud.access_key, "SecretAccessKey": cloud.secret_key, "Token": ""}
    folder = "meta-data/iam/security-credentials/"
    routes = aws_metadata(
        {
            "meta-data/instance-id": mine,
            "meta-data/placement/region": REGION,
            folder: "slm-node",
            f"{folder}slm-node": lambda _: (200, json.dumps(role)),
        }
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with small_server(routes) as server:
        ec2_killer = killer(f"terminate-ec2:{cloud.url}", "--metadata-base", server.url)
        with cloud.verifying():  # moto recomputes the signature and asks for the policy
            assert unarmed([ec2_killer]) == {}
        assert states(cloud, mine, other) == ["running", "running"]  # the check was a dry run
        with cloud.verifying():
            assert fire(ec2_killer) == "HTTP 200"
        assert states(cloud, mine, other) == ["terminated", "running"]
        role["SecretAccessKey"] = "wrong"
        with cloud.verifying():
            assert "AuthFailure" in unarmed([ec2_killer])["terminate-ec2"]


def states(cloud: Cloud, *instances: str) -> list[str]:
    listed = cloud.client("ec2").describe_instances(InstanceIds=list(instances))["Reservations"]
    found = {each["InstanceId"]: each["State"]["Name"] for item in listed for each in item["Instances"]}
    return [found[name] for name in instances]


def test_the_ec2_request_is_the_one_that_boto3_sends(cloud: Cloud) -> None:
    sent: list[Any] = []
    client = cloud.client("ec2")
    client.meta.events.register("before-send.ec2.TerminateInstances", lambda request, **_: sent.append(request))
    image = client.describe_images()["Images"][0]["ImageId"]
    instance_id = client.run_instances(ImageId=image, MinCount=1, MaxCount=1)["Instances"][0]["InstanceId"]
    client.terminate_instances(InstanceIds=[instance_id])
    ours = guard.ec2_terminate(guard.Credentials("A", "B"), REGION, instance_id, time.time())
    assert ours.url == f"https://ec2.{REGION}.amazonaws.com/"
    theirs = sent[0].body if isinstance(sent[0].body, str) else sent[0].body.decode()
    assert parse_qs(ours.body.decode()) == parse_qs(theirs)
    assert (ours.method, ours.headers["content-type"]) == (sent[0].method, sent[0].headers["Content-Type"].decode())


GCP_PLACE = "projects/my-project/zones/us-east1-b/instances/node-0"
GCP: dict[str, Route] = {
    "project/project-id": "my-project",
    "instance/zone": "projects/1234567890/zones/us-east1-b",
    "instance/name": "node-0",
    "instance/service-accounts/default/token": {"access_token": "ya29.t", "expires_in": 3599, "token_type": "Bearer"},
}


def test_terminate_gcp_deletes_its_own_instance_and_knows_before_whether_it_may() -> None:
    permission = f"POST /compute/v1/{GCP_PLACE}/testIamPermissions"
    routes: dict[str, Route] = {
        **gcp_metadata(GCP),
        permission: {"permissions": ["compute.instances.delete"]},
        f"DELETE /compute/v1/{GCP_PLACE}": {"kind": "compute#operation", "status": "RUNNING"},
    }
    with small_server(routes) as server:
        gcp = killer(f"terminate-gcp:{server.url}/compute/v1", "--metadata-base", server.url)
        assert unarmed([gcp]) == {}
        asked = server.asked[-1]
        assert json.loads(asked.body) == {"permissions": ["compute.instances.delete"]}
        assert not server.seen("DELETE", f"/compute/v1/{GCP_PLACE}")
        assert fire(gcp) == "HTTP 200"
        assert server.asked[-1].headers["authorization"] == "Bearer ya29.t"
        routes[permission] = {}
        assert "may not delete" in unarmed([gcp])["terminate-gcp"]
        del routes[f"DELETE /compute/v1/{GCP_PLACE}"]
        with pytest.raises(OSError, match="HTTP 404"):
            fire(gcp)
    assert guard.gcp_delete(guard.GCP_API, GCP_PLACE, "t").url == (
        "https://compute.googleapis.com/compute/v1/projects/my-project/zones/us-east1-b/instances/node-0"
    )


def test_terminate_azure_deletes_the_machine_rather_than_stopping_it() -> None:
    resource = "/subscriptions/s-1/resourceGroups/g/providers/Microsoft.Compute/virtualMachines/node-0"
    routes: dict[str, Route] = {
        **azure_metadata(
            {
                "instance": lambda _: (200, json.dumps({"compute": {"resourceId": resource, "name": "node-0"}})),
                "identity/oauth2/token": lambda _: (200, json.dumps({"access_token": "eyJ0", "token_type": "Bearer"})),
            }
        ),
        f"DELETE {resource}": (202, ""),
    }
    with small_server(routes) as server:
        azure = killer(f"terminate-azure:{server.url}", "--metadata-base", server.url)
        assert unarmed([azure]) == {}
        assert not server.seen("DELETE", resource)
        assert fire(azure) == "HTTP 202"
        deleted, token = server.asked[-1], server.seen("GET", "/metadata/identity/oauth2/token")[0]
    assert deleted.headers["authorization"] == "Bearer eyJ0"
    assert deleted.query == {"api-version": ["2024-07-01"], "forceDeletion": ["true"]}
    assert token.query == {"api-version": ["2018-02-01"], "resource": ["https://management.azure.com/"]}


def test_runpod_terminates_its_own_pod_and_reads_errors_out_of_a_good_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_POD_ID", "abc123")
    monkeypatch.setenv("RUNPOD_API_KEY", "rp-key")
    with small_server({"POST /graphql": {"data": {"pod": {"id": "abc123"}}}}) as server:
        runpod = killer(f"runpod:{server.url}/graphql")
        assert unarmed([runpod]) == {}
        assert "podTerminate" not in json.loads(server.asked[-1].body)["query"]
        server.routes["POST /graphql"] = {"data": {"pod": None}}
        assert unarmed([runpod]) == {"runpod": "RUNPOD_API_KEY does not see this pod"}
        server.routes["POST /graphql"] = {"data": {"podTerminate": None}}
        assert fire(runpod) == 'answered {"podTerminate": null}'
        sent = server.asked[-1]
        server.routes["POST /graphql"] = {"errors": [{"message": "not allowed"}]}
        with pytest.raises(OSError, match="not allowed"):
            fire(runpod)
    query = json.loads(sent.body)
    assert query["query"].split("{", 1)[1].strip().startswith("podTerminate(input: $input)")
    assert query["variables"] == {"input": {"podId": "abc123"}}
    assert sent.headers["authorization"] == "Bearer rp-key"
    assert "rp-key" not in sent.path + str(sent.query)  # keys in URLs end up in logs


def test_vast_destroys_its_own_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTAINER_ID", "4242")
    monkeypatch.setenv("CONTAINER_API_KEY", "v-key")
    place = "/api/v0/instances/4242/"
    with small_server({f"DELETE {place}": {"success": True}, f"GET {place}": {"instances": {}}}) as server:
        vast = killer(f"vast:{server.url}/api/v0")
        assert unarmed([vast]) == {}
        assert not server.seen("DELETE", place)
        assert fire(vast) == "HTTP 200"
    assert server.asked[-1].headers["authorization"] == "Bearer v-key"


@pytest.mark.parametrize(("name", "variable"), [("runpod", "RUNPOD_POD_ID"), ("vast", "CONTAINER_ID")])
def test_outside_of_its_cloud_a_killer_is_not_armed(name: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable, raising=False)
    assert unarmed([killer(name)]) == {name: f"{variable} is not in the environment of this container"}


def test_what_ssh_does_not_inherit_is_read_from_the_first_process(tmp_path: Path) -> None:
    environ = tmp_path / "environ"
    environ.write_bytes(b"PATH=/bin\0SLM_TEST_POD=a=b\0")
    assert guard.container_variable("SLM_TEST_POD", str(environ)) == "a=b"


def test_a_provider_that_does_not_answer_is_not_armed() -> None:
    slow = Killer("slow", guard.PROVIDER, lambda: "", lambda: time.sleep(60))
    assert unarmed([slow], seconds=0.1) == {"slow": "no answer within 0 s"}


# -- power --------------------------------------------------------------------------------------------


def test_poweroff_escalates_from_systemd_to_the_kernel() -> None:
    options = guard.parse([*WORDS, "--kill", "poweroff", "--", "true"])
    assert [each.name for each in killers_of(options)] == ["poweroff:systemctl", "poweroff:shutdown", "poweroff:sysrq"]
    assert guard.POWER_OFF["shutdown"] == ["shutdown", "-P", "now"]  # -h may only halt, which goes on being billed


def test_powering_off_is_armed_for_root_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert unarmed([killer("poweroff:systemctl")]) == {"poweroff:systemctl": "not root"}


def test_a_timer_in_minutes_never_ends_after_what_is_paid() -> None:
    def command(left: float) -> list[str]:
        return guard.timer_commands("shutdown", "slm-m", 1000.0 + left, 1000.0, [])[0]

    assert command(179.9) == ["shutdown", "-P", "+2"]
    assert command(60.0) == ["shutdown", "-P", "+1"]
    assert command(59.9) == []  # +0 would be now; the one that stands fires


def test_a_timer_of_systemd_is_set_anew_before_the_old_one_goes() -> None:
    new, old = guard.timer_commands("systemd-run", "slm-m", 190.7, 100.0, [12.5])
    assert "--on-active=90s" in new
    assert "--unit=slm-m-190700" in new
    assert new[-2:] == ["systemctl", "poweroff"]
    assert old == [["systemctl", "stop", "slm-m-12500.timer"]]
    again = guard.timer_commands("systemd-run", "slm-m", 250.0, 110.0, [12.5, 190.7])[1]
    assert [words[-1] for words in again] == ["slm-m-12500.timer", "slm-m-190700.timer"]


def system_of(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """An environment in which the system's commands only write down how they were called."""
    bin_dir, calls = tmp_path / "bin", tmp_path / "calls"
    bin_dir.mkdir()
    for name in SYSTEM_COMMANDS:
        (bin_dir / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {shlex.quote(str(calls))}\n')
        (bin_dir / name).chmod(0o755)
    calls.touch()
    return {"PATH": f"{bin_dir}:{os.environ['PATH']}"}, calls


def seconds_of(calls: Path) -> list[int]:
    """Of each timer that systemd was asked for."""
    return [int(part.split("s ")[0]) for part in calls.read_text().split("--on-active=")[1:]]


@as_root
def test_init_ends_the_node_at_a_time_that_moves_with_the_grants(node: Callable[..., Node], tmp_path: Path) -> None:
    env, calls = system_of(tmp_path)
    paid = node(SLEEPER, "--kill", "family", "--timer", "systemd-run", first_grant=40.5, env=env)
    paid.pid_of("command")
    assert seconds_of(calls)[0] in range(20, 41)
    unit = calls.read_text().split("--unit=")[1].split()[0]
    paid.grant(300.0)
    until(lambda: f"systemctl stop {unit}.timer" in calls.read_text())
    assert seconds_of(calls)[1] in range(270, 301)
    second = calls.read_text().splitlines()[1].split("--unit=")[1].split()[0]
    os.kill(paid.pid_of("deadline"), signal.SIGKILL)  # the next guard knows which timer stands
    paid.process.wait()
    paid.grant(500.0, number=paid.number_after(paid.request()["number"]))
    until(lambda: f"systemctl stop {second}.timer" in calls.read_text())


@as_root
def test_family_is_followed_by_a_power_off_where_that_is_what_ends_the_bill(
    node: Callable[..., Node], tmp_path: Path
) -> None:
    env, calls = system_of(tmp_path)
    words = ("--kill", "family", "--kill", "poweroff:systemctl", "--escalate", "0.5")
    real = node(SLEEPER, *words, first_grant=2.0, env=env)
    command = real.pid_of("command")
    until(lambda: calls.read_text().count("systemctl poweroff") >= 2)  # again, while the node lives
    assert guard.start_time(command) is None
    line = next(line for line in until(lambda: results(real)) if line["killer"] == "poweroff:systemctl")
    assert (line["ok"], line["result"]) == (True, "exit code 0")


# -- one after the other ---------------------------------------------------------------------------


def results(node: Node) -> list[dict[str, Any]]:
    return [line for line in node.log_lines() if line["event"] == "kill result"]


def test_each_killer_that_fails_or_leaves_the_node_alive_is_followed_by_the_next(
    node: Callable[..., Node], tmp_path: Path
) -> None:
    fired = tmp_path / "fired"
    killers = [
        f"command:echo broken >> {fired}; echo no such thing; exit 3",
        f"command:echo hangs >> {fired}; sleep 600",
        f"command:echo useless >> {fired}",
    ]
    words = [word for each in killers for word in ("--kill", each)]
    tough = node(SLEEPER, *words, "--escalate", "3", "--allow-unguarded", first_grant=1.5)
    rounds = until(lambda: fired.exists() and (lines := fired.read_text().split()) and len(lines) >= 4 and lines)
    assert rounds[:4] == ["broken", "hangs", "useless", "broken"]
    told = until(lambda: len(results(tough)) >= 2 and tough.log_lines())
    kills = [line for line in told if line["event"] == "kill"]
    assert [line["killer"].split()[1] for line in kills[:3]] == ["broken", "hangs", "useless"]
    assert kills[1]["boottime"] - kills[0]["boottime"] < 3.0  # a failure is not waited out
    assert kills[2]["boottime"] - kills[1]["boottime"] >= 3.0
    broken = results(tough)[0]
    assert (broken["ok"], broken["result"]) == (False, "/bin/sh exited with 3: no such thing")


def test_the_fuse_goes_on_where_a_guard_stands_still_while_it_fires(node: Callable[..., Node], tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    words = ("--kill", f"command:echo one >> {fired}; sleep 600", "--escalate", "600", "--allow-unguarded")
    stuck = node(SLEEPER, *words, first_grant=1.5)
    until(lambda: fired.exists() and fired.read_text() == "one\n")
    os.kill(stuck.pid_of("deadline"), signal.SIGSTOP)
    until(lambda: fired.read_text() == "one\none\n")
    assert (stuck.dir / "fuse.jsonl").exists()


def test_the_fuse_fires_the_same_killers_when_the_guard_cannot(node: Callable[..., Node], tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    words = ("--kill", f"command:echo by fuse >> {fired}", "--kill", "family", "--escalate", "0.3")
    hung = node(SLEEPER, *words, first_grant=2.5)
    hung.pid_of("fuse")
    os.kill(hung.pid_of("deadline"), signal.SIGSTOP)
    until(lambda: fired.exists())
    noted = until(lambda: [json.loads(line) for line in (hung.dir / "fuse.jsonl").read_text().splitlines()])
    assert noted[0]["event"] == "kill"
    assert noted[0]["boottime"] - hung.started >= 2.5 + guard.FUSE_MARGIN_SECONDS


# -- too few ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--kill", "family"), "1 would work here (family)"),
        (("--kill", "family", "--kill", "vast"), "Not armed: vast: CONTAINER_ID is not in the environment"),
        (("--kill", "provider-limit:a", "--kill", "provider-limit:b"), "1 would work here"),
    ],
)
def test_a_node_with_killers_of_one_kind_does_not_start(
    node: Callable[..., Node], tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    begun = tmp_path / "begun"
    bare = node(["touch", str(begun)], *words, first_grant=30.0)
    assert bare.process.wait(timeout=30) == guard.UNGUARDED_EXIT_CODE
    assert said in bare.said()
    assert "--allow-unguarded" in bare.said()
    assert not begun.exists()
    assert not (bare.dir / "deadline.json").exists()  # the next attempt is judged anew
    assert bare.events() == ["refused"]


def test_who_asks_for_it_runs_unguarded(node: Callable[..., Node]) -> None:
    bare = node(SLEEPER, "--kill", "family", "--allow-unguarded", first_grant=30.0)
    bare.pid_of("command")
    armed = until(bare.log_lines)[0]
    assert (armed["event"], armed["killers"], armed["kinds"]) == ("armed", ["family"], ["process"])


def test_a_restarted_guard_does_not_refuse(node: Callable[..., Node], tmp_path: Path) -> None:
    """What armed it may be out of reach by then, and a node without a guard is worse."""
    gate = tmp_path / "gate"
    gate.touch()
    with small_server({"POST /graphql": {"data": {"pod": {"id": "p"}}}}) as server:
        env = {"RUNPOD_POD_ID": "p", "RUNPOD_API_KEY": "k"}
        words = ("--kill", "family", "--kill", f"runpod:{server.url}/graphql")
        kept = node(SLEEPER, *words, first_grant=30.0, env=env)
        first = kept.pid_of("deadline")
    os.kill(first, signal.SIGKILL)
    kept.process.wait()
    assert until(lambda: kept.pid_of("deadline")) != first


@pytest.mark.parametrize("word", ["shoot", "poweroff:halt", "provider-limit", "command"])
def test_a_killer_must_exist(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        guard.parse([*WORDS, "--kill", word, "--", "true"])
    assert f"no killer is called '{word}'; there are family, poweroff" in capsys.readouterr().err


def test_the_local_market_arms_what_a_test_node_arms() -> None:
    from orchestrator.backends.local import spawn

    assert [kind.partition(":")[0] for kind in spawn.KILLERS] == [word.partition(":")[0] for word in KILLERS[1::2]]
