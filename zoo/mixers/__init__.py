"""Whole modules (B, N, C) -> (B, N, C): one file per mechanism."""
