"""The local cloud: a process of its own that rents out nodes on this machine, takes them back, and bills them.

Nothing here is asked for money: the ledger of a run never read the market's bill, tests compare the two.
"""
