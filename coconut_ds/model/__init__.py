"""The multi-pass model, and the techniques that keep its memory at that of one pass."""
