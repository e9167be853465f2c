"""Runs on this machine: records, journal, status."""
