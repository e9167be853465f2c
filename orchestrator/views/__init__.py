"""What people see of plans and runs in a terminal."""
