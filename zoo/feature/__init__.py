"""Modules on feature maps (B, C, H, W), one file each."""
