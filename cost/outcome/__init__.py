"""Predicted results of a run: loss, benchmark scores, and the range in which the predictions hold."""
