"""Evaluate trained models: accuracy with its interval, tokens and seconds per answer, ablations.

    evaluations.jsonl    one line per measurement, appended
    predictions.jsonl    one line per item; a repeated measurement replaces its lines

The totals do not depend on the number of ranks.  With ZeRO stage 3 the model stays partitioned; otherwise
every rank has the complete model without an optimizer.
"""

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from coconut_ds.config.deepspeed import DeepSpeedConfig
from coconut_ds.config.experiment import Experiment
from coconut_ds.data.batching import Batch
from coconut_ds.data.curriculum import Stage
from coconut_ds.data.forms import is_hub
from coconut_ds.data.run_data import TestSet, load_evaluation_data
from coconut_ds.data.tokenizer import Vocabulary
from coconut_ds.distributed import Ranks, lost_ranks_explained
from coconut_ds.engine.engine import Engine, finish_distributed, start_distributed
from coconut_ds.errors import ConfigError
from coconut_ds.evaluation.ablation import Comparison
from coconut_ds.evaluation.data_files import OWN, TRAINING
from coconut_ds.evaluation.evaluate import Evaluation, ReadingEngine, evaluate, show_progress
from coconut_ds.evaluation.intervals import percent_with_interval, wilson_interval
from coconut_ds.evaluation.sampling import Sampler, Samples, Sampling
from coconut_ds.evaluation.saved_models import Trained
from coconut_ds.files import (
    counted,
    json_text,
    open_append,
    parse_json,
    print_now,
    read_bytes,
    replace_text,
)
from coconut_ds.model.loading import DTYPES, load_config, parameter_groups
from coconut_ds.runs.record_shapes import cut_answers
from coconut_ds.tables import Table

EVALUATIONS, PREDICTIONS = "evaluations.jsonl", "predictions.jsonl"


@dataclass(frozen=True)
class EvalOptions:
    """What to measure for every model."""

    split: str = "valid"  # "valid", "test" or a file
    limit: int | None = None
    ablations: tuple[str, ...] = ()
    sampling: Sampling | None = None


@dataclass(frozen=True)
class Measurement:
    """Result of one model on one data set with one ablation or none."""

    checkpoint: str
    split: str
    stage: Stage
    ablation: str | None
    evaluation: Evaluation
    against_intact: Comparison | None = None
    trained_at: Stage | None = None  # from its manifest
    notes: tuple[str, ...] = ()
    file: str = ""
    role: str = ""  # of the file (data_files.py)
    differences: tuple[str, ...] = ()  # from the run's own settings (Trained.differences)
    samples: Samples | None = None  # `evaluation` is their majority vote

    def key(self) -> dict[str, Any]:
        """The fields that identify the lines of this measurement."""
        return {
            "checkpoint": self.checkpoint,
            "split": self.split,
            "latents": self.stage.num_latents,
            "ablation": f"majority of {self.samples.sampling}" if self.samples else self.ablation or "intact",
            "file": self.file,
            "role": self.role,
            "examples": self.evaluation.examples,
            "stage": str(self.stage),
            "grading": self.evaluation.grading,
            "differences": list(self.differences),
        }

    def numbers(self) -> dict[str, Any]:
        low, high = wilson_interval(self.evaluation.num_correct, self.evaluation.num_items)
        numbers: dict[str, Any] = {**self.key(), **self.evaluation.numbers()}
        numbers |= {"accuracy_low": low, "accuracy_high": high}
        numbers["trained_at"] = self.trained_at and str(self.trained_at)
        if self.against_intact is not None:
            numbers |= self.against_intact.against_intact()
        return numbers | (self.samples.numbers() if self.samples else {})

    def answers(self) -> list[dict[str, Any]]:
        """The graded answers, of every sample."""
        if self.samples is None:
            return [asdict(answer) for answer in self.evaluation.predictions]
        samples = enumerate(self.samples.evaluations)
        return [{"sample": n, **asdict(answer)} for n, sample in samples for answer in sample.predictions]

    @property
    def data(self) -> str:
        """'valid', 'valid (other.json)', 'train (train.json, training data)'."""
        remarks = [] if self.role == OWN or self.file in ("", self.split) else [Path(self.file).name]
        remarks += ["training data"] if self.role == TRAINING else []
        return self.split + (f" ({', '.join(remarks)})" if remarks else "")

    def __str__(self) -> str:
        if self.against_intact is not None:
            return f"  {self.against_intact}"
        if self.samples is not None:
            return str(self.samples)
        result = self.evaluation
        dropped, cut = result.num_dropped, cut_answers(result.numbers())
        notes = [
            *self.notes,
            *([f"not the run's own result: {', '.join(self.differences)}"] if self.differences else []),
            *([f"{dropped} items too long for the model count as wrong"] if dropped else []),
            *([cut] if cut else []),
        ]
        match = f"; CoT match {100 * result.cot_match:.1f} %" if self.stage.shows_all_steps else ""
        return (
            f"{self.checkpoint}  {self.data}, {self.stage}\n"
            + "".join(f"  note: {line}\n" for line in notes)
            + f"  accuracy {percent_with_interval(result.num_correct, result.num_items)} "
            f"({result.grading} grading), "
            f"{result.num_correct} of {result.num_items}; loss {result.loss:.4f}{match}\n"
            f"  per answer: {result.mean_tokens:.1f} tokens and {counted(self.stage.num_latents, 'latent')}, "
            f"{result.seconds_per_item:.4f} s"
        )


def measure(
    models: Sequence[Trained], ds_config: DeepSpeedConfig | None, options: EvalOptions
) -> list[Measurement]:
    """Measure every model, print and save each result.  Collective.

    Raises UserError for wrong input; data is read before a model is loaded.
    """
    prepared = [(trained, *_read_data(trained, options)) for trained in models]
    precision = ds_config.precision if ds_config else "fp32"
    if precision == "fp16" and not torch.cuda.is_available():
        precision = "fp32"
    results = []
    with lost_ranks_explained():
        ranks = start_distributed(precision)
        for trained, vocabulary, test_set in prepared:
            engine = _engine(trained, vocabulary, ds_config, ranks, precision)
            for result in _measurements(engine, trained, vocabulary, test_set, options):
                results.append(result)
                if ranks.is_main:
                    print_now(str(result))
                    if not trained.experiment.debug:
                        _save(result, trained.folder)
            del engine
        if ranks.is_main and len(models) > 1:
            print_now(f"\n{results_table(results).text()}")
        finish_distributed()
    return results


def results_table(results: Sequence[Measurement]) -> Table:
    """One row per measurement."""
    rows = [
        [
            result.checkpoint,
            str(result.stage),
            str(result.key()["ablation"]),
            percent_with_interval(result.evaluation.num_correct, result.evaluation.num_items),
            f"{result.evaluation.loss:.4f}",
            f"{result.evaluation.mean_tokens:.1f}",
        ]
        for result in results
    ]
    accuracy = f"accuracy ({results[0].data}), 95 % interval"
    head = ["checkpoint", "stage", "how", accuracy, "loss", "tokens"]
    return Table(head, rows, align="lllr")


def _read_data(trained: Trained, options: EvalOptions) -> tuple[Vocabulary, TestSet]:
    experiment = trained.experiment
    if options.sampling and trained.stage.num_latents == 0 and not options.sampling.temperature:
        raise ConfigError(
            f"--num_samples: {trained.name} has no latents at its stage ({trained.stage}), so the noise on "
            "them changes nothing; add --temperature 0.7 or choose another --checkpoint"
        )
    for name in options.ablations:
        if trained.stage.num_latents == 0:
            raise ConfigError(
                f"--ablate {name}: {trained.name} has no latents at its stage ({trained.stage}); "
                "choose another --checkpoint or set --latents N"
            )
        slot = int(name.partition(":")[2] or 0)
        if slot > trained.stage.num_latents:
            raise ConfigError(f"--ablate {name}: there are only {trained.stage.num_latents} latent slots")
        if name.startswith("swap") and experiment.batch_size_eval < 2:
            raise ConfigError(
                "--ablate swap: needs at least two rows per batch; --set batch_size_eval=2 or more"
            )
    path = split_path(experiment, options.split)
    limit = options.limit if options.limit is not None else experiment.eval_max_items
    return load_evaluation_data(experiment, load_config(experiment.model_id), path, trained.stage, limit)


def split_label(experiment: Experiment, split: str) -> str:
    """The name of a split in results: 'test' for a test file in val_path, as in published eval files."""
    path = split_path(experiment, split)
    is_test = path == experiment.test_path or Path(path).stem.endswith("_test")
    return "test" if split == "valid" and is_test else split


def split_path(experiment: Experiment, split: str) -> str:
    """The file of a named split, or the given file.  Raises ConfigError."""
    key = {"valid": "val_path", "test": "test_path", "train": "train_path"}.get(split)
    if key is None:
        if not (is_hub(split) or Path(split).is_file()):
            raise ConfigError(f"--split {split}: no such file; use valid, test, train or a file")
        return split
    if path := getattr(experiment, key):
        return str(path)
    raise ConfigError(f"--split {split}: the experiment has no {key}; use --set {key}=FILE or --split FILE")


def _engine(
    trained: Trained,
    vocabulary: Vocabulary,
    ds_config: DeepSpeedConfig | None,
    ranks: Ranks,
    precision: str,
) -> Engine | ReadingEngine:
    module = trained.build(vocabulary)
    if ds_config is None or ds_config.zero_stage < 3:
        return ReadingEngine(module, ranks, DTYPES[precision])
    settings = ds_config.resolve(trained.experiment, ranks.world_size)
    return Engine(module, parameter_groups(module, trained.experiment), settings, ranks)


def _measurements(
    engine: Engine | ReadingEngine,
    trained: Trained,
    vocabulary: Vocabulary,
    test_set: TestSet,
    options: EvalOptions,
) -> Iterator[Measurement]:
    file = split_path(trained.experiment, options.split)
    role = trained.files.role(options.split, file)

    def answered(title: str, **how: Any) -> Evaluation:
        def progress(batches: Iterable[Batch], name: str, total: int) -> Iterator[Batch]:
            return show_progress(batches, f"{trained.name}, {title}{name}", total, engine.is_main)

        return evaluate(engine, test_set, trained.stage, trained.experiment, vocabulary, progress, **how)

    def result_of(ablation: str | None) -> Measurement:
        result = answered(f"{ablation}, " if ablation else "", ablation=ablation)
        return Measurement(
            trained.name,
            split_label(trained.experiment, options.split),
            trained.stage,
            ablation,
            result,
            trained_at=trained.trained_at,
            notes=tuple(trained.notes),
            file=file,
            role=role,
            differences=trained.differences(test_set.card),
        )

    intact = result_of(None)
    yield intact
    for name in options.ablations:
        ablated = result_of(name)
        answers = (intact.evaluation.predictions, ablated.evaluation.predictions)
        yield replace(ablated, against_intact=Comparison.between(name, *answers))
    if (sampling := options.sampling) is not None:
        drawn = [
            answered(
                f"sample {number + 1} of {sampling.num_samples}, ",
                sampler=Sampler(sampling, trained.experiment.seed, number),
            )
            for number in range(sampling.num_samples)
        ]
        samples = Samples(sampling, tuple(drawn))
        voted = replace(samples.voted(), loss=intact.evaluation.loss)
        yield replace(intact, evaluation=voted, samples=samples)


def _save(result: Measurement, folder: Path) -> None:
    """Save a result; a failure is only a warning, since the result was printed."""
    try:
        write_results(result, folder)
    except OSError as error:
        warnings.warn(f"{folder}: the results were not written ({error.strerror})", stacklevel=2)


def write_results(result: Measurement, folder: Path) -> None:
    """Add a measurement to the two files of a folder; predictions of the same measurement are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    with open_append(folder / EVALUATIONS, "a") as writer:
        writer.write(json_text({"time": round(time.time(), 3), **result.numbers()}) + "\n")
    path, key = folder / PREDICTIONS, result.key()
    text = read_bytes(path).decode("utf-8", errors="replace") if path.is_file() else ""
    kept = [line for line in text.splitlines() if not _has_key(line, key)]
    new = [json_text({**key, **answer}, ensure_ascii=False) for answer in result.answers()]
    replace_text(path, "\n".join([*kept, *new]) + "\n")


def _has_key(line: str, key: Mapping[str, Any]) -> bool:
    """Whether a line belongs to the measurement `key`; lines that are not JSON objects do not."""
    try:
        value = parse_json(line)
    except ValueError:
        return False
    if not isinstance(value, dict):
        return False
    value = {"differences": [], **value}  # missing in lines of older versions
    return all(value.get(name) == expected for name, expected in key.items())
