"""The training loop, the setup of a run, and sweeps over settings."""
