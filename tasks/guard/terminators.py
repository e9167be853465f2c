"""All terminators by name, the check that they would work, and firing them one after the other."""

from __future__ import annotations

import argparse
import functools
import math
import threading
import time
from typing import Callable, Dict, Iterable, List, Sequence, Set

from . import providers
from .clock import boottime
from .credentials import Aws, Metadata
from .processes import Identity, alive, kill_family
from .terminator import COMMAND, FAMILY, POWER_OFF, PROCESS, PROVIDER, Terminator, power_off, run_words

CHECK_SECONDS = 8.0
"""How long the terminators have, before the command starts, to show that they would work."""
TERMINATOR_NAMES = (
    *("family", "poweroff[:systemctl|shutdown|sysrq]", "terminate-ec2", "terminate-gcp", "terminate-azure"),
    *("runpod", "vast", "command:WORDS", "provider-limit:NAME"),
)


def named_terminators(options: argparse.Namespace) -> List[Terminator]:
    """The terminators that the options name, in the order in which they fire; raises ValueError."""
    metadata, found = Metadata(options.metadata_base), []
    for word in options.terminator:
        name, _, argument = word.partition(":")
        if name == FAMILY:
            found.append(Terminator(FAMILY, PROCESS))
        elif name == "provider-limit" and argument:
            found.append(Terminator(word, PROVIDER))
        elif name == "poweroff" and argument in ("", *POWER_OFF):
            found += [power_off(means) for means in ([argument] if argument else POWER_OFF)]
        elif name == "command" and argument:
            found.append(Terminator(word, COMMAND, functools.partial(run_words, ["/bin/sh", "-c", argument])))
        elif name == "terminate-ec2":
            found.append(providers.ec2_terminator(Aws(metadata, options.credentials, options.region), argument))
        elif name == "terminate-gcp":
            found.append(providers.gcp_terminator(metadata, argument or providers.GCP_API))
        elif name == "terminate-azure":
            found.append(providers.azure_terminator(metadata, argument or providers.AZURE_API))
        elif name == "runpod":
            found.append(providers.runpod_terminator(argument or providers.RUNPOD_API))
        elif name == "vast":
            found.append(providers.vast_terminator(argument or providers.VAST_API))
        else:
            raise ValueError(f"no terminator is called {word!r}; there are {', '.join(TERMINATOR_NAMES)}")
    return found


def unarmed(terminators: Sequence[Terminator], seconds: float = CHECK_SECONDS) -> Dict[str, str]:
    """Terminators that would not work now, and why; all are asked at the same time."""
    why: Dict[str, str] = {terminator.name: f"no answer within {seconds:.0f} s" for terminator in terminators}

    def ask(terminator: Terminator) -> None:
        try:
            terminator.check()
            why.pop(terminator.name, None)
        except Exception as error:  # whatever the error is, this terminator does not count
            why[terminator.name] = str(error) or repr(error)

    threads = [threading.Thread(target=ask, args=(terminator,), daemon=True) for terminator in terminators]
    for thread in threads:
        thread.start()
    until = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return dict(why)


def end_node(
    terminators: Sequence[Terminator],
    mark: str,
    escalate_seconds: float,
    log: Callable[..., None],
    known: Iterable[Identity] = (),
    first: Sequence[Identity] = (),
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Fire one terminator after the other, again and again, until the node is gone.

    As long as the caller runs, the node lives. The next terminator follows as soon as one fails, and `escalate_seconds`
    later where the node still lives. `tick` is called all the while. Returns only where the node's processes are all
    that is to be ended.
    """
    firing = [terminator for terminator in terminators if terminator.fire is not None or terminator.name == FAMILY]
    only_family = all(terminator.kind == PROCESS for terminator in firing)
    attempt = 0
    while True:
        attempt += 1
        for terminator in firing or [Terminator(FAMILY, PROCESS)]:
            log("terminator fired", terminator=terminator.name, kind=terminator.kind, attempt=attempt)
            if terminator.kind == PROCESS:
                ended = _end_family(mark, math.inf if only_family else escalate_seconds, known, first, tick)
                log("processes ended", terminator=terminator.name, processes=ended)
                if only_family:
                    return
            else:
                _fire(terminator, escalate_seconds, log, tick)
        time.sleep(1.0)


def _end_family(
    mark: str, seconds: float, known: Iterable[Identity], first: Sequence[Identity], tick: Callable[[], None]
) -> int:
    """SIGKILL until two looks in a row find no process, at most for `seconds`; returns how many were ended."""
    ended: Set[Identity] = set()
    quiet, until = 0, boottime() + seconds
    while quiet < 2 and boottime() < until:
        found = kill_family(mark, known, [identity for identity in first if alive(identity)])
        ended |= found
        quiet = 0 if found else quiet + 1
        tick()
        time.sleep(0.03)
    return len(ended)


def _fire(terminator: Terminator, seconds: float, log: Callable[..., None], tick: Callable[[], None]) -> None:
    """Fire in a thread, since it may hang; returns as soon as it failed, else after `seconds`."""
    failed = threading.Event()

    def work() -> None:
        began = boottime()
        try:
            assert terminator.fire is not None
            result, ok = terminator.fire(), True
        except Exception as error:  # whatever happened, the next terminator must have its turn
            result, ok = str(error) or repr(error), False
        log("terminator result", terminator=terminator.name, ok=ok, result=result, seconds=round(boottime() - began, 3))
        if not ok:
            failed.set()

    threading.Thread(target=work, daemon=True).start()
    until = boottime() + seconds
    while boottime() < until and not failed.wait(0.1):
        tick()
