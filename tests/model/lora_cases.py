"""Small models with adapters, for the tests of LoRA.

Shapes: B rows, T columns, D hidden size, V vocabulary.
"""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.config.experiment import validate_experiment
from coconut_ds.data.batching import Batch
from coconut_ds.model import lora
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.loading import parameter_groups
from coconut_ds.thoughts import ThoughtSettings, build_thought

V, D = 40, 16
START, END, LATENT, EOS = 37, 38, 39, 36
MARKERS = (START, LATENT, END)
DEFAULT_MEMORY = LatentMemory()
NO_DROPOUT = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_positions=64, n_embd=D, n_layer=2, n_head=2, **NO_DROPOUT)
    )


def llama_like(config_class, model_class, tied):
    return model_class(
        config_class(
            vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
        )
    )  # fmt: skip


FAMILIES = {
    "gpt2": gpt2,
    "llama_tied": lambda: llama_like(LlamaConfig, LlamaForCausalLM, True),
    "llama_untied": lambda: llama_like(LlamaConfig, LlamaForCausalLM, False),
    "qwen2_tied": lambda: llama_like(Qwen2Config, Qwen2ForCausalLM, True),
}


def experiment(**changes):
    values = dict(
        name="t", model_id="m", train_path="t.json", val_path="v.json", method="coconut", tuning="lora"
    )
    return validate_experiment({**values, "lora_dropout": 0.0, **changes}, "test")


def new_base(family="gpt2", seed=0):
    torch.manual_seed(seed)
    return FAMILIES[family]().eval()


def coconut(family="gpt2", thought="last_hidden", seed=0, latent_memory=DEFAULT_MEMORY, **changes):
    adapted = lora.add_adapters(new_base(family, seed), experiment(**changes), MARKERS)
    torch.manual_seed(seed)
    return Coconut(adapted, build_thought(thought, D, ThoughtSettings()), latent_memory)


def batch():
    ids = torch.tensor(
        [[1, 2, 3, START, LATENT, LATENT, END, 7, 8, EOS], [36, 4, 5, START, LATENT, LATENT, END, 9, 2, EOS]]
    )
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels = ids.clone()
    labels[:, :7] = -100
    return Batch.from_padded(ids, mask, positions, labels, LATENT)


def train(model, steps=4, lr=0.05):
    optimizer = torch.optim.AdamW(parameter_groups(model, experiment(lr=lr)))
    losses = []
    for _ in range(steps):
        loss = model(batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(causal_lm):
    ids = torch.tensor([[1, START, LATENT, END, 5, 6]])
    with torch.no_grad():
        return causal_lm(ids).logits
