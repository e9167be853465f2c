"""The money that a run holds and has spent: leases, accounts, the append-only ledger, what to do when a lease ends."""
