"""Text: files, the standard library's own bytes, hub corpora."""
