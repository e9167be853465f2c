"""GCP beside SkyPilot: prices paid, labels, time limits."""
