"""Ends a rented node when nobody has paid for it any longer.

Runs on the node before anything else, on any python3 >= 3.8, with the standard library only and nothing of ours. It is
shipped as one zipapp (`tasks.node.guard_archive`), which holds this package under the name `guard`; hence its imports
are relative. docs/guard.md says what ends a node, by which means and in which order.
"""
