"""Train language models that reason in continuous latent space, under DeepSpeed ZeRO, on 11 GB GPUs."""
