"""Recipes by name; `slm recipes` lists them."""
