"""Inspect latents of single problems: what they decode to, attend to, and which steps they match."""
