"""The README.md of an exported model: description, loading, results, data, settings."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from coconut_ds.config.experiment import Experiment
from coconut_ds.data.problems import Card, card_for
from coconut_ds.evaluation.data_files import OTHER, OWN, TRAINING
from coconut_ds.evaluation.intervals import percent_with_interval
from coconut_ds.evaluation.saved_models import Trained
from coconut_ds.runs.record_shapes import evaluation_lines, metric_lines

RESULT_KEY = ("split", "file", "examples", "stage", "latents", "ablation", "grading")
ROLES = {
    OWN: "the run's own file",
    TRAINING: "**training data**",
    OTHER: "not a file of this run's settings",
}


def model_card(trained: Trained, base: str, is_adapter: bool, weights: Path | None = None) -> str:
    """Markdown with front matter for the hub.

    `base`: the model that training started from.
    `weights`: an adapter's frozen weights, if not those of `base`.
    """
    lines = [
        *_front_matter(base, is_adapter),
        f"# {_line(trained.experiment.name)}",
        "",
        f"A language model trained by coconut_ds to reason in latent space: method "
        f"`{trained.experiment.method}`, stage: {trained.stage}; base model `{_line(base)}`.",
        "",
        *_how_to_load(trained, base, is_adapter, weights),
        *_results(trained),
        *_data(trained.experiment),
        *_settings(trained.experiment),
        *_memory(trained.folder),
    ]
    return "\n".join(lines) + "\n"


def _front_matter(base: str, is_adapter: bool) -> Iterator[str]:
    yield "---"
    yield f"library_name: {'peft' if is_adapter else 'transformers'}"
    yield f"base_model: {json.dumps(base)}"
    yield "pipeline_tag: text-generation"
    yield "tags: [coconut, latent-reasoning, coconut_ds]"
    yield "---"


def _how_to_load(trained: Trained, base: str, is_adapter: bool, weights: Path | None) -> Iterator[str]:
    yield "## Usage"
    yield ""
    yield "With latents:"
    yield ""
    yield "```python"
    yield "from coconut_ds import CoconutForCausalLM"
    yield ""
    yield 'model = CoconutForCausalLM.from_pretrained("THIS_FOLDER")'
    yield f'model.answer_questions(["..."], num_latents={trained.stage.num_latents})'
    yield 'inputs = model.tokenizer("...\\n", return_tensors="pt")  # a question and a newline'
    yield "model.generate(**inputs, do_sample=True, num_return_sequences=4)"
    yield "```"
    yield ""
    if weights is not None:
        yield (
            f"The adapter belongs to the weights in `{_line(weights)}`, a model trained from "
            f"`{_line(base)}`. On any other weights it computes something else."
        )
        yield ""
        if not (weights / "config.json").is_file():
            yield "Transformers cannot load that file by itself: export again with `--merge`."
            yield ""
            return
    yield "The language model without latents:"
    yield ""
    yield "```python"
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    yield ""
    yield 'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")'
    if is_adapter:
        yield f"base = AutoModelForCausalLM.from_pretrained({json.dumps(str(weights or base))})"
        yield "base.resize_token_embeddings(len(tokenizer))  # three special tokens"
        yield "from peft import PeftModel"
        yield 'model = PeftModel.from_pretrained(base, "THIS_FOLDER")'
    else:
        yield 'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")'
    yield "```"
    yield ""


def _results(trained: Trained) -> Iterator[str]:
    lines = [
        line
        for line in evaluation_lines(trained.folder / "evaluations.jsonl")
        if line["checkpoint"] == trained.name
    ]
    newest = {tuple(line.get(name) for name in RESULT_KEY): line for line in lines}
    yield "## Results"
    yield ""
    if not newest:
        yield "There are no results of `coconut_ds eval` from before the export."
        yield ""
        return
    yield "| data | stage | latents | grading | accuracy, 95 % interval | tokens | against intact |"
    yield "|---|---|---|---|---|---|---|"
    for line in newest.values():
        ablation = line["ablation"]
        name = line["latents"] if ablation == "intact" else f"{line['latents']}, {_line(ablation)}"
        against = f"McNemar p = {line['p_value']:.2g}" if "p_value" in line else ""
        accuracy = percent_with_interval(line["num_correct"], line["num_items"])
        grading = line.get("grading", "not recorded")
        cells = [_data_of(line), _stage_of(line, trained), name, grading, accuracy]
        yield f"| {' | '.join(map(str, cells))} | {line['mean_tokens']:.1f} | {against} |"
    yield ""
    yield "Greedy decoding; Wilson intervals. Tokens do not include latents."
    yield ""


def _data_of(line: Mapping[str, Any]) -> str:
    """'valid, t_valid.json (the run's own file), 500 items'."""
    file = _line(Path(line["file"]).name) if line.get("file") else "file not recorded"
    role = f" ({ROLES[line['role']]})" if line.get("role") in ROLES else ""
    return f"{_line(line['split'])}, {file}{role}, {line['num_items']} items"


def _stage_of(line: Mapping[str, Any], trained: Trained) -> str:
    stage = line.get("stage")
    if stage is None:
        return "not recorded"
    own = trained.trained_at is None or stage == str(trained.trained_at)
    return _line(stage) + ("" if own else f" (trained at: {trained.trained_at})")


def _data(experiment: Experiment) -> Iterator[str]:
    card: Card = card_for(experiment.train_path or experiment.val_path)
    yield "## Data"
    yield ""
    yield f"`{_line(card.name)}`: {_line(card.notes) or 'no notes'}."
    for title, text in (("Source", card.source), ("License", card.licence), ("Split", card.split_rule)):
        if text:
            yield f"{title}: {_line(text)}."
    yield ""


def _settings(experiment: Experiment) -> Iterator[str]:
    yield "## Training settings"
    yield ""
    yield "| setting | value |"
    yield "|---|---|"
    for name, value in experiment.learning.items():
        yield f"| {name} | {_line(value)} |"
    yield ""


def _memory(folder: Path) -> Iterator[str]:
    peaks: dict[str, float] = {}
    for line in metric_lines(folder / "metrics.jsonl"):
        if line.get("kind") == "memory":
            for name, value in line.items():
                if name.endswith("_mib"):
                    peaks[name] = max(value, peaks.get(name, value))
    if peaks:
        yield "## Training memory"
        yield ""
        yield "| peak over all epochs | MiB |"
        yield "|---|---|"
        for name, value in peaks.items():
            yield f"| {name.removesuffix('_mib').replace('_', ' ')} | {value:.0f} |"
        yield ""


def _line(value: object) -> str:
    """A value as one line of text, so that it cannot add lines to the card."""
    return " ".join(str(value).split()).replace("`", "'").replace("|", r"\|")
