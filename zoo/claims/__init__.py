"""A paper's headline result as an experiment: what a recipe may claim, its runs, its verdict."""
