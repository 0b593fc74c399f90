"""The chunked head against plain cross-entropy, and how many vocabulary-sized buffers live at once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coconut_ds.memory.fake_run import LiveBytes
from coconut_ds.model.techniques import supervised_loss
from coconut_ds.model.techniques.deferred_grads import install_deferral
from coconut_ds.model.techniques.passes import Context, Step


def reference(hidden_ND, ids_N, head):
    return F.cross_entropy(head(hidden_ND).float(), ids_N, reduction="none")


def make(vocabulary=97, hidden=16, positions=25, bias=False):
    torch.manual_seed(0)
    head = nn.Linear(hidden, vocabulary, bias=bias)
    hidden_ND = torch.randn(positions, hidden, requires_grad=True)
    return head, hidden_ND, torch.randint(0, vocabulary, (positions,))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 25, 1000])
def test_equals_cross_entropy(chunk_tokens, bias):
    head, hidden_ND, ids_N = make(bias=bias)
    expected = reference(hidden_ND, ids_N, head)
    weights_N = torch.rand(len(ids_N))
    wanted = torch.autograd.grad((weights_N * expected).sum(), [hidden_ND, *head.parameters()])
    losses_N = supervised_loss(hidden_ND, ids_N, head, chunk_tokens, Context())
    got = torch.autograd.grad((weights_N * losses_N).sum(), [hidden_ND, *head.parameters()])
    torch.testing.assert_close(losses_N, expected)
    torch.testing.assert_close(got, wanted)


class Scaled(nn.Linear):
    """A head that is more than a matrix."""

    def forward(self, input):
        return super().forward(input) * 2


@pytest.mark.parametrize("chunk_tokens", [7, 1000])
def test_any_head_module_works(chunk_tokens):
    torch.manual_seed(0)
    head, (_, hidden_ND, ids_N) = Scaled(16, 97), make()
    expected = reference(hidden_ND, ids_N, head).sum()
    wanted = torch.autograd.grad(expected, [hidden_ND, *head.parameters()])
    loss = supervised_loss(hidden_ND, ids_N, head, chunk_tokens, Context()).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, [hidden_ND, *head.parameters()]), wanted)


class Tied(nn.Module):
    def __init__(self, vocabulary, hidden, padding_idx=None):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden, padding_idx=padding_idx)
        self.middle = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def loss(self, ids_N, targets_N, chunk_tokens, context: Context):
        hidden_ND = self.middle(self.embedding(ids_N)).tanh()
        return supervised_loss(hidden_ND, targets_N, self.head, chunk_tokens, context).sum()


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("positions, chunk_tokens", [(5, 1000), (40, 1000), (40, 7)])
def test_tied_head_joins_the_embeddings_gradient(positions, chunk_tokens, padding_idx):
    torch.manual_seed(0)
    plain = Tied(31, 16, padding_idx)
    deferred = Tied(31, 16, padding_idx)
    deferred.load_state_dict(plain.state_dict())
    ids_N, targets_N = torch.randint(0, 31, (2, positions))
    plain.loss(ids_N, targets_N, chunk_tokens, Context()).sum().backward()
    context = Context()
    install_deferral(deferred, context)
    fired = []
    deferred.embedding.weight.register_post_accumulate_grad_hook(lambda _: fired.append(1))
    with context.running(Step()):
        loss = deferred.loss(ids_N, targets_N, chunk_tokens, context)
    loss.backward()
    assert fired == [1]
    torch.testing.assert_close(deferred.embedding.weight.grad, plain.embedding.weight.grad)
    torch.testing.assert_close(deferred.middle.weight.grad, plain.middle.weight.grad)


def test_one_vocabulary_sized_gradient_at_a_time():
    peaks = {}
    for is_deferred in (False, True):
        model = Tied(20_000, 16)
        context = Context()
        if is_deferred:
            install_deferral(model, context)
        ids_N = torch.randint(0, 20_000, (4,))
        with LiveBytes() as live:
            with context.running(Step()):
                loss = model.loss(ids_N, ids_N, 1000, context)
            loss.backward()
        peaks[is_deferred] = live.peak / (20_000 * 16 * 4)
    assert peaks[False] > 2
    assert peaks[True] < 1.6


def test_logits_of_one_chunk_exist_at_a_time():
    head, hidden_ND, ids_N = make(vocabulary=5000, positions=64)
    head.weight.requires_grad_(False)
    with LiveBytes() as live:
        supervised_loss(hidden_ND, ids_N, head, 8, Context()).sum().backward()
    assert live.peak < 3 * 8 * 5000 * 4


def test_a_head_that_is_more_than_a_matrix_has_one_buffer_of_logits():
    torch.manual_seed(0)
    head, (_, hidden_ND, ids_N) = Scaled(16, 5000), make(vocabulary=5000, positions=64)
    head.weight.requires_grad_(False)
    with LiveBytes() as live:
        supervised_loss(hidden_ND, ids_N, head, 64, Context()).sum().backward()
    assert live.peak < 2.2 * 64 * 5000 * 4  # Scaled makes a second one
