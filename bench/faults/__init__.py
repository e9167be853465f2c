"""A simulated world for the cap: true time, a fake multi-cloud with its own bill, nodes, and faults of many kinds."""
