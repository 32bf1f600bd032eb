"""The arithmetic of rows and intervals."""
