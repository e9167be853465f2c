"""The facts of `--json` output as plain data."""
