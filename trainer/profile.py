"""`--profile`: a few steps of rank 0 as a trace for chrome://tracing or perfetto.dev, kept in the run store."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from trainer.run_store import keys
from trainer.run_store.base import Store

SKIPPED_STEPS, WARM_UP_STEPS, TRACED_STEPS = 5, 1, 3
"""From where a group of workers begins: its first steps compile and warm up."""


def profiler(store: Store, incarnation: int, *, wanted: bool) -> AbstractContextManager[Any]:
    """Enter it around the steps, and call `step()` of what it gives, if anything, after each."""
    if not wanted:
        return nullcontext()

    def keep(finished: Any) -> None:
        with tempfile.TemporaryDirectory(prefix="slm-profile-") as folder:
            path = Path(folder) / "trace.json"
            finished.export_chrome_trace(str(path))
            store.upload(keys.profile_trace(incarnation), path)

    on_device = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return profile(
        activities=[ProfilerActivity.CPU, *on_device],
        schedule=schedule(wait=SKIPPED_STEPS, warmup=WARM_UP_STEPS, active=TRACED_STEPS, repeat=1),
        on_trace_ready=keep,
        profile_memory=True,
    )
