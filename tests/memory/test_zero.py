"""ZeRO's formulas and the replay of its gradient path, on numbers small enough to follow by hand."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coconut_ds.config.deepspeed import DeepSpeedConfig, LatentMemory
from coconut_ds.memory.fake_run import ACTIVATIONS, GRADIENTS, Arrival, BackwardBegins, Trace, peak_of
from coconut_ds.memory.zero import (
    COMMUNICATION,
    Partition,
    Sizes,
    ZeroSettings,
    gpu_states,
    host_states,
    replay,
    step_items,
)

SIZES = Sizes(groups=((400, 100, 100), (8,)), frozen=50, buffer_bytes=12)
ZERO2 = ZeroSettings(
    stage=2, offload_optimizer=False, offload_param=False, pin_memory=True, bucket=150, overlap=False,
    round_robin=False, ranks=2, model_bytes=4, accumulates=False, device="cuda",
)  # fmt: skip


def sizes_of(items):
    return {item.name: item.size for item in items}


def test_states_on_the_gpu():
    assert sizes_of(gpu_states(SIZES, ZERO2)) == {
        "trainable weights": 4 * 608,
        "frozen weights": 4 * 50,
        "buffers": 12,
        "fp32 master weights": 4 * 304,
        "Adam moments": 8 * 304,
    }


def test_sixteen_bits_halve_the_weights_and_not_the_optimizer():
    half = sizes_of(gpu_states(SIZES, replace(ZERO2, model_bytes=2)))
    assert half["trainable weights"] == 2 * 608 and half["Adam moments"] == 8 * 304


def test_offload_moves_the_optimizer_to_the_host():
    zero = replace(ZERO2, offload_optimizer=True)
    assert "Adam moments" not in sizes_of(gpu_states(SIZES, zero))
    host = sizes_of(host_states(SIZES, zero))
    assert host["Adam moments"] == 8 * 304
    assert host["accumulators"] == 4 * 608  # rank 1 owns some of every parameter, counted whole
    assert host["rounding of pinned blocks"] > 0
    assert "rounding of pinned blocks" not in sizes_of(host_states(SIZES, replace(zero, pin_memory=False)))


def test_a_partition_ends_inside_a_parameter():
    partition = Partition.heaviest(SIZES, ZERO2)
    assert partition.parts == ((0, 1), (1,), (1,), (0, 1))
    assert partition.owned == (0, 1, 2, 3) and partition.size == 300 + 4


def test_round_robin_deals_parameters_out():
    sizes = Sizes(((10, 20, 30, 40),), 0, 0)
    plain = Partition.heaviest(sizes, ZERO2)
    dealt = Partition.heaviest(sizes, replace(ZERO2, round_robin=True))
    assert plain.parts == ((0,), (0,), (0, 1), (1,))
    assert dealt.parts == ((0,), (0, 1), (0,), (1,))  # flattened as 10, 30, 20, 40


def test_the_bucket_comes_with_the_first_gradient_and_activations_count_beside_it():
    sizes = Sizes(((100, 100),), 0, 0)
    events = [
        (1000, ACTIVATIONS), BackwardBegins(), (400, GRADIENTS), (-400, GRADIENTS), Arrival(1),
        (-1000, ACTIVATIONS), (400, GRADIENTS), (-400, GRADIENTS), Arrival(0),
    ]  # fmt: skip
    run = replay(Trace(events, sizes.flat), sizes, ZERO2)
    assert run.peak == 1000 + 4 * 150 + 400
    assert run.parts == {ACTIVATIONS: 1000, COMMUNICATION: 600, GRADIENTS: 400}
    assert run.peak_in_backward
    doubled = replay(Trace(events, sizes.flat), sizes, replace(ZERO2, overlap=True))
    assert doubled.peak == run.peak + 600


def test_zero_1_keeps_every_gradient_and_zero_2_with_offload_none():
    sizes = Sizes(((100,) * 20,), 0, 0)
    events = [BackwardBegins()]
    for index in reversed(range(20)):
        events += [(400, GRADIENTS), (-400, GRADIENTS), Arrival(index)]
    trace = Trace(events, sizes.flat)
    assert replay(trace, sizes, replace(ZERO2, stage=1)).own[GRADIENTS] >= 20 * 400
    offloaded = replay(trace, sizes, replace(ZERO2, offload_optimizer=True))
    assert offloaded.own[GRADIENTS] == 400


def test_a_parameter_larger_than_the_bucket_takes_its_gradient_and_its_copies():
    sizes = Sizes(((400,),), 0, 0)
    events = [BackwardBegins(), (1600, GRADIENTS), (-1600, GRADIENTS), Arrival(0)]
    offloaded = replay(Trace(events, sizes.flat), sizes, replace(ZERO2, offload_optimizer=True))
    assert offloaded.own[GRADIENTS] == 2 * 1600  # the gradient and its clone
    assert offloaded.own[COMMUNICATION] == 4 * 150 + 1600  # the bucket and the flattened copy


@pytest.mark.parametrize("bucket, not_reduced", [(5000, 1000), (250, 1800)])
def test_the_step_of_zero_1_begins_with_all_gradients_and_the_bucket(bucket, not_reduced):
    sizes = Sizes(((100,) * 20,), 0, 0)  # each rank owns 1,000 elements
    items = sizes_of(step_items(sizes, replace(ZERO2, stage=1, bucket=bucket)))
    assert items == {
        "own gradients": 4 * 1000,
        "gradients not yet reduced": 4 * not_reduced,  # those in the full bucket have given up their memory
        "reduce bucket": 4 * bucket,
    }
    zero = replace(ZERO2, device="cpu", moment_bytes=1)
    one, two = (step_items(sizes, replace(zero, stage=stage)) for stage in (1, 2))
    assert one == two != []  # when Adam needs its square roots, the others and the bucket are free


def test_the_bucket_of_zero_1_stays_from_the_first_micro_batch_of_a_step():
    zero = replace(ZERO2, stage=1, accumulates=True)
    run = replay(Trace([(1000, ACTIVATIONS), (-1000, ACTIVATIONS)], (100,)), Sizes(((100,),), 0, 0), zero)
    assert run.peak == 1000 + 4 * 100 + 4 * 150 and not run.peak_in_backward


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(1, 2000),
    st.sampled_from([1, 2]),
    st.booleans(),
)
def test_what_is_replayed_is_at_least_the_trace(elements, ranks, bucket, stage, offload):
    sizes = Sizes((tuple(elements),), 0, 0)
    events = [(500, ACTIVATIONS), BackwardBegins()]
    for index in reversed(range(len(elements))):
        events += [(4 * elements[index], GRADIENTS), (-4 * elements[index], GRADIENTS), Arrival(index)]
    zero = replace(ZERO2, ranks=ranks, bucket=bucket, stage=stage, offload_optimizer=offload)
    run = replay(Trace([*events, (-500, ACTIVATIONS)], sizes.flat), sizes, zero)
    assert run.peak >= peak_of(events) + 4 * bucket
    owned = Partition.heaviest(sizes, zero)
    assert sum(elements[i] for i in owned.owned) >= -(-sum(elements) // ranks)


@pytest.mark.parametrize("ranks, share", [(1, 608), (2, 304), (4, 152)])
def test_more_ranks_share_the_optimizer(ranks, share):
    states = sizes_of(gpu_states(SIZES, replace(ZERO2, ranks=ranks)))
    assert states["fp32 master weights"] == 4 * share


def ds_config_of(kind="fp16", **blocks):
    stock = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "optimizer": {"type": "AdamW", "params": {}},
        kind: {"enabled": True},
    }
    for block, values in blocks.items():
        target = stock["optimizer"]["params"] if block == "params" else stock[kind]
        target.update(values)
    return DeepSpeedConfig("a.json", stock, None, LatentMemory())


LOW_FP16 = {"fp16_master_weights_and_grads": True}
LOW_BF16 = {"bf16_master_weights_and_grads": True}


@pytest.mark.parametrize(
    "ds_config, moments, master, gradients",
    [
        (ds_config_of(), 8, 4, 4),
        (ds_config_of(params={"fp32_optimizer_states": False}), 8, 4, 4),  # alone it changes nothing
        (ds_config_of(precision=LOW_FP16), 8, 2, 2),
        (ds_config_of(precision=LOW_FP16, params={"fp32_optimizer_states": False}), 4, 2, 2),
        (ds_config_of("bf16", precision=LOW_BF16), 8, 2, 2),
        (ds_config_of("bf16", precision={**LOW_BF16, "bf16_optimizer_states": True}), 4, 2, 2),
    ],
)
def test_bytes_of_16_bit_states_on_the_host(ds_config, moments, master, gradients):
    zero = ZeroSettings.of(ds_config, 2, True, "cuda")
    host = sizes_of(host_states(SIZES, zero))
    bits = "fp32" if master == 4 else "16-bit"
    assert host["Adam moments"] == moments * 304
    assert host[f"{bits} master weights"] == master * 304
    assert host[f"{bits} gradients"] == gradients * 304
    assert ("accumulators" in host) == (master == 4)


def test_only_small_pinned_blocks_are_rounded_with_a_threshold():
    zero = replace(ZERO2, offload_optimizer=True)
    every, none = (
        sizes_of(host_states(SIZES, replace(zero, rounds_up_to=limit)))["rounding of pinned blocks"]
        for limit in (None, 1)
    )
    assert every > none == 0


@pytest.mark.parametrize("device, roots", [("cuda", 1), ("cpu", 2)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_collected_gradients_live_until_the_last_group_is_flattened(device, roots, ranks):
    zero, group = replace(ZERO2, ranks=ranks, device=device), (100,) * 6000 * ranks
    one, two = (
        sum(item.size for item in step_items(Sizes(groups, 0, 0), zero))
        for groups in ((group,), (group, (8,)))
    )
    assert one == 4 * 600_000 * (1 + roots)
    assert two == 4 * 600_000 * (2 + roots) + 4 * 8


def test_without_a_gpu_the_gathered_weights_are_copied():
    zero = replace(ZERO2, offload_optimizer=True)
    many = Sizes(((10,) * 500,), 0, 0)
    on_gpu, on_cpu = (sizes_of(step_items(many, replace(zero, device=device))) for device in ("cuda", "cpu"))
    assert "norm in fp64" in on_gpu and on_cpu == {"gathered weights": 4 * 5000}
    assert "norm in fp64" in sizes_of(step_items(many, replace(zero, device="cpu", ranks=1)))
