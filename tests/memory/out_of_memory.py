"""On two ranks: train, and let the allocator of one rank fail in the backward of the second step.

python -m tests.memory.out_of_memory EXPERIMENT.yaml DS_CONFIG.json FAILING_RANK
"""

import os
import sys

import deepspeed
import torch

import coconut_ds.__main__

real_backward = deepspeed.DeepSpeedEngine.backward
calls = 0


def failing_backward(self, *args, **keywords):
    global calls
    calls += 1
    if calls == 2 and os.environ["RANK"] == FAILING_RANK:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (simulated)")
    return real_backward(self, *args, **keywords)


deepspeed.DeepSpeedEngine.backward = failing_backward

if __name__ == "__main__":
    config, ds_config, FAILING_RANK = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    sys.exit(coconut_ds.__main__.main(["train", config, "--deepspeed_config", ds_config]))
