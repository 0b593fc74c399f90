"""Inside the real latent loop: which hidden states, of which pass and row, each of six latents depends on.

Shapes: B rows, T columns.
"""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.data.batching import Batch
from coconut_ds.model.coconut import Coconut
from coconut_ds.thoughts import History, Thought, ThoughtSettings, available_thoughts, build_thought

LATENT, LATENTS = 19, 6
QUESTIONS = (5, 2)  # columns before the first latent, of the two rows
D = 16


class Recorder(Thought):
    """Another thought, and for each of its calls the columns with a gradient, row by row."""

    def __init__(self, inner):
        super().__init__(D, ThoughtSettings())
        self.inner = inner
        self.touched = []

    def forward(self, history):
        copy, leaves = History(), []
        for hidden_BTD, mask_BT in history._passes:
            leaves.append(hidden_BTD.detach().requires_grad_())
            copy.append(leaves[-1], mask_BT)
        gradients = torch.autograd.grad(self.inner(copy).sum(), leaves, allow_unused=True)
        used = [torch.zeros_like(h) if g is None else g for h, g in zip(leaves, gradients, strict=True)]
        touched_BT = torch.cat(used, dim=1).abs().sum(-1) > 0
        self.touched.append([row.nonzero().flatten().tolist() for row in touched_BT])
        return self.inner(history)


def batch():
    rows = [[*range(1, n + 1), *[LATENT] * LATENTS, 18, 17] for n in QUESTIONS]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    labels = torch.where(ids >= 17, ids, -100).masked_fill(ids == LATENT, -100)
    return Batch.from_padded(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), labels, LATENT)


def run(name, width, scope, latent_memory):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=32, n_embd=D, n_layer=2, n_head=2))
    weights = tuple(0.9**k for k in range(width))
    thought = build_thought(name, D, ThoughtSettings(width, "uniform", scope, weights))
    recorder = Recorder(thought)
    model = Coconut(base.eval(), recorder, latent_memory)
    return model, recorder, model(batch())


@pytest.mark.parametrize("name", ["fixed_window", "learnable_window"])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("scope", ["sequence", "pass"])
def test_each_latent_sees_the_newest_states_of_its_own_row(name, width, scope):
    _, recorder, _ = run(name, width, scope, LatentMemory())
    assert len(recorder.touched) == LATENTS
    columns = max(QUESTIONS)
    for latent, rows in enumerate(recorder.touched):
        for question, touched in zip(QUESTIONS, rows, strict=True):
            available = question + latent if scope == "sequence" else question if latent == 0 else 1
            newest = columns + latent
            assert touched == list(range(newest - min(width, available), newest)), f"latent {latent}"


@pytest.mark.parametrize("name", ["fixed_window", "learnable_window", "mlp_projection"])
def test_one_wide_gives_plain_coconuts_loss_and_gradients_bit_for_bit(name):
    losses, gradients = [], []
    for thought in ("last_hidden", name):
        model, _, loss = run(thought, 1, "sequence", LatentMemory())
        loss.backward()
        losses.append(loss)
        gradients.append([p.grad for p in model.base.parameters()])
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", available_thoughts())
def test_without_latents_a_thought_has_a_gradient_of_zeros(name):
    """And the loss is the same: a micro-batch of a stage without latents must not leave an old gradient."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=32, n_embd=D, n_layer=2, n_head=2)).eval()
    model = Coconut(
        base, build_thought(name, D, ThoughtSettings(2, "uniform", "sequence", (0.6, 0.4))), LatentMemory()
    )
    ids = torch.tensor([[0, 3, 4, 5], [1, 2, 6, 7]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    labels = ids.masked_fill(ids < 5, -100)
    loss = model(Batch.from_padded(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), labels, LATENT))
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.thought.parameters())
    logits = base(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
