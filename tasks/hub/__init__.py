"""A run's weights in use: export, import, generation."""
