"""Saving and resuming, whole or not at all."""
