"""Programs that tests start under the `deepspeed` launcher or as one process."""
