"""How fast and how large a training run is on given hardware: FLOPs, memory, tokens per second."""
