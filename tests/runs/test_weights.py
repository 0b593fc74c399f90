"""Weights from other programs: all common formats, and files that could run code are refused."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from coconut_ds.errors import CheckpointError
from coconut_ds.runs.checkpoint_folders import TrainState
from coconut_ds.runs.checkpoints import Checkpoints
from coconut_ds.runs.weights import load_foreign_weights, load_thought_weights
from tests.runs.fake_shards import FakeShards

PLAIN = {"transformer.wte.weight": torch.arange(6.0).reshape(3, 2), "transformer.ln_f.bias": torch.ones(2)}


def assert_plain(weights: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == PLAIN.keys()
    assert all(torch.equal(weights[name], PLAIN[name]) for name in PLAIN)


def with_prefix(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in PLAIN.items()}


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        with_prefix("base_causallm."),
        {**with_prefix("base_causallm."), "embedding.weight": PLAIN["transformer.wte.weight"]},
        {**with_prefix("module.base_causallm."), "module.embedding.weight": PLAIN["transformer.wte.weight"]},
        {"state_dict": PLAIN},
    ],
    ids=["plain", "wrapped", "published", "published_ddp", "nested"],
)
def test_state_dict_files(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "checkpoint_7")
    assert_plain(load_foreign_weights(tmp_path / "checkpoint_7"))


def test_safetensors_file_and_hugging_face_folder(tmp_path: Path) -> None:
    save_file(PLAIN, tmp_path / "model.safetensors")
    assert_plain(load_foreign_weights(tmp_path / "model.safetensors"))
    assert_plain(load_foreign_weights(tmp_path))


def test_folder_of_several_files(tmp_path: Path) -> None:
    names = list(PLAIN)
    for number, name in enumerate(names):
        save_file({name: PLAIN[name]}, tmp_path / f"model-{number}.safetensors")
    index = {"weight_map": {name: f"model-{number}.safetensors" for number, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_plain(load_foreign_weights(tmp_path))
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is missing"):
        load_foreign_weights(tmp_path)


@pytest.mark.parametrize("index", ["{", '{"weight_map": []}', '{"weight_map": {"a": "../b"}}', "[" * 10**5])
def test_index_that_is_none(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="index"):
        load_foreign_weights(tmp_path)


def test_our_own_checkpoint(tmp_path: Path) -> None:
    def write_model(folder: Path) -> None:
        save_file(PLAIN, folder / "model.safetensors")
        save_file({"logits_W": torch.ones(3)}, folder / "thought.safetensors")

    name = Checkpoints(tmp_path, FakeShards(torch.zeros(1)), {}).save(TrainState(1), write_model)
    for path in (tmp_path / name, tmp_path / "latest"):
        assert_plain(load_foreign_weights(path))
        assert load_thought_weights(path)["logits_W"].tolist() == [1.0] * 3
    assert load_thought_weights(tmp_path / name / "model" / "model.safetensors") == {}


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("i_was_run"),))


def test_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({**PLAIN, "extra": RunsCode()}, tmp_path / "new")
    (tmp_path / "old").write_bytes(pickle.dumps({"extra": RunsCode()}, protocol=2))
    for name in ("new", "old"):
        with pytest.raises(CheckpointError, match="could run code.*allow_pickle"):
            load_foreign_weights(tmp_path / name)
    assert not (tmp_path / "i_was_run").exists()


class Holder:
    """An object a training script might have pickled along."""


def test_more_than_tensors_needs_leave(tmp_path: Path) -> None:
    torch.save({"model": PLAIN, "trainer": Holder()}, tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="allow_pickle"):
        load_foreign_weights(tmp_path / "checkpoint")
    assert_plain(load_foreign_weights(tmp_path / "checkpoint", allow_pickle=True))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["weights.bin", "weights.safetensors"])
@pytest.mark.parametrize(
    "damage", [cut, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"hello world" * 9)]
)
def test_damaged_files(tmp_path: Path, name: str, damage) -> None:
    path = tmp_path / name
    save_file(PLAIN, path) if name.endswith("safetensors") else torch.save(PLAIN, path)
    damage(path)
    with pytest.raises(CheckpointError, match=name):
        load_foreign_weights(path)


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "not a state dict"),
        ({}, "no tensor"),
        ({"a": 1}, "not a state dict"),
        ({**with_prefix("base_causallm."), "embedding.weight": torch.zeros(3, 2)}, "not the input embedding"),
        ({**with_prefix("base_causallm."), "other_weights": torch.zeros(3)}, "other_weights"),
    ],
)
def test_other_content(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "file")
    with pytest.raises(CheckpointError, match=message):
        load_foreign_weights(tmp_path / "file")


def test_absent_and_empty(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_foreign_weights(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no model.safetensors"):
        load_foreign_weights(tmp_path)


def test_adapters_alone_are_not_a_model(tmp_path: Path) -> None:
    save_file(PLAIN, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="merge them first"):
        load_foreign_weights(tmp_path)
