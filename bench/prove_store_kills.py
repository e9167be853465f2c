"""A run is never left without a loadable checkpoint: processes killed while saving, on a folder and on S3 with faults.

    python -m bench.prove_store_kills --kills 500 --seed 0

Each child begins from the newest checkpoint, saves step after step, and is ended by SIGKILL at a random moment; the
S3 store lies behind a proxy that fails requests, cuts bodies, loses replies and lists late. After each kill the newest
whole checkpoint is read: it is at least as new as the last one that was said to be durable, and holds what was saved.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from bench.forked import Forked
from tasks.run_store_keys import CHECKPOINTS, MANIFEST
from tasks.stores import s3
from tasks.stores.opening import open_store
from tests.support.s3_server import BUCKET, CREDENTIALS, FaultProxy, at_random, s3_server
from trainer.checkpoints.lineage import Damaged, checkpoints_of_chain
from trainer.checkpoints.manager import Checkpoints, Counters, Identity, read_tensors
from trainer.config import TrainConfig
from trainer.run_store.base import Store

RATES = {"error": 0.03, "lost": 0.02, "cut": 0.02, "cut_request": 0.02, "stale": 0.03, "slow": 0.01}
NUM_TENSORS = 8
TENSOR_SIZE = 10_000
"""Numbers in each; 320 KB together, so that S3 gets it in several parts."""
PART_BYTES = 2**17
KEEP_LAST = 2
KILL_WITHIN_SECONDS = {"directory": 0.5, "s3": 0.8}
"""Of the beginning; a save takes a fraction of it."""
KILLED_EARLY = 0.1
"""Share of children that are killed within that time of their start, so that some die while they begin."""
IDENTITY = Identity(TrainConfig(), "tokenizer", "data")


def main() -> int:
    options = argparse.ArgumentParser(description="Kill processes that save, and look for their checkpoints.")
    options.add_argument("--kills", type=int, default=500, help="over all stores")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--stores", default="directory,s3")
    options.add_argument("--fault-scale", type=float, default=1.0, help="times the rates of S3's faults")
    options.add_argument("--proxy", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.proxy:
        return serve_proxy(given.proxy, given.seed, given.fault_scale)
    torch.set_num_threads(1)
    names = given.stores.split(",")
    report: dict[str, Any] = {"seed": given.seed, "stores": {}}
    for number, name in enumerate(names):
        kills = given.kills // len(names) + (number < given.kills % len(names))
        with tempfile.TemporaryDirectory(prefix="slm-kills-") as folder, STORES[name](Path(folder), given) as places:
            report["stores"][name] = soak(name, *places, kills=kills, seed=given.seed, folder=Path(folder))
    report["kills"] = sum(item["kills"] for item in report["stores"].values())
    report["lost"] = sum(item["lost"] for item in report["stores"].values())
    print(json.dumps(report, indent=1))
    return 1 if report["lost"] else 0


def soak(name: str, uri: str, clean_uri: str, *, kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill so many children that save to `uri`; `clean_uri` is the same store without faults, to look at it."""
    rng = random.Random(f"{seed} {name}")
    open_store(uri)
    durable, lost = -1, []
    counts = {"while it began": 0, "between two parts of a save": 0, "with nothing in flight": 0}
    saved = 0
    began = time.monotonic()
    for kill in range(kills):
        early = rng.random() < KILLED_EARLY
        child = Forked(lambda say, kill=kill: save_on_and_on(uri, kill, say), folder / "log")
        lines = [] if early else [child.line()]
        time.sleep(rng.uniform(0.0, KILL_WITHIN_SECONDS[name]))
        child.kill()
        child.wait()
        while (line := child.line(0.0)) is not None:
            lines.append(line)
        child.close()
        said = [line.split() for line in lines if line]
        for word, step in said:
            if word == "wrong":
                lost.append(f"kill {kill}: began from step {step} with other contents than were saved")
            if word == "durable":
                durable, saved = max(durable, int(step)), saved + 1
        if not early and not said:
            lost.append(f"kill {kill}: a child could not begin: {(folder / 'log').read_text()[-600:]}")
        found = newest_loadable(open_store(clean_uri, create=False), lost, kill)
        if found < durable:
            lost.append(f"kill {kill}: step {durable} was durable, and step {found} is the newest that can be loaded")
        counts[moment(open_store(clean_uri, create=False), begun=any(word == "begun" for word, _ in said))] += 1
    return {
        "kills": kills,
        "lost": len(lost),
        "first_losses": lost[:5],
        "killed": counts,
        "durable_saves_heard_of": saved,
        "newest_step": durable,
        "seconds": round(time.monotonic() - began, 1),
    }


def save_on_and_on(uri: str, seed: int, say: Callable[[str], None]) -> None:
    """In a child: go on from what is there, and save until the end."""
    rng = random.Random(seed)
    checkpoints = Checkpoints(open_store(uri, create=False), rank=0, world_size=1, keep_last=KEEP_LAST)
    tensors = contents(-1)
    at = checkpoints.begin(tensors, IDENTITY, "lease")
    if at.step and not same(tensors, contents(at.step)):
        say(f"wrong {at.step}")
    say(f"begun {at.step}")
    told = None
    for step in range(at.step + 1, at.step + 10_000):
        for name, value in contents(step).items():
            tensors[name].copy_(value)
        checkpoints.save(tensors, IDENTITY, Counters(step=step), durable=rng.random() < 0.3)
        # As the loop does: training goes on, and the tensors change, while the save is in flight.
        for value in tensors.values():
            value.add_(1.0)
        checkpoints.poll()
        if checkpoints.newest is not None and checkpoints.newest != told:
            told = checkpoints.newest
            say(f"durable {told.step}")


def contents(step: int) -> dict[str, torch.Tensor]:
    """What is saved at a step: other numbers in each tensor and each step."""
    base = torch.arange(TENSOR_SIZE, dtype=torch.float32)
    return {f"tensor/{number}": base * (number + 1) + step for number in range(NUM_TENSORS)}


def same(item: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return item.keys() == other.keys() and all(torch.equal(item[name], other[name]) for name in item)


def newest_loadable(store: Store, lost: list[str], kill: int) -> int:
    """Its step, -1 where there is none; what it holds is compared with what was saved."""
    for place in checkpoints_of_chain(store):
        try:
            tensors = read_tensors(store, place, prefix="tensor/")
        except Damaged as damage:
            lost.append(f"kill {kill}: {place} is damaged: {damage}")
            continue
        if not same(tensors, {name.removeprefix("tensor/"): value for name, value in contents(place.step).items()}):
            lost.append(f"kill {kill}: {place} holds something else than was saved")
        return place.step
    return -1


def moment(store: Store, *, begun: bool) -> str:
    """When the child died, by what it left."""
    if not begun:
        return "while it began"
    stored = store.list(CHECKPOINTS)
    folders = {key.rsplit("/", 1)[0] for key in stored if "/step=" in key}
    unfinished = [folder for folder in folders if f"{folder}/{MANIFEST}" not in stored]
    return "between two parts of a save" if unfinished else "with nothing in flight"


# -- stores


@contextmanager
def directory_store(folder: Path, given: argparse.Namespace) -> Iterator[tuple[str, str]]:
    del given
    uri = (folder / "store").as_uri()
    yield uri, uri


@contextmanager
def s3_store(folder: Path, given: argparse.Namespace) -> Iterator[tuple[str, str]]:
    del folder
    os.environ.update(CREDENTIALS)
    s3.SMALLEST_PART_BYTES = PART_BYTES
    s3.STALE_UPLOAD_AGE = timedelta(days=365 * 200)  # moto says of every upload that it began in 2010
    with s3_server(smallest_part_bytes=1024) as url:
        # A process of its own: a child forked beside the proxy's threads could inherit one of their locks.
        command = [sys.executable, "-m", "bench.prove_store_kills", "--proxy", url, "--seed", str(given.seed)]
        command += ["--fault-scale", str(given.fault_scale)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as proxy:
            assert proxy.stdout is not None and proxy.stdin is not None
            proxied = proxy.stdout.readline().strip()
            try:
                yield f"s3://{BUCKET}/run?endpoint_url={proxied}", f"s3://{BUCKET}/run?endpoint_url={url}"
            finally:
                proxy.stdin.close()
                print(proxy.stdout.read().strip(), file=sys.stderr)


def serve_proxy(upstream: str, seed: int, scale: float) -> int:
    proxy = FaultProxy(upstream, at_random(seed, {name: rate * scale for name, rate in RATES.items()}))
    print(proxy.url, flush=True)
    sys.stdin.read()
    print(f"faults: {json.dumps(proxy.met)}")
    return 0


STORES = {"directory": directory_store, "s3": s3_store}

if __name__ == "__main__":
    raise SystemExit(main())
