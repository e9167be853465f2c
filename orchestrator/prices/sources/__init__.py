"""Readers of price catalogs; each runs in a process of its own."""
