"""Published implementations, one forward and backward each: the same loss, logits, gradients and tokens.

Every case of GOLDEN_DIR (default ../shared/golden) is a pair NAME.safetensors + NAME.json; the README there
says what is in them.  A case with `latent_weights` is the published learnable window: softmax over the newest
n states of the newest pass, its weights running from the oldest state to the newest.

Shapes: B rows, T columns, V vocabulary, W window.
"""

import itertools
import json
import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.data.batching import Batch
from coconut_ds.model.coconut import Coconut
from coconut_ds.thoughts import ThoughtSettings, build_thought

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parents[2] / "shared" / "golden"))
CASES = sorted(path.stem for path in FOLDER.glob("*.json"))
TOLERANCE = 1e-5

pytestmark = pytest.mark.skipif(not CASES, reason=f"no golden cases in {FOLDER}; set GOLDEN_DIR")


def all_latent_memories():
    """Every combination of the switches; a chunk of 4 tokens cuts every case's loss into several."""
    choices = {
        field.name: {"loss_chunk_tokens": [4, 1024], "activation_checkpointing": ["none", "layers"]}.get(
            field.name, [False, True]
        )
        for field in fields(LatentMemory)
    }
    for values in itertools.product(*choices.values()):
        yield LatentMemory(**dict(zip(choices, values, strict=True)))


def name_of(memory):
    return "-".join(f"{k}={v}" for k, v in vars(memory).items() if v != getattr(PLAIN, k)) or "plain"


PLAIN = LatentMemory(
    supervised_logits_only=False,
    segmented_cache=False,
    deferred_weight_gradients=False,
    fused_activations=False,
)


class Case:
    def __init__(self, name):
        self.tensors = load_file(FOLDER / f"{name}.safetensors")
        self.facts = json.loads((FOLDER / f"{name}.json").read_text())

    def base(self):
        """The Hugging Face model with the case's weights; what only old configurations had is left out."""
        written = self.facts["config"]
        old = ("summary_", "_", "transformers_version")
        config_class = CONFIG_MAPPING[written["model_type"]]
        config = config_class.from_dict({key: v for key, v in written.items() if not key.startswith(old)})
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        missing, unexpected = base.load_state_dict(self.by_name("weights."), strict=False)
        assert set(missing) <= {"lm_head.weight"} and not unexpected
        assert not missing or config.tie_word_embeddings
        return base

    def by_name(self, prefix):
        return {
            name.removeprefix(prefix): value
            for name, value in self.tensors.items()
            if name.startswith(prefix)
        }

    def model(self, latent_memory):
        base = self.base()
        thought_name, settings = "last_hidden", ThoughtSettings()
        if (weights := self.tensors.get("latent_weights")) is not None:
            thought_name, settings = "learnable_window", ThoughtSettings(len(weights), window_scope="pass")
        thought = build_thought(thought_name, base.config.hidden_size, settings)
        if weights is not None:
            thought.load_state_dict({"logits_W": weights.flip(0)})
        return Coconut(base, thought, latent_memory).train()

    def batch(self):
        names = ("input_ids", "attention_mask", "position_ids", "labels")
        return Batch.from_padded(*(self.tensors[name] for name in names), self.facts["latent_token_id"])


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return Case(request.param)


def assert_loss_and_gradients(case, model):
    loss = model(case.batch())
    assert loss.item() == pytest.approx(case.facts["loss"], abs=TOLERANCE)
    loss.backward()
    expected = case.by_name("grad.")
    gradients = {name: p.grad for name, p in model.base.named_parameters(remove_duplicate=False)}
    if "latent_weights" in expected:
        gradients["latent_weights"] = model.thought.logits_W.grad.flip(0)
    assert set(expected) <= set(gradients)
    assert set(gradients) - set(expected) <= {"lm_head.weight"}
    for name, value in expected.items():
        difference = (gradients[name] - value).norm()
        assert difference <= TOLERANCE * value.norm().clamp(min=1e-6), (
            f"{name}: {difference} of {value.norm()}"
        )


@pytest.mark.parametrize("latent_memory", [PLAIN, LatentMemory()], ids=["plain", "default"])
def test_logits(case, latent_memory):
    model = case.model(latent_memory)
    batch = case.batch()
    with torch.no_grad():
        logits_BTV = model.head(model.hidden_states(batch))
    real_BT = batch.attention_mask_BT.bool()
    difference = (logits_BTV - case.tensors["logits"])[real_BT].abs().max()
    assert difference < TOLERANCE


@pytest.mark.parametrize("latent_memory", [PLAIN, LatentMemory()], ids=["plain", "default"])
def test_loss_and_gradients(case, latent_memory):
    assert_loss_and_gradients(case, case.model(latent_memory))


def test_every_combination_of_the_memory_switches(case):
    for latent_memory in all_latent_memories():
        try:
            assert_loss_and_gradients(case, case.model(latent_memory))
        except AssertionError as error:
            raise AssertionError(f"{name_of(latent_memory)}: {error}") from error


def prompts(case):
    """All prompts of a case in one batch, padded on the left so that the first latents share a column."""
    latent_id = case.facts["latent_token_id"]
    rows = [item["prompt"] for item in case.facts["greedy"]]
    first = [row.index(latent_id) if latent_id in row else len(row) for row in rows]
    left = [max(first) - f for f in first]
    width = max(len(row) + pad for row, pad in zip(rows, left, strict=True))
    ids = torch.full((len(rows), width), case.facts["eos_token_id"])
    mask = torch.zeros_like(ids)
    for index, (row, pad) in enumerate(zip(rows, left, strict=True)):
        ids[index, pad : pad + len(row)] = torch.tensor(row)
        mask[index, pad : pad + len(row)] = 1
    return Batch.from_padded(
        ids, mask, (mask.cumsum(1) - 1).clamp(min=0), torch.full_like(ids, -100), latent_id
    )


def alone(case, prompt):
    ids = torch.tensor([prompt])
    labels = torch.full_like(ids, -100)
    positions = torch.arange(len(prompt))[None]
    return Batch.from_padded(ids, torch.ones_like(ids), positions, labels, case.facts["latent_token_id"])


@pytest.mark.parametrize("latent_memory", [PLAIN, LatentMemory()], ids=["plain", "default"])
def test_greedy_tokens(case, latent_memory):
    if not case.facts.get("greedy"):
        pytest.skip("the case has no prompts to decode")
    model = case.model(latent_memory).eval()
    most, eos_id = case.facts["greedy_max_new_tokens"], case.facts["eos_token_id"]
    expected = [item["new_tokens"] for item in case.facts["greedy"]]
    assert model.generate(prompts(case), most, eos_id) == expected
    one_by_one = [
        model.generate(alone(case, item["prompt"]), most, eos_id)[0] for item in case.facts["greedy"]
    ]
    assert one_by_one == expected
