"""Export a trained model to a folder in Hugging Face format, or in PEFT format for adapters.

model.safetensors config.json tokenizer.json ...      for AutoModelForCausalLM and AutoTokenizer
thought.safetensors coconut.json                      for latents with CoconutForCausalLM
README.md                                             the model card
"""

import secrets
import shutil
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from coconut_ds.data.tokenizer import Vocabulary, load_vocabulary, refuse_unsavable
from coconut_ds.errors import CheckpointError, ConfigError, first_line
from coconut_ds.evaluation.model_card import model_card
from coconut_ds.evaluation.saved_models import Trained, find_one, original_model_id, portable_settings
from coconut_ds.files import EXPORT_FILE, json_text
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.loading import DTYPES, read_causal_lm, save_thought, write_model
from coconut_ds.model.lora import merge, origin_of
from coconut_ds.runs.run_folder import code_version, library_versions
from coconut_ds.runs.weights import model_folder
from coconut_ds.thoughts import ThoughtSettings

FORMAT = 1


@dataclass(frozen=True)
class Exported:
    folder: Path
    is_adapter: bool
    largest_difference: float  # of a logit, between the model and the exported folder


def export_hf(
    target: str,
    output: str,
    checkpoint: str | None,
    merged: bool,
    dtype: str,
    overrides: Sequence[str] = (),
    allow: Collection[str] = (),
) -> Exported:
    """Export one model to `output`, completely or not at all.  Raises ConfigError and CheckpointError."""
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--output {output} already exists; name a new folder")
    trained = find_one(target, checkpoint, overrides, allow=allow)
    original = original_model_id(trained)
    if merged and trained.experiment.tuning != "lora":
        raise ConfigError(f"--merge: {target} has no adapters (tuning: full); leave out --merge")
    vocabulary = load_vocabulary(trained.experiment.model_id, trained.experiment.chat_template)
    refuse_unsavable(vocabulary, trained.experiment.model_id)
    module = trained.build(vocabulary)
    is_adapter = isinstance(module.base, PeftModel) and not merged
    if is_adapter and dtype != "fp32":
        raise ConfigError(f"--dtype {dtype}: adapters stay in fp32; add --merge to cast the merged model")
    draft = folder.with_name(f".tmp-{folder.name}-{secrets.token_hex(8)}")
    try:
        draft.mkdir(parents=True)
        _write(module, vocabulary, draft, merged, dtype)
        origin = origin_of(module.base).weights if is_adapter else None  # None: those of `model_id`
        weights = model_folder(Path(origin)) if origin else None
        record = describe(trained, original, merged)
        (draft / EXPORT_FILE).write_text(json_text(record, indent=1) + "\n", encoding="utf-8")
        (draft / "README.md").write_text(model_card(trained, original, is_adapter, weights), encoding="utf-8")
        difference = read_back_difference(module, vocabulary, draft, dtype)
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
    except (OSError, UnicodeError) as error:  # tokenizer settings may contain half a surrogate pair
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--output {output}: cannot be written ({reason})") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Exported(folder, is_adapter, difference)


def _write(module: Coconut, vocabulary: Vocabulary, folder: Path, merged: bool, dtype: str) -> None:
    if dtype == "fp32" and not merged:
        write_model(module, vocabulary, folder)
        return
    merged_model: Any = merge(module)  # returns a fully tuned model unchanged
    merged_model.to(dtype=DTYPES[dtype]).save_pretrained(folder)
    save_thought(module.thought.state_dict(), folder)
    vocabulary.tokenizer.save_pretrained(folder)


def describe(trained: Trained, base: str, merged: bool) -> dict[str, Any]:
    """The content of coconut.json."""
    experiment = trained.experiment
    settings = portable_settings(trained, merged)
    return {
        "format": FORMAT,
        "method": str(experiment.method),
        "thought": experiment.thought,
        "c_thought": experiment.c_thought,
        "num_latents": trained.stage.num_latents,
        "max_new_tokens": settings["experiment"]["max_new_tokens"],
        "base_model": base,
        "checkpoint": trained.name,
        "thought_settings": asdict(ThoughtSettings.of(experiment)),
        **settings,
        "libraries": library_versions(),
        "code": code_version(),
    }


@torch.no_grad()
def read_back_difference(module: Coconut, vocabulary: Vocabulary, folder: Path, dtype: str) -> float:
    """The largest difference of a logit between the model and the model read back from `folder`.

    Raises CheckpointError if it is larger than rounding errors.
    """
    ids = torch.arange(len(vocabulary.tokenizer))[-24:].flip(0)[None]  # the special tokens and a few more
    expected = module.causal_lm(input_ids=ids).logits
    if (folder / "adapter_config.json").is_file():
        read = find_one(str(folder)).build(vocabulary).causal_lm
    else:
        read = read_causal_lm(str(folder), {}).eval()
    difference = float((read(input_ids=ids).logits - expected).abs().max())
    scale = float(expected.abs().max())
    if difference > {"fp32": 1e-3, "fp16": 2e-2, "bf16": 2e-1}[dtype] * max(scale, 1.0):
        raise CheckpointError(
            f"{folder}: not exported, its logits differ by {difference:.3g} from the model's"
        )
    return difference


def upload(folder: Path, repository: str, private: bool) -> str:
    """Upload an exported folder to the Hugging Face hub; returns its URL.  Raises ConfigError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=folder))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(
            f"--push {repository}: the upload failed ({first_line(error)}); the folder {folder} is complete. "
            "Log in with `hf auth login`, then: hf upload " + f"{repository} {folder}"
        ) from error


def zero_to_fp32_explained(target: str, checkpoint: str | None, output: str) -> str:
    """Instructions to convert ZeRO shards into one state dict with DeepSpeed's zero_to_fp32."""
    trained = find_one(target, checkpoint)
    shards = trained.folder / trained.name / "engine"
    if not shards.is_dir():
        raise CheckpointError(f"{target}: {trained.name} has no engine/ folder with ZeRO shards")
    return (
        f"{shards} contains the ZeRO shards of {trained.name}: fp32 master weights and optimizer states.\n"
        "To convert them to one fp32 state dict with DeepSpeed:\n\n"
        f"  python -m deepspeed.utils.zero_to_fp32 {shards.parent} {output} --tag engine\n\n"
        "Its keys begin with 'base.' (the language model) or 'thought.'. `export --to hf` works without:\n"
        "the checkpoint's model/ folder has the weights in the precision of the training."
    )
