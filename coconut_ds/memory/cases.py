"""Experiments, planners and machines from the options of `plan` and `fit`; network and data are optional."""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
from transformers import AutoConfig, PretrainedConfig

from coconut_ds.config.deepspeed import SHIPPED, DeepSpeedConfig
from coconut_ds.config.experiment import Experiment, load_with_notes, read_experiment
from coconut_ds.config.schema import did_you_mean
from coconut_ds.data.tokenizer import is_on_this_machine
from coconut_ds.errors import ConfigError
from coconut_ds.memory.budget import RESERVED_MIB, read_ds_config
from coconut_ds.memory.known import CUSTOM, TUNINGS, find_gpu, known, precision_note, short
from coconut_ds.memory.planner import GIB, Plan, Planner, TextShape
from coconut_ds.model.loading import load_config


def read_cases(args: argparse.Namespace) -> Iterator[Experiment]:
    """The experiment of CONFIG, or a shipped one, for every model and tuning.  Raises ConfigError."""
    custom = custom_config(args)
    if not (args.config or args.model or custom):
        raise ConfigError("give an experiment YAML, or --model NAME (or --layers N --hidden N --heads N)")
    if custom is not None:
        args.model = [f"{custom.num_hidden_layers} x {custom.hidden_size}"]
    experiments = {tuning: _with_tuning(args, tuning) for tuning in args.tuning or [None]}
    for model in args.model or [None]:
        for tuning, experiment in experiments.items():
            if model is not None:
                name = f"{model} {tuning or experiment.tuning}"
                experiment = replace(experiment, model_id=model, name=name)
            yield experiment


def _with_tuning(args: argparse.Namespace, tuning: str | None) -> Experiment:
    args = argparse.Namespace(**{**vars(args), "overrides": args.overrides + TUNINGS.get(str(tuning), [])})
    if args.config:
        return read_experiment(args)
    shipped = SHIPPED / f"configs/full/{args.data or 'gsm'}_coconut.yaml"
    return load_with_notes(shipped, args.overrides)[0]


def read_planner(args: argparse.Namespace, experiment: Experiment) -> Planner:
    """A planner from the files of this machine, or from what is built in.  Raises ConfigError, DataError."""
    custom = custom_config(args)
    config, notes = (custom, ()) if custom is not None else config_of(experiment.model_id)
    data = args.data or (None if args.config else "gsm")
    shape = text_shape(args) or (text_of(data) if data else None)
    if shape is None:
        try:
            planner = Planner.of(experiment, None, args.device, config)
        except ConfigError:
            path = (experiment.train_path or experiment.val_path).rpartition("/")[2]
            data = next((name for name in known()["texts"] if path.startswith(name)), None)
            if data is None:
                raise
            shape = text_of(data)
    if shape is not None:
        planner = Planner.of(experiment, shape, args.device, config)
        if data and not text_shape(args):
            notes += (f"built-in lengths of {data}: {lengths_text(shape)}",)
    return replace(planner, exact=args.exact, notes=(*planner.notes, *notes))


def lengths_text(shape: TextShape) -> str:
    return (
        f"a question of {shape.question} tokens, {shape.steps} steps of {shape.step}, "
        f"an answer of {shape.answer}"
    )


def read_machine(args: argparse.Namespace, path: str | None, experiment: Experiment) -> DeepSpeedConfig:
    """The DeepSpeed config with the memory of --gpu and --host-memory-gib.  Raises ConfigError."""
    printed = vars(args).setdefault("printed", set())
    ds_config = read_ds_config(path, experiment, args.ds_overrides, printed)
    return with_machine(ds_config, args.gpu, args.host_memory_gib)


def noted(plan: Plan, gpu: str | None, ds_config: DeepSpeedConfig) -> Plan:
    """The plan with a note if the GPU cannot train in the precision."""
    note = precision_note(gpu, ds_config.precision) if gpu else None
    return replace(plan, notes=(*plan.notes, note)) if note else plan


def text_shape(args: argparse.Namespace) -> TextShape | None:
    """The token counts of the shape options, or None if none is given.  Raises ConfigError."""
    given = (args.question_tokens, args.num_steps, args.step_tokens, args.answer_tokens)
    if given == (None, None, None, None):
        return None
    if args.question_tokens is None:
        raise ConfigError("the shape options need --question-tokens N")
    defaults = (0, 6, 15, 12)
    values = [default if value is None else value for value, default in zip(given, defaults, strict=True)]
    shape = TextShape(*values)
    if min(values) < 1:
        raise ConfigError(f"the shape options must be at least 1, got {vars(shape)}")
    return shape


def built_in_config(model_id: str) -> PretrainedConfig | None:
    """The configuration of a model with a built-in shape."""
    shape = next((model for model in known()["models"] if short(model["id"]) == short(model_id)), None)
    if shape is None:
        return None
    values = {**known()["families"][shape["family"]], **shape}
    for key in ("id", "family", "parameters"):
        del values[key]
    return AutoConfig.for_model(**values)


def config_of(model_id: str) -> tuple[PretrainedConfig, tuple[str, ...]]:
    """A configuration from this machine, else a built-in shape, else from the hub; and a note.

    `model_id` may be a config.json.  Raises ConfigError.
    """
    path = Path(model_id).expanduser()
    if path.suffix == ".json" and path.is_file():
        return load_config(str(path)), ()
    if not is_on_this_machine(model_id) and (config := built_in_config(model_id)) is not None:
        return config, (f"{model_id} is not on this machine; planned with its built-in shape",)
    names = [model["id"].rpartition("/")[2] for model in known()["models"]]
    near = did_you_mean(model_id.rpartition("/")[2], names)
    shapes = f"  built-in shapes: {', '.join(names)}; or --layers N --hidden N --heads N"
    if near and "/" not in model_id and not is_on_this_machine(model_id):  # no name of the hub to wait for
        raise ConfigError(
            f"--model {model_id}: is not on this machine and has no built-in shape{near}\n{shapes}"
        )
    try:
        return load_config(model_id), ()
    except ConfigError as error:
        raise ConfigError(f"{error}{near}\n{shapes}") from error


def custom_config(args: argparse.Namespace) -> PretrainedConfig | None:
    """A Llama of the size given by --layers, --hidden, --heads, ..., or None.  Raises ConfigError."""
    layers, hidden, heads, kv_heads, intermediate, vocab = (getattr(args, name) for name in CUSTOM)
    if not any(getattr(args, name) for name in CUSTOM):
        return None
    if not (layers and hidden and heads):
        raise ConfigError("a model of your own needs --layers N --hidden N --heads N")
    if min(layers, hidden, heads) < 1 or hidden % heads or heads % (kv_heads or heads):
        raise ConfigError("--hidden must be a multiple of --heads, and --heads of --kv-heads")
    return AutoConfig.for_model(
        "llama",
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        intermediate_size=intermediate or 4 * hidden,
        vocab_size=vocab or 50_257,
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
    )


def text_of(data: str) -> TextShape:
    """The built-in lengths of a data set."""
    return TextShape(**known()["texts"][data])


def with_machine(ds_config: DeepSpeedConfig, gpu: str | None, host_gib: float | None) -> DeepSpeedConfig:
    """The DeepSpeed config with the budget of a named GPU and of a host.  Raises ConfigError."""
    budget = ds_config.memory_budget
    if budget is None or (gpu is None and host_gib is None):
        return ds_config
    if gpu is not None:
        found = find_gpu(gpu)
        host_gib = host_gib or round(psutil.virtual_memory().total / GIB, 1)
        budget = replace(
            budget,
            device=found["name"],
            gpu_memory_mib=found["mib"],
            reserved_mib=RESERVED_MIB,
            components_mib={},
        )
    host_gib = budget.host_memory_gib if host_gib is None else host_gib
    return replace(ds_config, memory_budget=replace(budget, host_memory_gib=host_gib))
