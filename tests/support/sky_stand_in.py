"""A worker that speaks the protocol of `orchestrator.backends.sky.worker` and rents from a JSON file.

    python sky_stand_in.py CLOUD_JSON STORE_FOLDER

The file is the provider: {"capacity": n, "clusters": {name: {instance: {"ip", "until", "alive"}}}, "calls": [...]}. A
node that starts writes its guard's request into the store, as real nodes do.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

PRICE = "1.25"


class Cloud:
    """One process at a time writes it; the test reads and writes it between calls."""

    def __init__(self, path: Path, store: Path) -> None:
        self.path, self.store = path, store
        self.state: dict[str, Any] = json.loads(path.read_text())

    def save(self) -> None:
        self.path.write_text(json.dumps(self.state))

    def alive(self, name: str) -> dict[str, Any]:
        nodes = self.state["clusters"].get(name, {})
        return {name: node for name, node in nodes.items() if node["alive"] and not self.over(node)}

    def over(self, node: dict[str, Any]) -> bool:
        return node["until"] is not None and time.time() > node["until"]

    def record(self, name: str) -> dict[str, Any]:
        nodes = self.alive(name)
        order = sorted(nodes, key=lambda node: nodes[node]["ip"])
        return {
            "cluster": name,
            "name_on_cloud": f"{name}-0123abcd",
            "provider": "example",
            "provider_config": {"module": "example"},
            "usd_per_hour": PRICE,
            "instances": [[item, nodes[item]["ip"]] for item in order],
        }

    def check(self, _: dict[str, Any]) -> dict[str, Any]:
        if self.state.get("broken"):
            return {"failure": {"trouble": "server", "message": "address in use"}}
        return {"result": {"enabled": self.state.get("enabled", ["example"])}}

    def launch(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.state.get("fail"):
            return {"failure": self.state["fail"]}
        name, wanted = request["cluster"], request["task"]["num_nodes"]
        facts = json.loads((Path(request["task"]["workdir"]) / "node.json").read_text())
        have = self.alive(name)
        missing = wanted - len(have)
        running = sum(len(self.alive(item)) for item in self.state["clusters"])
        if running + missing > self.state["capacity"]:
            free = self.state["capacity"] - running
            return {"failure": {"trouble": "capacity", "message": f"{free} nodes free, {missing} requested"}}
        nodes = self.state["clusters"].setdefault(name, {})
        until = time.time() + facts["first_grant_seconds"] if facts["first_grant_seconds"] < 10 else None
        for _ in range(missing):
            self.state["made"] += 1
            # New addresses sort before old ones: ranks must not follow the order of addresses.
            nodes[f"i-{self.state['made']}"] = {
                "ip": f"10.0.0.{200 - self.state['made']}",
                "until": until,
                "alive": True,
            }
        self.state["facts"] = facts
        request_json = self.store / "guard" / facts["lease_id"] / "0" / "request.json"
        request_json.parent.mkdir(parents=True, exist_ok=True)
        if self.state.get("guards", True):
            request_json.write_text(json.dumps({"number": 1, "state": "running", "exit_code": None}))
        return {"result": self.record(name)}

    def query(self, request: dict[str, Any]) -> dict[str, Any]:
        seen = {instance: {"status": "UP", "reason": ""} for instance in self.alive(request["cluster"])}
        return {"result": {"instances": seen, "server": True, "record": {}}}

    def list(self, _: dict[str, Any]) -> dict[str, Any]:
        found = [{**self.record(name), "seen": sorted(self.alive(name))} for name in self.state["clusters"]]
        return {"result": {"clusters": [entry for entry in found if entry["seen"]], "problems": []}}

    def end(self, request: dict[str, Any]) -> dict[str, Any]:
        for node in self.state["clusters"].get(request["cluster"], {}).values():
            node["alive"] = False
        return {"result": {"left": self.state.get("left", []), "trouble": ""}}


def main() -> None:
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        cloud = Cloud(Path(sys.argv[1]), Path(sys.argv[2]))
        cloud.state["calls"].append(request["call"])
        if cloud.state.get("hang") == request["call"]:
            time.sleep(600)
        if cloud.state.get("die") == request["call"]:
            sys.exit(1)
        if request["call"] == "launch":
            sys.stdout.write(json.dumps({"event": "record", "record": cloud.record(request["cluster"])}) + "\n")
        reply = getattr(cloud, request["call"])(request)
        cloud.save()
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
