"""A Coconut model with fake tensors: it runs the real code and allocates nothing.

The model is built on the meta device from its configuration and cast as DeepSpeed casts it.  Its tensors are
then replaced by fake CPU tensors.  A plan therefore needs neither weights nor a GPU, and it follows every
change of the model's code.
"""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.config.experiment import Experiment
from coconut_ds.data.batching import Batch
from coconut_ds.memory.workspace import cpu_workspace
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.lora import add_adapters
from coconut_ds.thoughts import ThoughtSettings, build_thought

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class FakeModel:
    """A model without storage and the mode in which it runs."""

    model: Coconut
    mode: FakeTensorMode
    device: str  # "cuda" or "cpu": the device whose kernels and code paths are used

    @property
    def vocabulary_size(self) -> int:
        embedding: Any = self.model.causal_lm.get_input_embeddings()
        return embedding.weight.shape[0]

    def workspace(self, func: Any, args: tuple[Any, ...]) -> int:
        """Temporary bytes inside an operator; known for the CPU only."""
        return cpu_workspace(func, args) if self.device == "cpu" else 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which the model can be called with batches from `batch`."""
        with ExitStack() as stack:
            stack.enter_context(self.mode)
            if self.device == "cuda":
                stack.enter_context(looking_like_cuda())
            yield

    def batch(self, batch: Batch) -> Batch:
        """The same batch without storage."""
        tensors: dict[str, Any] = {
            field.name: self.mode.from_tensor(value)
            for field in dataclasses.fields(batch)
            if isinstance(value := getattr(batch, field.name), Tensor)
        }
        return dataclasses.replace(batch, **tensors)


@contextmanager
def looking_like_cuda() -> Iterator[None]:
    """Let fake CPU tensors report `is_cuda`: fake GPU tensors do not work without a GPU.

    Code that checks the device then takes its GPU path.  Attention with dropout runs as on a GPU, where the
    fused kernel saves a seed, while the CPU would save every probability.  A TorchFunctionMode cannot do
    this: autograd disables it in the backward, where checkpointed layers run again.
    """
    attention = F.scaled_dot_product_attention

    def fused(*args: Any, **kwargs: Any) -> Tensor:
        return attention(*args, **{**kwargs, "dropout_p": 0.0})

    F.scaled_dot_product_attention = fused
    FakeTensor.is_cuda = property(lambda _: True)  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention
        del FakeTensor.is_cuda


def build_fake_model(
    experiment: Experiment,
    config: PretrainedConfig,
    vocabulary_size: int,
    special_token_ids: Sequence[int],
    latent_memory: LatentMemory,
    precision: str = "fp32",
    device: str = "cuda",
) -> FakeModel:
    """The experiment's model in training mode.  Raises ConfigError if it does not support a technique."""
    dtype = DTYPES[precision]
    with torch.device("meta"):
        base: Any = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False
        )
        if base.get_input_embeddings().weight.shape[0] < vocabulary_size:
            base.resize_token_embeddings(vocabulary_size, mean_resizing=False)
        thought = build_thought(experiment.thought, base.config.hidden_size, ThoughtSettings.of(experiment))
        if not experiment.method.has_latents:
            thought.requires_grad_(False)
        if experiment.tuning == "lora":
            base = add_adapters(base, experiment, special_token_ids)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in (base, thought):
        _replace_tensors(module, mode, dtype)
    with mode:
        model = Coconut(base, thought, latent_memory)
    model.train()
    return FakeModel(model, mode, device)


def with_layers(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """The same architecture with fewer layers."""
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = num_layers
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[:num_layers]
    return shallow


def has_equal_layers(config: PretrainedConfig) -> bool:
    """Whether all layers are of one type, so that a shallow copy tells the size of a layer."""
    return len(set(getattr(config, "layer_types", None) or ["one"])) == 1


def _replace_tensors(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> None:
    """Replace meta tensors by fake CPU tensors; parameters get `dtype`, ties are kept.

    Buffers keep their dtype, as in DeepSpeed 0.19.8 (runtime/engine.py, _mixed_precision_dtypes).
    """
    made: dict[int, Tensor] = {}
    originals = []  # keeps the ids unique

    def replacement(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            originals.append(tensor)
            is_parameter = isinstance(tensor, nn.Parameter)
            fake_dtype = dtype if is_parameter and tensor.is_floating_point() else tensor.dtype
            with mode:
                fake = torch.empty(tensor.shape, dtype=fake_dtype, device="cpu")
            if is_parameter:
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            made[id(tensor)] = fake
        return made[id(tensor)]

    for part in module.modules():
        stores: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in stores:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = replacement(tensor)
