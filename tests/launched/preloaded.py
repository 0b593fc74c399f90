"""What forked ranks share: modules, transformers' checkpoint formats, the description of the processor.

It is frozen, because a garbage collection of a rank would copy all of it.
"""

import gc

import cpuinfo
import peft  # noqa: F401
import transformers.models.gpt2.modeling_gpt2  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import coconut_ds.training.trainer  # noqa: F401
import tests.faults.faulty  # noqa: F401
from coconut_ds.engine.deepspeed_patches import describe_processor_once, import_muon_uncompiled

import_muon_uncompiled()
describe_processor_once()
cpuinfo.get_cpu_info()
get_checkpoint_conversion_mapping("gpt2")
gc.collect()
gc.freeze()
