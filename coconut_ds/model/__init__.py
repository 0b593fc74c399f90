"""The multi-pass model and what keeps its memory at that of one pass.

Knows: torch, Hugging Face models, batches, thoughts.  Does not know: stages, DeepSpeed.
"""
