"""Tiny random models and batches that the tests of this folder share."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.data.batching import Batch
from coconut_ds.model.coconut import Coconut
from coconut_ds.thoughts import ThoughtSettings, build_thought

VOCABULARY, HIDDEN, LATENT_ID = 61, 32, 60
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
EQUAL_ROWS = ((9, 3, 5), (9, 3, 5), (9, 3, 5))
RAGGED_ROWS = ((9, 4, 3), (4, 1, 5), (6, 2, 4))
NO_LATENT_ROWS = ((9, 0, 4), (5, 0, 6), (7, 0, 2))
PLAIN = LatentMemory(
    supervised_logits_only=False,
    segmented_cache=False,
    deferred_weight_gradients=False,
    activation_checkpointing="none",
    fused_activations=False,
)


def gpt2(dropout: float = 0.0) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=HIDDEN,
        n_layer=3,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return GPT2LMHeadModel(config)


def llama(dropout: float = 0.0) -> PreTrainedModel:
    """Grouped queries (4 heads on 2), head not tied."""
    config = LlamaConfig(
        **SIZES,
        num_key_value_heads=2,
        attention_dropout=dropout,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def qwen2(dropout: float = 0.0) -> PreTrainedModel:
    """One key-value head, biases on q, k, v, head tied."""
    config = Qwen2Config(
        **SIZES,
        num_key_value_heads=1,
        attention_dropout=dropout,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config)


def qwen3(dropout: float = 0.0) -> PreTrainedModel:
    """A norm of queries and one of keys, with equal weights for different numbers of heads."""
    config = Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, attention_dropout=dropout)
    return Qwen3ForCausalLM(config)


def mistral(dropout: float = 0.0) -> PreTrainedModel:
    """A sliding window shorter than the rows, in all layers."""
    config = MistralConfig(
        **SIZES,
        num_key_value_heads=2,
        attention_dropout=dropout,
        sliding_window=6,
        bos_token_id=1,
        eos_token_id=2,
    )
    return MistralForCausalLM(config)


def mixed_windows(dropout: float = 0.0) -> PreTrainedModel:
    """A sliding window in one layer, full attention in the others."""
    config = Qwen2Config(
        **SIZES,
        num_key_value_heads=2,
        attention_dropout=dropout,
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )
    return Qwen2ForCausalLM(config)


def opt(dropout: float = 0.0) -> PreTrainedModel:
    """Positions with an offset, ReLU, biases everywhere."""
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=HIDDEN,
        dropout=dropout,
        attention_dropout=dropout,
        layerdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return OPTForCausalLM(config)


ARCHITECTURES = {"gpt2": gpt2, "llama": llama, "qwen2": qwen2}
MORE_ARCHITECTURES = {"qwen3": qwen3, "mistral": mistral, "mixed_windows": mixed_windows, "opt": opt}


def make_model(architecture: str, dropout: float = 0.0, seed: int = 0) -> PreTrainedModel:
    """A model in train mode whose weights are large enough for every path to matter."""
    torch.manual_seed(seed)
    model = (ARCHITECTURES | MORE_ARCHITECTURES)[architecture](dropout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


def make_coconut(
    architecture: str, settings: LatentMemory, dropout: float = 0.0, thought: str = "last_hidden"
) -> Coconut:
    model = make_model(architecture, dropout)
    return Coconut(model, build_thought(thought, HIDDEN, ThoughtSettings()), settings).train()


def make_batch(rows: tuple[tuple[int, int, int], ...], seed: int = 1) -> Batch:
    """rows: (question, latent, answer tokens) of each; left-padded to a common first latent column."""
    generator = torch.Generator().manual_seed(seed)
    before = max(question for question, _, _ in rows)
    width = before + max(latents + answer for _, latents, answer in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (question, latents, answer) in enumerate(rows):
        start, stop = before - question, before + latents + answer
        ids[row, start:stop] = torch.randint(1, LATENT_ID, (stop - start,), generator=generator)
        ids[row, before : before + latents] = LATENT_ID
        mask[row, start:stop] = 1
        labels[row, before + latents : stop] = ids[row, before + latents : stop]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return Batch.from_padded(ids, mask, positions, labels, LATENT_ID)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(coconut: Coconut, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    coconut.zero_grad()
    loss = coconut(batch)
    loss.backward()
    return loss.item(), gradients(coconut.causal_lm)


def assert_same_gradients(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Every gradient within `tolerance` of the other, relative to its norm."""
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        # A key bias moves no softmax: its exact gradient is zero and both are rounding noise.
        is_noise = gradient.norm() < 1e-6
        assert is_noise or error <= tolerance, f"{name}: {error:.2e}"
