"""Load a base model (Hugging Face id, folder or .gguf file) and build an experiment's Coconut model from it.

Only LoRA imports PEFT.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.hub_kernels import is_kernel
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils import cached_file
from transformers.utils import logging as transformers_log

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.config.experiment import Experiment
from coconut_ds.data.tokenizer import DATA_ONLY, Vocabulary, locate_model, where_to_load_from
from coconut_ds.errors import CheckpointError, ConfigError, first_line
from coconut_ds.files import counted, print_notes
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.published import published_window
from coconut_ds.model.quantization import others_in_fp32
from coconut_ds.runs.changes import BaseRecord
from coconut_ds.runs.checkpoints import describe_tensor, is_weight, refuse_non_finite
from coconut_ds.runs.weights import (
    THOUGHT_FILE,
    find_adapter,
    load_foreign_weights,
    load_thought_weights,
)
from coconut_ds.thoughts import ThoughtSettings, build_thought

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}  # of `layer_types`
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Constants that old versions of transformers wrote into GPT-2 state dicts.
OLD_BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$")
PICKLED = "it holds pickled objects, which may run code; save it again: model.save_pretrained(FOLDER)"
# Larger than any model; a damaged or hostile configuration could specify a million layers.
LIMITS = {
    "num_hidden_layers": 1_000,
    "hidden_size": 1_000_000,
    "vocab_size": 10_000_000,
    "num_attention_heads": 100_000,
    "max_position_embeddings": 1_000_000_000,
}
# Progress bars of loading and saving weights would interrupt a command's own output.
transformers_log.disable_progress_bar()


def build_module(experiment: Experiment, vocabulary: Vocabulary, latent_memory: LatentMemory) -> Coconut:
    """Build the experiment's model in fp32 on the CPU: base weights, then adapters, then the thought.

    `load_model_path` may be a checkpoint of this program or the published code, a Hugging Face folder, or the
    adapter folder of a LoRA run; without it `model_id` gives the weights. Seeded by the experiment.
    Raises ConfigError and CheckpointError.
    """
    torch.manual_seed(experiment.seed)
    source = experiment.load_model_path
    adapter = find_adapter(source) if source else None
    start = None if adapter else source
    if experiment.tuning == "lora":
        from coconut_ds.model import lora

        # An adapter names the checkpoint of its base, unless that was plain `model_id`.
        origin = lora.read_origin(adapter) if adapter else None
        start = origin.weights if origin else start
    elif adapter is not None:
        raise ConfigError(f"load_model_path: {source} holds a LoRA adapter; set 'tuning: lora'")
    weights = load_foreign_weights(start, experiment.allow_pickle) if start else None
    # In fp32, the weights that become 4 bits would take 26 GiB of a 7B model.
    base = load_base(experiment.model_id, vocabulary, as_saved=experiment.quantization != "none")
    window = published_window(experiment, adapter, weights, str(start)) if source else None
    if weights is not None:
        install_weights(base, weights, str(start))
    record = BaseRecord.of(base, vocabulary, with_weights=experiment.tuning == "lora")
    thought = build_thought(experiment.thought, base.config.hidden_size, ThoughtSettings.of(experiment))
    embeddings: Any = base.get_input_embeddings()
    thought.start(embeddings.weight)
    if not experiment.method.has_latents:
        thought.requires_grad_(False)
    if experiment.tuning == "lora":
        adapted = lora.add_adapters(base, experiment, vocabulary.special_token_ids, record)
        module = Coconut(adapted, thought, latent_memory)
    else:
        module = Coconut(base, thought, latent_memory)
    module.base_record = record
    module.latent_weight = experiment.latent_supervision_weight
    if adapter is not None:
        lora.load_adapter(module, adapter, with_window=experiment.method.has_latents)
    elif source and (learned := load_thought_weights(source)):
        install_thought(module, learned, source)
    elif window is not None:
        install_thought(module, {"logits_W": window.flip(0)}, str(source))
    return module


def write_model(module: Coconut, vocabulary: Vocabulary, folder: Path) -> None:
    """Write a Hugging Face or PEFT folder for other programs, with tokenizer and thought."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(module.base, PreTrainedModel):
        module.base.save_pretrained(folder)
        save_thought(module.thought.state_dict(), folder)
    else:
        from coconut_ds.model import lora

        lora.save_adapter(module, folder)
    vocabulary.tokenizer.save_pretrained(folder)


def trainable_parameters(model: nn.Module) -> dict[str, int]:
    """Number of elements of each trainable parameter, by name."""
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


def parameter_groups(model: Coconut, experiment: Experiment) -> list[dict[str, Any]]:
    """Optimizer groups: `base` (weights or adapters, weight decay) and `thought` (`thought_lr`, no decay).

    As in the published code, weight decay covers every base parameter, including norms and biases.  A thought
    gets none: decay would pull window logits toward the mean and an MLP back to the identity.
    """
    thought_lr = experiment.lr if experiment.thought_lr is None else experiment.thought_lr
    settings = [
        ("base", model.base, experiment.lr, experiment.weight_decay),
        ("thought", model.thought, thought_lr, 0.0),
    ]
    groups = [
        {
            "name": name,
            "params": [p for p in part.parameters() if p.requires_grad],
            "lr": lr,
            "weight_decay": decay,
        }
        for name, part, lr, decay in settings
    ]
    return [group for group in groups if group["params"]]


def load_config(model_id: str) -> PretrainedConfig:
    """Load only the model's configuration.  Raises ConfigError."""
    where, extra = locate_model(model_id)
    try:
        config = AutoConfig.from_pretrained(where, **DATA_ONLY, **extra)
        config.get_text_config()
    except Exception as error:  # transformers raises anything on a damaged file
        raise ConfigError(_cannot_load("a configuration", model_id, error)) from error
    check_config(config, model_id)
    return config


def check_config(config: PretrainedConfig, model_id: str) -> None:
    """Refuse impossible sizes, capped logits and code to download.  Raises ConfigError."""
    sizes = config.get_text_config()
    out_of_range = [
        f"{name} {value!r}"
        for name, limit in LIMITS.items()
        if (value := getattr(sizes, name, 1)) is not None and not (type(value) is int and 1 <= value <= limit)
    ]
    if out_of_range:
        raise ConfigError(
            f"model_id: the configuration of {model_id!r} has impossible sizes: {', '.join(out_of_range)}"
        )
    if config.is_encoder_decoder:
        raise ConfigError(
            f"model_id: {model_id!r} is an encoder with a decoder ({config.model_type}), which the passes "
            "over latents do not run; use a causal language model"
        )
    if getattr(AutoModelForCausalLM._model_mapping.get(type(config), None), "_is_stateful", False):
        raise _layers_with_state(f"{model_id!r}")
    if getattr(sizes, "final_logit_softcapping", None) is not None:
        raise _changed_logits(f"{model_id!r}")
    for attention in {config._attn_implementation, sizes._attn_implementation}:
        if is_kernel(attention):
            raise ConfigError(
                f"model_id: {model_id!r} names a kernel to download ({attention!r}), which is code; remove "
                "'attn_implementation' from its config.json"
            )


def load_base(model_id: str, vocabulary: Vocabulary, as_saved: bool = False) -> PreTrainedModel:
    """Load the causal LM in fp32 on the CPU and add rows for the special tokens.

    `as_saved`: the weights of its linear layers stay in the dtype of `model_id`.
    Raises ConfigError, and CheckpointError for weights that are not finite.
    """
    where, extra = locate_model(model_id)
    dtype = saved_dtype(load_config(model_id)) if as_saved and not extra else torch.float32
    base: Any = read_causal_lm(where, extra, dtype)
    if dtype != torch.float32:
        others_in_fp32(base)
    if "gguf_file" in extra:
        # The weights are plain fp32 now, but transformers refuses to save a model marked as quantized.
        base.hf_quantizer = None
        base.is_quantized = False
        vars(base.config).pop("quantization_config", None)
    refuse_non_finite(dict(base.named_parameters()), _files_of(where, extra))
    refuse_other_layers(base)
    refuse_changed_logits(base)
    refuse_reading_ahead(base)
    add_special_token_rows(base, vocabulary)
    return base


def refuse_other_layers(base: PreTrainedModel) -> None:
    """Raise ConfigError for a model with layers that do not attend (Mamba, RWKV, hybrids).

    A pass hands keys and values to the next one, not the state of such a layer.
    """
    kinds = set(getattr(base.config.get_text_config(), "layer_types", None) or ())
    if base._is_stateful or not kinds <= ATTENTION_LAYERS:
        raise _layers_with_state(type(base).__name__)


def _layers_with_state(model: str) -> ConfigError:
    return ConfigError(
        f"model_id: {model} has layers with a state instead of attention, which the passes over latents do "
        "not carry; use a model whose layers all attend"
    )


def refuse_changed_logits(base: PreTrainedModel) -> None:
    """Raise ConfigError for a model that scales or caps its logits (Granite, Cohere, Gemma 2).

    Losses and answers are computed here by the head alone.  The model is run with a decoder that returns
    given hidden states and a head that returns its input: its logits must be those hidden states.
    """
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    size = base.config.get_text_config().hidden_size
    hidden_1TD = torch.linspace(-100, 100, 2 * size).view(1, 2, size)
    output = MoeModelOutputWithPast(last_hidden_state=hidden_1TD)  # has the fields that any model reads
    ids_1T = torch.zeros(1, 2, dtype=torch.long)
    try:
        with (
            torch.no_grad(),
            patch.object(decoder, "forward", lambda *_, **__: output),
            patch.object(head, "forward", lambda hidden: hidden),
        ):
            logits = base(input_ids=ids_1T, use_cache=False, return_dict=True).logits
    except Exception:  # a forward with parts of its own around the decoder says nothing about its logits
        return
    if not torch.allclose(logits, hidden_1TD):
        raise _changed_logits(type(base).__name__)


def _changed_logits(model: str) -> ConfigError:
    return ConfigError(
        f"model_id: {model} scales or caps the logits of its LM head, which the losses and answers here "
        "would leave out; use a model whose logits are its head's output"
    )


def refuse_reading_ahead(base: PreTrainedModel) -> None:
    """Raise ConfigError for a model whose logits depend on later tokens (BERT and other encoders)."""
    ids_BT = torch.tensor([[0, 1], [0, 2]])
    try:
        with torch.no_grad():
            mask_BT = torch.ones_like(ids_BT)
            output = base.eval()(ids_BT, attention_mask=mask_BT, use_cache=False, return_dict=True)
            first, other = output.logits[:, 0]
    except Exception:  # a model that needs more than ids, which training names
        return
    if not torch.allclose(first, other, rtol=0, atol=1e-4 * float(first.abs().max())):
        raise ConfigError(
            f"model_id: {type(base).__name__} reads the tokens that it is to predict, as encoders do; use a "
            "causal language model (if it was trained as one, write is_decoder: true in its config.json)"
        )


def _files_of(where: str, extra: Mapping[str, str]) -> Path:
    """The file or folder that a model was read from; for a hub id, its snapshot."""
    name = extra.get("gguf_file", "config.json")
    file = cached_file(where, name, _raise_exceptions_for_missing_entries=False)
    path = Path(file or where)
    return path.parent if path.name == "config.json" else path


def saved_dtype(config: PretrainedConfig) -> torch.dtype:
    """The dtype in which a model is saved; fp32 if its configuration does not say it."""
    dtype = config.get_text_config().dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32


def read_causal_lm(
    where: str, extra: Mapping[str, str], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Read a model with AutoModelForCausalLM: no custom code, no adapter, no pickled objects.

    Raises ConfigError.
    """
    if (Path(where) / "adapter_config.json").is_file():
        raise ConfigError(
            f"model_id: {where} holds a LoRA adapter; name its base as 'model_id' and {where} as "
            "'load_model_path'"
        )
    load_config(str(Path(where) / extra["gguf_file"]) if extra else where)
    try:
        with _without_table():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where,
                dtype=dtype,
                weights_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **DATA_ONLY,
                **extra,
            )
    except Exception as error:  # transformers raises anything on a damaged file
        reason = UnpicklingError(PICKLED) if isinstance(error, UnpicklingError) else error
        raise ConfigError(_cannot_load("a causal language model", where, reason)) from error
    model, info = loaded
    misshapen = [f"{name} {tuple(there)}" for name, there, _ in sorted(info["mismatched_keys"])]
    if names := [*misshapen, *sorted(info["missing_keys"])]:
        raise ConfigError(
            f"model_id: the weights of {where} do not fit its config.json; {counted(len(names), 'tensor')} "
            f"missing or of another shape: {_shorten(names)}"
        )
    if unused := sorted(info["unexpected_keys"]):
        print_notes([f"model_id: {where}: the model does not use {_shorten(unused)}"])
    return model


def new_base(config: PretrainedConfig, vocabulary: Vocabulary) -> PreTrainedModel:
    """A causal LM with random weights and rows for the special tokens."""
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **DATA_ONLY)
    add_special_token_rows(base, vocabulary)
    return base


def add_special_token_rows(base: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Grow embedding and head to the tokenizer's size; special-token rows start as copies of the row of `<<`.

    Source: run.py of the Coconut release.  If `<<` is several tokens, their mean is used; if the tokenizer
    does not know it, the mean of all existing rows.
    """
    size, rows = len(vocabulary.tokenizer), len(_vocabulary_weights(base)[0])
    if rows < size:
        base.resize_token_embeddings(size, mean_resizing=False)
    sources = vocabulary.new_row_source_ids or sorted(
        {*range(min(rows, size))} - {*vocabulary.special_token_ids}
    )
    with torch.no_grad():
        for weight_VD in _vocabulary_weights(base):
            source_D = weight_VD[sources].mean(dim=0)
            weight_VD[list(vocabulary.special_token_ids)] = source_D


def install_weights(base: PreTrainedModel, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy a state dict into `base`; every key must match.

    A vocabulary without the special-token rows is accepted; these rows then keep their values.
    Raises CheckpointError with the missing, unexpected and misshapen names.
    """
    own = base.state_dict()
    given = {name: value for name, value in weights.items() if not OLD_BUFFERS.search(name)}
    if not own.keys() >= given.keys():
        given = _as_loaded(base, given)
    tied = set(getattr(base, "all_tied_weights_keys", {}) or {}) & set(own)
    missing = sorted(set(own) - set(given) - tied)
    unexpected = sorted(set(given) - set(own))
    vocabulary_names = {
        name
        for name, value in own.items()
        if any(value.data_ptr() == weight_VD.data_ptr() for weight_VD in _vocabulary_weights(base))
    }
    misshapen = [
        f"{name} {describe_tensor(value)} instead of {tuple(own[name].shape)}"
        for name, value in given.items()
        if name in own and not _fits(value, own[name], name in vocabulary_names)
    ]
    if missing or unexpected or misshapen:
        parts = {"missing": missing, "unexpected": unexpected, "wrong shape": misshapen}
        listed = "\n".join(f"  {what}: {_shorten(names)}" for what, names in parts.items() if names)
        raise CheckpointError(
            f"{source} does not fit this model:\n{listed}\n  Set model_id to the model it was trained from."
        )
    with torch.no_grad():
        for name, value in given.items():
            own[name][: len(value)].copy_(value) if value.dim() else own[name].copy_(value)


def _as_loaded(base: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names that transformers gives them when it loads them; as they are if it cannot.

    It saves some models under other names (GPT-NeoX), or experts one by one (Mixtral).
    """
    config = copy.deepcopy(base.config)
    kind: Any = type(base)
    try:
        for _ in range(2):
            with _without_table():
                loaded, info = kind.from_pretrained(
                    None,
                    config=config,
                    state_dict=dict(weights),
                    dtype=base.dtype,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                )
            misshapen = {there[0] for _, there, here in info["mismatched_keys"] if there[1:] == here[1:]}
            if not misshapen:
                break
            config.get_text_config().vocab_size = misshapen.pop()  # without the special-token rows
    except Exception:  # transformers raises anything on other weights
        return weights
    differs = any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return weights if differs else loaded.state_dict()


@contextmanager
def _without_table() -> Iterator[None]:
    """Without transformers' table of differences, which callers turn into an error or a note."""
    verbosity = transformers_log.get_verbosity()
    transformers_log.set_verbosity_error()
    try:
        yield
    finally:
        transformers_log.set_verbosity(verbosity)


def _vocabulary_weights(base: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """The weights of embedding and head: the same tensor twice if they are tied."""
    modules: tuple[Any, Any] = (base.get_input_embeddings(), base.get_output_embeddings())
    return modules[0].weight, modules[1].weight


def _fits(value: Tensor, own: Tensor, is_vocabulary: bool) -> bool:
    if not is_weight(value):
        return False
    if value.shape == own.shape:
        return True
    return is_vocabulary and value.shape[1:] == own.shape[1:] and len(value) < len(own)


def _shorten(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _cannot_load(what: str, model_id: str, error: Exception) -> str:
    return f"model_id: cannot load {what} from {model_id!r}: {first_line(error)}\n" + where_to_load_from(
        model_id, ", a folder, or a .gguf file"
    )


def save_thought(state: Mapping[str, Tensor], folder: str | Path) -> None:
    """Write a thought's state dict into a model's folder."""
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in state.items()},
        Path(folder) / THOUGHT_FILE,
    )


def install_thought(model: Coconut, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load a saved thought into the model's.  Raises CheckpointError if names or shapes differ."""
    refuse_non_finite(state, source)
    refuse_other_tensors(state, model.thought.state_dict(), source)
    model.thought.load_state_dict(dict(state))


def refuse_other_tensors(
    given: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str | Path
) -> None:
    """Raise CheckpointError with the differences in names and shapes."""
    differences = [f"missing {name}" for name in sorted(set(expected) - set(given))]
    differences += [f"unexpected {name}" for name in sorted(set(given) - set(expected))]
    differences += [
        f"{name} is {describe_tensor(given[name])} there and {tuple(value.shape)} here"
        for name, value in expected.items()
        if name in given and not (is_weight(given[name]) and given[name].shape == value.shape)
    ]
    if differences:
        more = f"\n  and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise CheckpointError(f"{source} does not fit this model:\n  " + "\n  ".join(differences[:8]) + more)
