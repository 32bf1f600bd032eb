"""Contracts: what every mechanism is held to by the promises that it makes."""
