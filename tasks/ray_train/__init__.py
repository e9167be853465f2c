"""Ray Train's driver and workers, and what makes them elastic."""
