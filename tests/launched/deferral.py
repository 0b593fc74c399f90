"""Train a small GPT-2 on two ranks under ZeRO-2, techniques on and off: losses, peaks, and when hooks fire.

python -m tests.launched.deferral OUT.json
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.engine.engine import Engine, finish_distributed, start_distributed
from coconut_ds.memory.fake_run import LiveBytes
from coconut_ds.model.coconut import Coconut
from coconut_ds.thoughts import ThoughtSettings, build_thought
from tests.launched.gloo import wait_for_gloo
from tests.model.cases import LATENT_ID, PLAIN, VOCABULARY, make_batch

WIDTH, LAYERS, QUESTION, STEPS, MICRO_BATCHES = 192, 6, 24, 2, 2
CASES = {
    "plain": PLAIN,
    "deferred": LatentMemory(**(asdict(PLAIN) | {"deferred_weight_gradients": True})),
    "all": LatentMemory(),
    "all+checkpointing": LatentMemory(activation_checkpointing="layers"),
}
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": MICRO_BATCHES,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 100_000, "overlap_comm": False},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 1.0,
}


def measure(settings, ranks):
    torch.manual_seed(0)
    size = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    coconut = Coconut(model, build_thought("last_hidden", WIDTH, ThoughtSettings()), settings)
    engine = Engine(coconut, [{"params": list(model.parameters())}], DS_CONFIG, ranks)
    engine.train()
    losses, peaks, events = [], [], []
    watch(coconut, events)
    for index in range(STEPS * MICRO_BATCHES):
        # Ranks see different rows and as many latents.
        batch = make_batch(((QUESTION, 3, 2), (20, 2, 3)), seed=2 * index + ranks.rank)
        loss = engine.loss(batch)
        events.clear()
        with LiveBytes() as live:
            losses.append(float(engine.backward(loss)))
        peaks.append(live.peak)
        if index % MICRO_BATCHES == MICRO_BATCHES - 1:
            engine.step()
    return {
        "losses": [engine.sum_over_ranks([loss])[0] for loss in losses],
        "peak_bytes": min(peaks),  # of equal micro-batches: on a busy machine one may stand out
        "gradient_bytes": sum(p.numel() * 4 for p in model.parameters()),
        "events": list(events),
    }


def watch(coconut, events):
    """Write down when a weight's gradient is handed to DeepSpeed and when the first pass leaves a layer."""
    for number, layer in enumerate(coconut.causal_lm.transformer.h):
        for name, weight in layer.named_parameters():
            if weight.dim() == 2:
                weight.register_post_accumulate_grad_hook(
                    lambda _, label=f"reduce {number} {name}": events.append(label)
                )
        layer.register_forward_pre_hook(
            lambda _, inputs, label=f"leave {number}": watch_input(inputs[0], label, events)
        )


def watch_input(hidden_BTD, label, events):
    # Only the first pass has as many columns.
    if hidden_BTD.requires_grad and hidden_BTD.shape[1] == QUESTION:
        hidden_BTD.register_hook(lambda _: events.append(label))


def main(out_path):
    assert LATENT_ID < VOCABULARY
    ranks = start_distributed()
    wait_for_gloo()
    found = {name: measure(settings, ranks) for name, settings in CASES.items()}
    if ranks.is_main:
        Path(out_path).write_text(json.dumps(found))
    finish_distributed()


if __name__ == "__main__":
    main(sys.argv[-1])
