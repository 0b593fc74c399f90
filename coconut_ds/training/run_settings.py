"""Read the two settings files of a run; fill in missing values from the model and this machine."""

import argparse

import psutil
import torch

from coconut_ds.config.deepspeed import DeepSpeedConfig, MemoryBudget, load_ds_config
from coconut_ds.config.experiment import Experiment, read_experiment
from coconut_ds.files import print_notes
from coconut_ds.model.loading import load_config

MIB, GIB = 2**20, 2**30
RESERVED_MIB = 800  # CUDA context, NCCL and cuBLAS workspaces, as in ds_configs/
# The GPUs that the shipped files are made for; used on machines without a GPU.
NAMED_DEVICE, NAMED_GPUS, NAMED_MIB = "GTX 1080 Ti", 2, 11_264


def read_settings(args: argparse.Namespace) -> tuple[Experiment, DeepSpeedConfig]:
    """Read both files of a command line. Raises ConfigError."""
    experiment = read_experiment(args)
    return experiment, read_ds_config(args.deepspeed_config, experiment)


def read_ds_config(path: str, experiment: Experiment) -> DeepSpeedConfig:
    """Read the DeepSpeed JSON for `experiment`; the main process prints its notes. Raises ConfigError."""
    ds_config = load_ds_config(path)
    notes = list(ds_config.notes)
    hidden_size = None
    if ds_config.needs_hidden_size:
        hidden_size = load_config(experiment.model_id).get_text_config().hidden_size
    budget = ds_config.memory_budget
    if budget is None:
        budget = default_budget()
        notes.append(
            f"{path}: memory_budget: missing; using {budget.device}: "
            f"{budget.gpu_memory_mib:,} MiB per GPU, {budget.reserved_mib} reserved"
        )
    print_notes(notes)
    return ds_config.for_run(experiment, budget, hidden_size)


def default_budget() -> MemoryBudget:
    """The budget of this machine's GPUs; without a GPU, that of ds_configs/, which only warns."""
    host_memory_gib = round(psutil.virtual_memory().total / GIB, 1)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device, gpus = properties.name, torch.cuda.device_count()
        return MemoryBudget(device, gpus, properties.total_memory // MIB, RESERVED_MIB, host_memory_gib, {})
    return MemoryBudget(NAMED_DEVICE, NAMED_GPUS, NAMED_MIB, RESERVED_MIB, host_memory_gib, {}, "warn")
