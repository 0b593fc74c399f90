"""Two ranks under ZeRO-2 with accumulation: the techniques change memory and nothing else."""

import json

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory, warm):
    out = tmp_path_factory.mktemp("deferral") / "out.json"
    warm.run("tests.launched.deferral", out, ranks=2, cwd=out.parent)
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", ["deferred", "all", "all+checkpointing"])
def test_same_losses(results, name):
    assert results[name]["losses"] == pytest.approx(results["plain"]["losses"], rel=1e-6)


def test_deferral_frees_nearly_half_a_gradient_copy(results):
    saved = results["plain"]["peak_bytes"] - results["deferred"]["peak_bytes"]
    assert saved >= 0.45 * results["deferred"]["gradient_bytes"]


@pytest.mark.parametrize("name", ["deferred", "all", "all+checkpointing"])
def test_hooks_fire_before_the_backward_is_over(results, name):
    """Every layer's weights are handed to DeepSpeed, once, before the first pass leaves the layer below."""
    events = results[name]["events"]
    reduced = [event for event in events if event.startswith("reduce")]
    assert len(reduced) == len(set(reduced)) == 6 * 4
    for layer in range(5, 0, -1):
        done = [events.index(event) for event in reduced if event.startswith(f"reduce {layer} ")]
        assert max(done) < events.index(f"leave {layer - 1}")
