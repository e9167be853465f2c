"""What can be rented: offers, hardware, clouds, how providers bill, how often they preempt."""
