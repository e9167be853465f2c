"""The market: offers, hardware, clouds, billing by provider, preemption rates."""
