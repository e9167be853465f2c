"""What offers cost, and where that is known from."""
