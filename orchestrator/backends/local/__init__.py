"""The local cloud: a process of its own that rents out nodes on this machine, preempts them, and bills them.

The ledger of a run never reads the market's bill; tests compare the two.
"""
