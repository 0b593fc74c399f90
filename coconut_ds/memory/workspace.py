"""Bytes that an operator of the CPU takes and gives back inside, where no dispatch mode sees them.

A GPU's kernels convert while they read, so none of this is part of a plan for a GPU.

Knows: ATen operators and dtypes.  Does not know: models, traces.
"""

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
POINTWISE = (aten.mul, aten.add, aten.sub, aten.div)
DROPOUT = (aten.native_dropout, aten.native_dropout_backward)


def cpu_workspace(func: Any, args: tuple[Any, ...]) -> int:
    """Copies of the inputs in the dtype that the operator computes in: ATen's TensorIterator makes them.

    Dropout multiplies by a mask of bool (aten/src/ATen/native/Dropout.cpp), and so converts it as well.
    """
    operator = func.overloadpacket
    if operator in DROPOUT:
        return args[0].numel() * args[0].element_size()
    tensors = [arg for arg in args[:2] if isinstance(arg, Tensor)]
    if operator not in POINTWISE or len(tensors) < 2:
        return 0
    common = torch.result_type(*tensors)
    return sum(t.numel() * common.itemsize for t in tensors if t.dtype != common and t.dim())
