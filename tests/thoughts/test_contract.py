"""What every thought must do, over every module in the folder, and what each window promises.

Shapes: B rows, T columns, W window, D hidden size.
"""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from coconut_ds import thoughts
from coconut_ds.config.experiment import validate_experiment
from coconut_ds.errors import ConfigError
from coconut_ds.thoughts import History, Thought, ThoughtSettings, available_thoughts, build_thought

B, D = 3, 16
ALL = available_thoughts()
WINDOWS = ("fixed_window", "learnable_window")
NO_FEEDBACK = {"pause"}
SETTINGS = ThoughtSettings(window_init="uniform", window_weights=(0.4, 0.3, 0.2, 0.1))


def history_of(passes, masks=None, dtype=torch.float32):
    history = History()
    for index, hidden_BTD in enumerate(passes):
        mask_BT = torch.ones(hidden_BTD.shape[:2], dtype=torch.bool) if masks is None else masks[index]
        history.append(hidden_BTD.to(dtype), mask_BT)
    return history


def random_passes(*widths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, width, D, generator=generator) for width in widths]


def build(name, **changes):
    torch.manual_seed(1)
    return build_thought(name, D, ThoughtSettings(**{**vars(SETTINGS), **changes}))


def test_the_folder_is_the_registry():
    assert set(ALL) >= {"last_hidden", "fixed_window", "learnable_window", "mlp_projection", "pause"}
    assert all(isinstance(build(name), Thought) for name in ALL)


def test_one_file_is_all_a_new_thought_takes(tmp_path, monkeypatch):
    """The example of docs/methods.md, put beside the others."""
    guide = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    code = re.search(r"```python\n(.*?)```", guide, re.DOTALL).group(1)
    (tmp_path / "last_two.py").write_text(code)
    monkeypatch.setattr(thoughts, "__path__", [*thoughts.__path__, str(tmp_path)])
    assert available_thoughts() == tuple(sorted((*ALL, "last_two")))
    passes = random_passes(5, 1)
    expected_BD = (passes[0][:, -1] + passes[1][:, -1]) / 2
    torch.testing.assert_close(build("last_two")(history_of(passes)), expected_BD)
    monkeypatch.delitem(sys.modules, "coconut_ds.thoughts.last_two")


def test_the_guide_names_every_thought():
    guide = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    table = guide.split("## Thoughts")[1].split("## Tuning")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) - {"thought"} == set(ALL)


def test_settings_start_as_the_schema_says():
    values = dict(name="t", model_id="m", train_path="t.json", val_path="v.json", method="coconut")
    assert ThoughtSettings.of(validate_experiment(values, "test")) == ThoughtSettings()


def test_a_misspelled_thought_is_named_with_a_proposal():
    with pytest.raises(ConfigError, match="'last_hiden' does not exist; did you mean 'last_hidden'"):
        build("last_hiden")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast_module", [True, False])
def test_shape_and_dtype_follow_the_hidden_states(name, dtype, cast_module):
    thought = build(name)
    if cast_module:
        thought = thought.to(dtype)
    thought_BD = thought(history_of(random_passes(5, 1), dtype=dtype))
    assert thought_BD.shape == (B, D)
    assert thought_BD.dtype == dtype
    assert torch.isfinite(thought_BD).all()


@pytest.mark.parametrize("name", ALL)
def test_half_precision_agrees_with_fp32(name):
    passes = random_passes(5, 1)
    exact_BD = build(name)(history_of(passes))
    half_BD = build(name).bfloat16()(history_of(passes, dtype=torch.bfloat16))
    torch.testing.assert_close(half_BD.float(), exact_BD, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_and_the_newest_state_receive_a_gradient(name):
    thought = build(name)
    if name == "mlp_projection":
        nn.init.normal_(thought.outer.weight, std=0.1)  # zero at the start, which also stops inner's gradient
    passes = [hidden.requires_grad_() for hidden in random_passes(5, 1)]
    thought(history_of(passes)).pow(3).sum().backward()  # a square would be the same for every direction
    for parameter_name, parameter in thought.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name
    if name not in NO_FEEDBACK:
        assert passes[-1].grad.abs().sum() > 0


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("garbage", [1e4, float("nan"), float("inf")])
def test_padding_never_leaks(name, garbage):
    """Row 1 is a short question: its padding holds garbage, the result and the gradients do not."""
    clean, mask_BT = random_passes(4)[0], torch.ones(B, 4, dtype=torch.bool)
    mask_BT[1, :3] = False
    dirty = clean.clone()
    dirty[1, :3] = garbage
    dirty.requires_grad_()
    thought = build(name, window_size=4)
    thought_BD = thought(history_of([dirty], [mask_BT]))
    alone = build(name, window_size=4)(history_of([clean[:, 3:]]))
    assert torch.equal(thought_BD[1], alone[1])
    if dirty.grad is None and name not in NO_FEEDBACK:
        thought_BD.pow(2).sum().backward()
        assert torch.equal(dirty.grad[1, :3], torch.zeros(3, D))
        assert all(torch.isfinite(p.grad).all() for p in thought.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ALL)
def test_a_row_of_padding_only_stays_finite(name):
    mask_BT = torch.ones(B, 4, dtype=torch.bool)
    mask_BT[2] = False
    thought = build(name)
    thought_BD = thought(history_of(random_passes(4), [mask_BT]))
    thought_BD.sum().backward() if thought_BD.requires_grad else None
    assert torch.isfinite(thought_BD).all()
    assert all(torch.isfinite(p.grad).all() for p in thought.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalized_hidden_is_the_equation(dtype):
    embedding_VD = torch.randn(50, D, generator=torch.Generator().manual_seed(3)) * 7
    thought = build("normalized_hidden")
    thought.start(embedding_VD)
    passes = random_passes(5, 1)
    hidden_BD = passes[-1][:, -1]
    norm = sum(row.norm() for row in embedding_VD) / len(embedding_VD)
    expected_BD = torch.stack([norm * row / row.norm() for row in hidden_BD])
    thought_BD = thought.to(dtype)(history_of(passes, dtype=dtype))
    torch.testing.assert_close(
        thought_BD.float(), expected_BD, rtol=1e-6 if dtype.itemsize == 4 else 2e-2, atol=1e-5
    )
    torch.testing.assert_close(thought.state_dict()["embedding_norm"].float(), norm, rtol=5e-3, atol=0)


@pytest.mark.parametrize("name", ("last_hidden", "mlp_projection", *WINDOWS))
@pytest.mark.parametrize("init", ["recent", "uniform"])
def test_one_wide_equals_the_last_hidden_state_bit_for_bit(name, init):
    passes = random_passes(5, 1)
    expected_BD = passes[-1][:, -1]
    assert torch.equal(build(name, window_size=1, window_init=init)(history_of(passes)), expected_BD)


def test_windows_take_the_newest_first_across_passes():
    passes = random_passes(3, 1, 1)
    states = torch.cat(passes, dim=1)
    weights = torch.tensor([0.6, 0.3, 0.1])
    expected_BD = 0.6 * states[:, -1] + 0.3 * states[:, -2] + 0.1 * states[:, -3]
    settings = dict(window_size=3, window_weights=(0.6, 0.3, 0.1))
    torch.testing.assert_close(build("fixed_window", **settings)(history_of(passes)), expected_BD)
    learnable = build("learnable_window", **settings)
    learnable.load_state_dict({"logits_W": weights.log()})
    torch.testing.assert_close(learnable(history_of(passes)), expected_BD)
    assert learnable.window_weights() == pytest.approx(weights.tolist())


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("scope", ["sequence", "pass"])
def test_reach_of_each_of_six_latents(name, width, scope):
    """Latent k depends on exactly min(W, available) states, whichever passes they came from."""
    question = 2
    passes = [hidden.requires_grad_() for hidden in random_passes(question, 1, 1, 1, 1, 1)]
    thought = build(name, window_size=width, window_scope=scope)
    for latent in range(6):
        for hidden_BTD in passes:
            hidden_BTD.grad = None
        thought(history_of(passes[: latent + 1])).sum().backward()
        touched = [
            bool(hidden_BTD.grad is not None and hidden_BTD.grad[:, column].abs().sum() > 0)
            for hidden_BTD in passes
            for column in range(hidden_BTD.shape[1])
        ]
        available = passes[latent].shape[1] if scope == "pass" else question + latent
        last = question + latent
        expected = [last - min(width, available) <= column < last for column in range(len(touched))]
        assert touched == expected, f"latent {latent}"


@pytest.mark.parametrize("width", [2, 3, 4])
def test_recent_starts_within_a_thousandth_of_plain_coconut(width):
    passes = [nn.functional.layer_norm(hidden, (D,)) for hidden in random_passes(5, 1)]
    thought_BD = build("learnable_window", window_size=width, window_init="recent")(history_of(passes))
    last_BD = passes[-1][:, -1]
    assert ((thought_BD - last_BD).norm(dim=1) / last_BD.norm(dim=1)).max() < 1e-3
    assert not torch.equal(thought_BD, last_BD)


def test_uniform_starts_as_the_mean_of_the_available_states():
    passes = random_passes(2)
    thought_BD = build("learnable_window", window_size=4, window_init="uniform")(history_of(passes))
    torch.testing.assert_close(thought_BD, passes[0].mean(dim=1))


def test_window_weights_are_there_for_windows_only():
    for name in ALL:
        weights = build(name, window_size=3).window_weights()
        assert (weights is not None) == (name in WINDOWS)
        assert weights is None or (len(weights) == 3 and sum(weights) == pytest.approx(1))


@pytest.mark.parametrize("weights", [(0.6, 0.4), (0.0, 0.5, 0.5), (0.6, 0.5, -0.1)])
def test_fixed_window_refuses_weights_it_cannot_use(weights):
    with pytest.raises(ConfigError, match="latent_window_weights"):
        build("fixed_window", window_size=3, window_weights=weights)


def test_history_pads_what_does_not_exist():
    history = history_of([torch.ones(B, 2, D)])
    hidden_BWD, mask_BW = history.newest(5)
    assert mask_BW.tolist() == [[True, True, False, False, False]] * B
    assert torch.equal(hidden_BWD[:, 2:], torch.zeros(B, 3, D))


def test_history_refuses_a_mask_of_another_shape():
    with pytest.raises(ValueError, match=r"mask of shape \(3, 2\)"):
        History().append(torch.ones(B, 2, D), torch.ones(B, 3))
