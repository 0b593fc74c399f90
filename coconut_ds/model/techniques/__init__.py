"""Techniques that keep the memory of several passes at that of one, each switchable and exact."""
