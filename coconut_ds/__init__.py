"""Train language models that reason in continuous latent space, under DeepSpeed ZeRO, on 11 GB GPUs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coconut_ds.evaluation.pretrained import CoconutConfig, CoconutForCausalLM

__version__ = "0.2.0"
__all__ = ["CoconutConfig", "CoconutForCausalLM"]


def __getattr__(name: str) -> Any:
    """The public classes on first use: the package itself must not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'coconut_ds' has no attribute {name!r}")
    from coconut_ds.evaluation import pretrained

    return getattr(pretrained, name)
