"""Part a: the techniques give the textbook loop's losses and gradients on this device.

fp32: loss and every gradient against the textbook loop, TF32 off, activation checkpointing off and on; in the
first step, which runs as modules, and once passes run from their recordings.  bf16 and fp16: the loss against
fp32's.

Knows: variants of a step.  Does not know: time, memory.
"""

from typing import Any

import torch

from benchmarks.gpu_parts import Setting
from benchmarks.gpu_parts.models import DTYPES, longest_batch, model_of, step
from benchmarks.train_step import allocate_gradients, variant, warm_up

MODELS = ("gpt2", "llama-3.2-1b")
ROWS = 2


def cases(setting: Setting) -> list[str]:
    names = "coconut_ds", "coconut_ds+checkpointing"
    gpt2, llama = ([f"{model} {name}" for name in names] for model in MODELS)
    return [*gpt2, *(f"gpt2 {precision}" for precision in ("bf16", "fp16")), *llama]


def run(case: str, setting: Setting, seconds: float) -> dict[str, Any]:
    model, _, name = case.partition(" ")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return near_fp32(model, name, setting) if name in DTYPES else equal_to_textbook(model, name, setting)


def gradients(loss_of: Any, base: torch.nn.Module, batch: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a variant."""
    allocate_gradients(base)
    loss = float(step(loss_of, batch))
    return loss, {name: p.grad for name, p in base.named_parameters() if p.grad is not None}


def equal_to_textbook(model: str, name: str, setting: Setting) -> dict[str, Any]:
    base = model_of(model, setting)
    batch = longest_batch("gsm", 3, ROWS, base.config.vocab_size, setting)
    loss, expected = gradients(variant("textbook", base), base, batch)
    loss_of, found = variant(name, base), {"textbook_loss": loss}
    for when in ("", "recorded_"):
        own, values = gradients(loss_of, base, batch)
        error = max(relative_error(values[key], expected[key]) for key in expected)
        found |= {f"{when}loss_difference": abs(own - loss), f"{when}largest_gradient_error": error}
        warm_up(loss_of, ROWS, base.config.vocab_size, setting.device)
        step(loss_of, batch)
    return found


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """|value - expected| / |expected|; in fp64 nothing is hidden by the sums."""
    value, expected = value.double(), expected.double()
    return float(value.sub_(expected).norm() / expected.norm().clamp(min=1e-30))


def near_fp32(model: str, precision: str, setting: Setting) -> dict[str, Any]:
    losses = []
    for dtype in ("fp32", precision):
        base = model_of(model, setting, "fp32").to(DTYPES[dtype])
        batch = longest_batch("gsm", 3, ROWS, base.config.vocab_size, setting)
        losses.append(float(step(variant("coconut_ds", base), batch)))
    return {"fp32_loss": losses[0], "loss": losses[1], "relative_difference": abs(losses[1] / losses[0] - 1)}
