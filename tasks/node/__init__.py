"""What runs on a rented node around training: set-up, Ray, processes, preemption notices."""
