"""No test can rent by accident, read the user's own runs, or reach for the network."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

CLOUD_VARIABLES = ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GOOGLE_APPLICATION_CREDENTIALS")

# Before any test module is imported, and inherited by every process that a test starts.
for name in CLOUD_VARIABLES:
    os.environ.pop(name, None)
os.environ["SLM_HOME"] = str(Path(tempfile.gettempdir()) / f"slm-tests-{os.getpid()}")
os.environ["SLM_REFRESH"] = "never"
