"""What is known of one lease, and what is done with it: a module for each state that the watch over it keeps."""
