"""QLoRA on tiny models: equal to plain layers with the same values, small, saved and loaded."""

import dataclasses
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from coconut_ds.config.deepspeed import LatentMemory, validate_ds_config
from coconut_ds.data.curriculum import Stage
from coconut_ds.data.tokenizer import load_vocabulary
from coconut_ds.errors import ConfigError
from coconut_ds.evaluation.saved_models import Trained, described_model, portable_settings
from coconut_ds.memory.fake_run import build_fake_model
from coconut_ds.memory.zero import Sizes
from coconut_ds.model import lora
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.loading import load_base, load_config, parameter_groups, saved_dtype
from coconut_ds.model.quantization import NF4Linear, dequantize_linears, quantize_linears
from coconut_ds.runs.changes import BaseRecord
from coconut_ds.thoughts import ThoughtSettings, build_thought
from coconut_ds.training.trainer import check_start
from tests.model import cases
from tests.model.lora_cases import FAMILIES, MARKERS, batch, coconut, experiment, logits, new_base, train

pytest.importorskip("bitsandbytes")
BASES = {**FAMILIES, "mistral": cases.mistral, "opt": cases.opt}
OFF = cases.PLAIN
ROOT = Path(__file__).parents[2]


def quantized(family, latent_memory=OFF):
    torch.manual_seed(0)
    base = BASES[family]().eval()
    adapted = lora.add_adapters(base, experiment(quantization="nf4"), MARKERS)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    thought = build_thought("last_hidden", base.config.hidden_size, ThoughtSettings())
    return Coconut(adapted, thought, latent_memory)


def gradients(model):
    model.zero_grad()
    loss = model(batch())
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("family", BASES)
def test_quantized_layers_compute_as_plain_layers_with_their_values(family):
    model = quantized(family)
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    assert layers and not any(isinstance(module, Conv1D) for module in model.modules())
    assert not isinstance(model.base.get_output_embeddings(), NF4Linear)
    loss, own = gradients(model)
    dequantize_linears(model)
    plain_loss, plain = gradients(model)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama_untied"])
def test_techniques_change_nothing(family):
    names = [field.name for field in dataclasses.fields(LatentMemory)]
    loss, expected = gradients(quantized(family, OFF))
    checkpointed = dataclasses.replace(LatentMemory(), activation_checkpointing="layers")
    one_on = [dataclasses.replace(OFF, **{name: getattr(LatentMemory(), name)}) for name in names]
    for latent_memory in [LatentMemory(), checkpointed, *one_on]:
        other_loss, other = gradients(quantized(family, latent_memory))
        assert other_loss == pytest.approx(loss, rel=1e-6), latent_memory
        torch.testing.assert_close(other, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama_tied"])
def test_saved_adapter_loads_into_ours_into_stock_peft_and_merges(tmp_path, family):
    model = coconut(family, quantization="nf4")
    losses = train(model)
    assert losses[-1] < losses[0]
    expected = logits(model.base)
    merged = lora.merge(model)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(read), expected, rtol=1e-5, atol=1e-5)

    lora.save_adapter(model, tmp_path)
    fresh = coconut(family, quantization="nf4")
    lora.load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh.base), expected)

    stock_base = new_base(family)
    stock = PeftModel.from_pretrained(stock_base, tmp_path)
    change = (logits(stock) - expected).abs().max() / expected.abs().max()
    assert 0 < change < 0.2  # unquantized weights


def test_settings_of_merged_weights_are_those_of_a_full_model(tmp_path):
    settings, stage = experiment(quantization="nf4"), Stage(0, 0)
    trained = Trained(settings, stage, "run", tmp_path)
    merged = described_model(portable_settings(trained, merged=True), tmp_path).experiment
    assert (merged.tuning, merged.quantization) == ("full", "none")
    adapter = portable_settings(trained, merged=False)["experiment"]
    assert (adapter["tuning"], adapter["quantization"]) == ("lora", "nf4")
    (tmp_path / "adapter_config.json").touch()
    assert (
        described_model(
            {"experiment": adapter, "stage": dataclasses.asdict(stage)}, tmp_path
        ).own.quantization
        == "nf4"
    )


@pytest.mark.parametrize("family", ["gpt2", "llama_tied"])
def test_planner_counts_the_bytes_of_the_real_model(family):
    real = coconut(family, quantization="nf4")
    settings = experiment(quantization="nf4")
    fake = build_fake_model(settings, real.causal_lm.config, 40, MARKERS, LatentMemory()).model
    sizes = [Sizes.of(model, parameter_groups(model, settings)) for model in (real, fake)]
    assert sizes[0] == sizes[1]
    layers = [module for module in real.modules() if isinstance(module, NF4Linear)]
    elements = sum(layer.in_features * layer.out_features for layer in layers)
    assert sizes[0].quantized == elements  # they are in fp32 on the host while the model is loaded
    assert sum(layer.weight.nbytes for layer in layers) == elements / 2
    assert sum(layer.absmax.nbytes for layer in layers) == elements / 64


def test_base_is_loaded_in_its_own_dtype_and_quantized_to_the_same_values(arithmetic, tmp_path):
    vocabulary = load_vocabulary(str(arithmetic / "gpt2"))
    load_base(str(arithmetic / "gpt2"), vocabulary).bfloat16().save_pretrained(tmp_path)
    bases = [load_base(str(tmp_path), vocabulary, as_saved) for as_saved in (True, False)]
    dtypes = {name: str(value.dtype) for name, value in bases[0].named_parameters()}
    assert dtypes["transformer.h.0.attn.c_attn.weight"] == "torch.bfloat16"
    assert dtypes["transformer.h.0.attn.c_attn.bias"] == dtypes["transformer.wte.weight"] == "torch.float32"
    assert saved_dtype(load_config(str(tmp_path))).itemsize == 2
    records = [BaseRecord.of(base, vocabulary, with_weights=True) for base in bases]
    assert records[0] == records[1]
    for base in bases:
        quantize_linears(base)
    own, plain = (base.state_dict() | dict(base.named_buffers()) for base in bases)
    for name, value in own.items():
        assert torch.equal(value, plain[name]) and value.dtype == plain[name].dtype, name


def test_no_element_is_further_off_than_half_a_step_of_nf4():
    torch.manual_seed(0)
    plain = torch.nn.Linear(256, 128)
    change = (NF4Linear(plain).read(torch.float32) - plain.weight).abs()
    assert change.max() <= 0.16 * plain.weight.abs().max()


def test_zero_3_dora_and_full_tuning_are_refused():
    zero_3 = validate_ds_config({"zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW"}}, "f.json")
    with pytest.raises(ConfigError, match="stage: is 3, which does not partition the quantized weights"):
        zero_3.resolve(experiment(quantization="nf4"), 1)
    with pytest.raises(ConfigError, match="lora_use_dora: DoRA needs the weights"):
        experiment(quantization="nf4", lora_use_dora=True)
    for full in ({"tuning": "full"}, {"tuning": None}, {"tuning": None, "latent_variant": "mlp_projection"}):
        with pytest.raises(ConfigError, match="quantization: nf4 .* write 'tuning: lora'"):
            experiment(quantization="nf4", **full)
    experiment(quantization="nf4", tuning=None, latent_variant="mlp_projection_lora")


def test_missing_library_gets_the_install_command(monkeypatch):
    monkeypatch.setattr("coconut_ds.model.quantization.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match='pip install "bitsandbytes==') as caught:
        coconut("gpt2", quantization="nf4")
    ds_config = validate_ds_config({"optimizer": {"type": "AdamW8bit"}}, "f.json")
    with pytest.raises(ConfigError, match='optimizer.type: AdamW8bit needs bitsandbytes; .*"bitsandbytes=='):
        check_start(experiment(), ds_config, 1)
    pin = str(caught.value).split('"')[1]
    for name in ("requirements-qlora.txt", "tests/requirements.txt"):
        assert pin in (ROOT / name).read_text().splitlines()
