"""Train language models that reason in continuous latent space, under DeepSpeed ZeRO, on 11 GB GPUs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coconut_ds.evaluation.pretrained import CoconutForCausalLM

__all__ = ["CoconutForCausalLM"]


def __getattr__(name: str) -> Any:
    """`CoconutForCausalLM` on first use: the package itself must not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'coconut_ds' has no attribute {name!r}")
    from coconut_ds.evaluation.pretrained import CoconutForCausalLM

    return CoconutForCausalLM
