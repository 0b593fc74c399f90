"""Settings: the experiment YAML and the DeepSpeed JSON, checked and turned into frozen records."""
