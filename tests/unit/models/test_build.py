import pytest
import timm
import torch
from safetensors.torch import save_model

from dst_train.job import JobError
from dst_train.job.schema import MLPModel, TimmModel
from dst_train.models import MLP, build
from dst_train.sparse import densify, sparsify

SMALL_VIT = TimmModel(
    builder="timm",
    name="vit_tiny_patch16_224",
    args={"num_classes": 10, "depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 32},
)
SMALL_MLP = MLPModel(builder="mlp", in_features=784, hidden_features=[32, 16], num_classes=10)


@pytest.mark.parametrize("spec", [SMALL_VIT, SMALL_MLP])
def test_values_depend_on_the_seed_only(spec):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build(spec, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again, other = build(spec, seed=1).state_dict(), build(spec, seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_timm_gets_its_arguments():
    model = build(SMALL_VIT, seed=0)
    assert isinstance(model, timm.models.VisionTransformer)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert len(model.blocks) == 1


def test_timm_reads_a_densified_model(tmp_path):
    model = build(SMALL_VIT, seed=0)
    sparsify(model, [{"match": "blocks.*", "sparsity": 0.8}])
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    save_model(densify(model), tmp_path / "model.safetensors")
    read = timm.create_model(SMALL_VIT.name, checkpoint_path=tmp_path / "model.safetensors", **SMALL_VIT.args)
    torch.testing.assert_close(read(x), expected, atol=1e-5, rtol=1e-5)


def test_a_class_of_timm_takes_sizes_that_its_names_fix():
    args = {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10, "embed_dim": 24, "num_blocks": 2}
    model = build(TimmModel(builder="timm", name="MlpMixer", args=args), seed=0)
    assert isinstance(model, timm.models.MlpMixer)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(JobError, match=r"cannot build MlpMixer with .*patchsize"):
        build(TimmModel(builder="timm", name="MlpMixer", args={"patchsize": 7}), seed=0)


def test_mlp_is_the_composition_of_its_layers():
    model = build(SMALL_MLP, seed=0)
    assert isinstance(model, MLP)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert names == ["layers.0", "layers.1", "head"]
    x = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    state = model.state_dict()
    hidden = x.reshape(3, 784)
    for name in names[:2]:
        hidden = hidden @ state[f"{name}.weight"].T + state[f"{name}.bias"]
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    expected = hidden @ state["head.weight"].T + state["head.bias"]
    assert expected.shape == (3, 10)
    # fp32 sums of 784 products of size below 0.2
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_unknown_name_suggests():
    with pytest.raises(JobError, match=r"no model 'vit_bas_patch16_224'; close names: .*vit_base_patch16_224"):
        build(TimmModel(builder="timm", name="vit_bas_patch16_224"), seed=0)
    with pytest.raises(JobError, match=r"no model '@'; see timm\.list_models"):
        build(TimmModel(builder="timm", name="@"), seed=0)


@pytest.mark.parametrize("args", [{"num_clases": 10}, {"embed_dim": 25, "num_heads": 2}, {"pretrained_cfg": 3}])
def test_wrong_arguments_name_model_and_arguments(args):
    before = torch.get_rng_state()
    with pytest.raises(JobError, match=rf"cannot build vit_tiny_patch16_224 with .*{next(iter(args))}"):
        build(TimmModel(builder="timm", name="vit_tiny_patch16_224", args=args), seed=0)
    assert torch.equal(torch.get_rng_state(), before)
