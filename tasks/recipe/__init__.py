"""A recipe: everything that decides what a run trains, as checked YAML."""
