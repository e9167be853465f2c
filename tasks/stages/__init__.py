"""Stages of a run: what each needs, reads, writes and runs."""
