"""Arithmetic that mechanisms share."""
