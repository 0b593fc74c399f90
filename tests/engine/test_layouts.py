"""A checkpoint loads under another ZeRO stage, offload setting or order: nothing changes in any bit."""

import itertools
import json

import pytest

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
FILES = {
    "1": {"stage": 1},
    "2": {"stage": 2},
    "2 offload": {"stage": 2, "round_robin_gradients": True} | OFFLOAD,
    "2 aligned": {"stage": 2, "parameter_alignment": True},
    "3": {"stage": 3, "sub_group_size": 5000},
    "3 offload": {"stage": 3, "offload_param": {"device": "cpu"}} | OFFLOAD,
}
CHAINS = {
    "fp32": ["1", "2 offload", "2", "3 offload", "3", "2 aligned", "3", "2 offload", "3 offload", "1"],
    "bf16": ["2 offload", "1", "3 offload", "1", "2", "3", "2 offload"],
}
STEPS = 2  # with each file
LORA = {"tuning": "lora", "lora_r": 2, "lora_dropout": 0.0}


def ds_config(name, precision):
    values = {
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"reduce_bucket_size": 50_000, **FILES[name]},
    }
    return values | ({"bf16": {"enabled": True}} if precision == "bf16" else {})


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((1, {}), id="full, 1 rank"),
        pytest.param((2, {}), id="full, 2 ranks", marks=pytest.mark.slow),
        pytest.param((2, LORA), id="lora, 2 ranks", marks=pytest.mark.slow),
    ],
)
def results(request, tiny_experiment, tmp_path_factory, warm):
    ranks, tuning = request.param
    folder = tmp_path_factory.mktemp("layouts")
    experiment = (
        tiny_experiment | {"thought": "mlp_projection", "thought_lr": 0.02, "uniform_prob": 0.0} | tuning
    )
    chains = {kind: [(STEPS, ds_config(name, kind)) for name in names] for kind, names in CHAINS.items()}
    if tuning or ranks == 1:  # every hop is shown by full tuning on two ranks
        chains = {kind: chain[:4] for kind, chain in chains.items()}
    chains["straight"] = [(STEPS * len(chains["fp32"]), ds_config("2", "fp32"))]
    (folder / "chains.json").write_text(json.dumps({"experiment": experiment, "chains": chains}))
    files = (folder / "chains.json", folder / "out.json")
    warm.run("tests.launched.layouts", *files, ranks=ranks, cwd=folder, timeout=600)
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("precision", CHAINS)
def test_weights_and_moments_are_equal_bit_for_bit(results, precision):
    pairs = itertools.pairwise(CHAINS[precision])
    changed = {pair: hop["changed"] for pair, hop in zip(pairs, results[precision][1:], strict=False)}
    assert len(changed) >= 3
    assert changed == dict.fromkeys(changed, [])
    assert [hop["client_state"]["number"] for hop in results[precision][1:]] == list(range(len(changed)))


def test_the_losses_go_on_as_without_a_change(results):
    losses, straight = ([hop["losses"] for hop in results[name]] for name in ("fp32", "straight"))
    assert sum(losses, []) == pytest.approx(sum(straight, []), rel=1e-4)
    assert losses[-1][-1] < losses[0][0]
