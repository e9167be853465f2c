"""Decides and rents: plan, launch, supervise, recover, stop."""
