"""Prints which clouds `sky check` has found credentials for, as one line of JSON; a process of its own.

    python -m orchestrator.backends.sky.enabled_clouds_process

`import sky` takes seconds and hundreds of megabytes and may hang on a damaged installation, so whoever wants to know
asks this with a time limit. It asks no cloud.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path


def state() -> dict[str, object]:
    """SkyPilot's version, whether its database is there, and the enabled clouds; None where `sky check` has not run."""
    import sky
    from sky import global_user_state, skypilot_config
    from sky.clouds import CloudCapability
    from sky.skylet import runtime_utils

    if not Path(runtime_utils.get_runtime_dir_path(".sky/state.db")).exists():
        return {"version": sky.__version__, "enabled": None}
    workspace = skypilot_config.get_active_workspace()
    known = global_user_state.get_cached_enabled_clouds(CloudCapability.COMPUTE, workspace)
    return {"version": sky.__version__, "enabled": sorted({str(cloud).lower() for cloud in known})}


if __name__ == "__main__":
    os.environ.setdefault("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    with contextlib.redirect_stdout(sys.stderr):
        found = state()
    print(json.dumps(found))  # noqa: T201
