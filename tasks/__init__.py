"""What runs on the rented nodes, and the recipes that describe it."""
