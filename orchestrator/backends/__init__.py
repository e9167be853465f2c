"""What can be rented from: one contract, several clouds."""
