"""Tokens on disk to batches, in an order that depends on nothing but integers."""
