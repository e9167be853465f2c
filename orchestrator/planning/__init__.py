"""From a recipe and prices to a plan, and what earlier runs teach the next one."""
