"""Temporary bytes inside CPU operators, which a dispatch mode does not see.

GPU kernels convert while they read, so a plan for a GPU has none of these.
"""

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
POINTWISE = (aten.mul, aten.add, aten.sub, aten.div)
DROPOUT = (aten.native_dropout, aten.native_dropout_backward)


def cpu_workspace(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes of the input copies that ATen's TensorIterator makes in the dtype of the computation.

    Dropout multiplies by a bool mask (aten/src/ATen/native/Dropout.cpp) and therefore converts it as well.
    """
    operator = func.overloadpacket
    if operator in DROPOUT:
        return args[0].numel() * args[0].element_size()
    tensors = [arg for arg in args[:2] if isinstance(arg, Tensor)]
    if operator not in POINTWISE or len(tensors) < 2:
        return 0
    common = torch.result_type(*tensors)
    return sum(t.numel() * common.itemsize for t in tensors if t.dtype != common and t.dim())
