"""Clusters rented through SkyPilot."""
