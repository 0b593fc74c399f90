"""Count the package's files that a reader meets on the way of one batch: from the command to the first step.

    python -m benchmarks.walk         (make the data first: python preprocessing/arithmetic.py --model-dir
                                       data/arithmetic_gpt2)

A file counts if one of its functions is called; module and class bodies do not.  The run is runs/walk.
"""

import inspect
import os
import shutil
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent / "coconut_ds"
COMMAND = (
    "train configs/quickstart/plain.yaml --deepspeed_config ds_configs/zero2_offload.json --set name=walk"
)


def main() -> None:
    files: set[str] = set()

    def see(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(str(PACKAGE)):
            return
        name = Path(code.co_filename).relative_to(PACKAGE).as_posix()
        if event == "call" and code.co_flags & inspect.CO_OPTIMIZED:
            files.add(name)
        elif event == "return" and (name, code.co_name) == ("training/trainer.py", "step"):
            sys.setprofile(None)
            print(f"{len(files)} files", *sorted(files), sep="\n  ", flush=True)
            shutil.rmtree("runs/walk")
            os._exit(0)

    shutil.rmtree("runs/walk", ignore_errors=True)
    sys.setprofile(see)
    threading.setprofile(see)
    from coconut_ds.__main__ import main as command

    command(COMMAND.split())


if __name__ == "__main__":
    main()
