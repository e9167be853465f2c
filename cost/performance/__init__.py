"""Performance of a training run on given hardware: FLOPs, memory, tokens per second."""
