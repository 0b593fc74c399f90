"""The run folder on disk: records, checkpoints, and what may change between two runs."""
