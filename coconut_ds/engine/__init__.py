"""Ranks: the DeepSpeed engine, collectives, signals, stuck ranks and non-finite numbers."""
