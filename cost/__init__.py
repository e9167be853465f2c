"""Costs, performance, predicted results and the ledger: pure functions and SQLite."""
