"""How figures, tables and files are written, for every page of the project."""
