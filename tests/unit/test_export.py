"""A trained model as a file, and read again: by this package, and dense by the model's library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import transformers
from torch import nn

from dst_train import load_exported, models, sparse_layers, sparsify
from dst_train.export import KEY, About, save
from dst_train.sparse import DiagonalLinear

MLP = {"builder": "mlp", "in_features": 48, "hidden_features": [96, 40, 64], "num_classes": 10}
GPT = {
    "builder": "transformers",
    "name": "gpt2",
    "args": {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2},
}
VIT = {
    "builder": "timm",
    "name": "vit_tiny_patch16_224",
    "args": {"img_size": 32, "num_classes": 10, "depth": 1, "embed_dim": 16, "num_heads": 2},
}
RULES = [
    {"match": "layers.*", "sparsity": 0.75},
    {"match": "layers.1", "sparsity": 0.5, "permute": "learned"},
    {"match": "layers.2", "sparsity": None},
]


def _about(model: dict[str, Any], rules: list[dict[str, Any]] | None, **sparsity: Any) -> About:
    sparse = None if rules is None else {"rules": rules, **sparsity}
    return About.model_validate({"run": "one", "step": 7, "seed": 3, "model": model, "sparsity": sparse})


def _trained(about: About, **options: Any) -> nn.Module:
    """With values that no initialisation has."""
    model = models.build(about.model, seed=9)
    if about.sparsity is not None:
        sparsify(model, about.sparsity.rules, budget=about.sparsity.budget, seed=5, **options)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.1)
    return model.eval()


def _free_a_slot(layer: DiagonalLinear) -> None:
    slots = layer.replace(layer.units()[2:3], torch.tensor([], dtype=torch.int64))
    with torch.no_grad():
        layer.values.view(layer.offsets.numel(), -1)[slots] = 0.0


@pytest.mark.parametrize("gate", [None, "straight_through", "soft"])
def test_a_sparse_model_comes_back_to_the_bit(gate: str | None, tmp_path: Path) -> None:
    """With free slots, gates in the middle of training, a learned order and a low-rank path."""
    about = _about(MLP, RULES, low_rank={"rank": 2, "start": 0.5})
    model = _trained(about, gate=gate, explore=2.0, rank=2)
    layers = sparse_layers(model)
    for layer in layers.values():
        assert isinstance(layer, DiagonalLinear)
        _free_a_slot(layer)
        layer.temperature = 0.3
    order = layers["layers.1"].order  # type: ignore[attr-defined]
    order.copy_(order.roll(5))
    x = torch.randn(9, 48)
    with torch.no_grad():
        expected = model(x)
    units = {name: layer.num_active for name, layer in layers.items()}
    file = tmp_path / "new/model.safetensors"
    said = save(model, about, file, dense=False)
    read = load_exported(file)
    assert not read.training
    with torch.no_grad():
        assert torch.equal(model(x), expected)  # settled
        assert torch.equal(read(x), expected)
    assert {name: layer.num_active for name, layer in sparse_layers(read).items()} == units
    stored = safetensors.torch.load_file(file)
    assert stored["layers.0.values"].shape == (units["layers.0"], 48)  # no free slots
    assert not any("alpha" in name for name in stored)
    size = f"{file.stat().st_size / 1e6:.3g} MB"
    assert said == f"{file}: sparse weights of one at step 7, {size}; read them with dst_train.load_exported('{file}')"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    "pattern",
    [{"pattern": "n_m", "size": 4}, {"pattern": "shuffled_block", "size": 8}, {"pattern": "sr_ste", "size": 4}],
)
def test_so_do_the_baselines(pattern: dict[str, Any], tmp_path: Path) -> None:
    about = _about(MLP, [{"match": "layers.0", "sparsity": 0.5, **pattern}])
    model, x = _trained(about), torch.randn(9, 48)
    expected = model(x)
    save(model, about, tmp_path / "model.safetensors", dense=False)
    assert torch.equal(load_exported(tmp_path / "model.safetensors")(x), expected)


def test_a_language_model_whose_weights_are_tied(tmp_path: Path) -> None:
    about = _about(GPT, [{"match": "transformer.h.*", "sparsity": 0.75}])
    model, tokens = _trained(about), torch.arange(16)[None]
    expected = model(tokens)
    save(model, about, tmp_path / "gpt.safetensors", dense=False)
    read = load_exported(tmp_path / "gpt.safetensors")
    assert torch.equal(read(tokens), expected)
    assert read.transformer.wte.weight is read.lm_head.weight
    assert "dense weights" in save(model, about, tmp_path / "folder", dense=True)
    library = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    torch.testing.assert_close(library(tokens).logits, expected, atol=1e-5, rtol=1e-5)


def test_dense_weights_are_timms_and_ours(tmp_path: Path) -> None:
    about = _about(VIT, [{"match": "blocks.*", "sparsity": 0.75}])
    model, x = _trained(about), torch.randn(2, 3, 32, 32)
    expected, file = model(x), tmp_path / "vit.safetensors"
    save(model, about, file, dense=True)
    for read in (timm.create_model(VIT["name"], checkpoint_path=file, **VIT["args"]).eval(), load_exported(file)):
        assert not sparse_layers(read)
        torch.testing.assert_close(read(x), expected, atol=1e-5, rtol=1e-5)


def test_what_an_interrupted_export_left_is_in_nobodys_way(tmp_path: Path) -> None:
    about = _about(GPT, None)
    (tmp_path / ".folder.partial").mkdir()
    (tmp_path / ".folder.partial/model.safetensors.index.json").write_text("{}")
    (tmp_path / ".file.partial").write_text("half")
    for name, dense in (("folder", True), ("file", False)):
        save(_trained(about), about, tmp_path / name, dense=dense)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}
    assert "model.safetensors.index.json" not in {path.name for path in (tmp_path / "folder").iterdir()}


def test_who_may_read_it_is_as_for_any_file(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    path = tmp_path / "one"
    about = _about(MLP, RULES)
    save(_trained(about), about, path, dense=False)
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError, match="file"):
        load_exported(path)
    with pytest.raises(
        ValueError, match=f"{tmp_path} is a folder; dense weights of a transformers model are read by its"
    ):
        load_exported(tmp_path)
    path.write_bytes(b"0123456789")
    with pytest.raises(ValueError, match=r"file is no safetensors file: "):
        load_exported(path)
    safetensors.torch.save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="says nothing of dst-train; this reads files of `dst-train export` only"):
        load_exported(path)
    safetensors.torch.save_file({"w": torch.zeros(2)}, path, {KEY: json.dumps({"run": "one"})})
    with pytest.raises(ValueError, match=r"(?s)file is of another version of dst-train: .*step"):
        load_exported(path)
