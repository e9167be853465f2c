"""What a training run will reach: loss, benchmark scores, and where those laws may be trusted."""
