"""What DeepSpeed's engine holds, and its peaks in a backward and a step: planned and measured, ranks 1 and 2.

    python -m benchmarks.engine_bytes           one JSON line per case (tests/memory/engine_states.py)

On the CPU, GPU and host states are measured together; the host's share is what is left of them without the
planned states of the GPU.
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path

from benchmarks import record
from coconut_ds.training.sweep import launch_module


def main() -> None:
    environment = {**os.environ, "PYTHONPATH": str(record.ROOT), "PYTHONWARNINGS": "ignore"}
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "states.json")
            command = [*launch_module("tests.memory.engine_states", ranks), str(out)]
            subprocess.run(command, cwd=record.ROOT, env=environment, check=True)
            for case, sizes in json.loads(out.read_text(encoding="utf-8")).items():
                print(json.dumps({"case": case, "ranks": ranks, **sizes}), flush=True)


if __name__ == "__main__":
    main()
