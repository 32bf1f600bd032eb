"""Figures of quality as torchmetrics classes."""
