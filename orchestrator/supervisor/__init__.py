"""Renting, watching and paying for one run until it ends."""
