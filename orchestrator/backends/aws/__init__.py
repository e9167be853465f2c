"""AWS beside SkyPilot: prices paid, labels, time limits."""
