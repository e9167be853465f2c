"""What `slm` can be asked: each command parses, calls and renders, nothing else."""
