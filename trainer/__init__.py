"""Turns tokens into a checkpoint: torch and Lightning Fabric only."""
