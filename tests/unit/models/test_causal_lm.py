"""Language models by the name and the arguments of a job."""

import pytest
import torch
import transformers

from dst_train.job import JobError
from dst_train.job.schema import TransformersModel
from dst_train.models import build
from dst_train.sparse import densify, sparse_layers, sparsify

SMALL = {
    "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 16, "vocab_size": 256, "bos_token_id": None, "eos_token_id": None,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


def spec(name="gpt2", **args):
    return TransformersModel(builder="transformers", name=name, args={**SMALL, **args} if name == "gpt2" else args)


@pytest.fixture(scope="module")
def model():
    return build(spec(), seed=0)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))


def test_from_tokens_to_logits_that_see_no_later_token(model, tokens):
    assert model.training
    logits = model(tokens)
    assert isinstance(logits, torch.Tensor)
    assert (logits.dtype, logits.shape) == (torch.float32, (2, 16, 256))
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 256
    difference = (model(changed) - logits).abs().amax((0, 2))
    # the same numbers come from other sums; what token 10 does to logits of size 0.3 is far above it
    assert difference[:10].max() < 1e-6
    assert difference[10:].min() > 1e-4


def test_values_depend_on_the_seed_only(model):
    before = torch.get_rng_state()
    again, other = build(spec(), seed=0).state_dict(), build(spec(), seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    first = model.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


def test_the_blocks_become_sparse_and_the_tied_head_stays_dense(tokens):
    model = build(spec(), seed=0)
    with pytest.raises(ValueError, match="layer lm_head shares its weight with another module; keep it dense"):
        sparsify(model, [{"match": "*", "sparsity": 0.9}])
    report = sparsify(model, [{"match": "transformer.h.*", "sparsity": 0.9}])
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert list(sparse_layers(model)) == [f"transformer.h.{i}.{name}" for i in range(2) for name in names]
    assert [(layer.out_features, layer.in_features) for layer in report.layers[:4]] == [(96, 32), (32, 32), (128, 32), (32, 128)]  # fmt: skip
    assert model.lm_head.weight is model.transformer.wte.weight
    model(tokens).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_sparse_block_computes_what_its_dense_weight_would(tokens):
    """Hugging Face's Conv1D holds the transpose of a linear layer's weight."""
    sparse, dense = build(spec(), seed=0), build(spec(), seed=0)
    sparsify(sparse, [{"match": "transformer.h.*", "sparsity": 0.5}])
    with torch.no_grad():
        for name, layer in sparse_layers(sparse).items():
            dense.get_submodule(name).weight.copy_(layer.to_dense().t())
    # fp32 sums of at most 128 products in another order
    torch.testing.assert_close(sparse(tokens), dense(tokens), atol=1e-5, rtol=1e-5)


def test_a_densified_model_is_saved_and_read_by_its_library(tokens, tmp_path):
    """Square layers would be read without a word if they were saved as linear layers: transposed."""
    model = build(spec(), seed=0)
    sparsify(
        model,
        [
            {"match": "transformer.h.*", "sparsity": 0.5},
            {"match": "transformer.h.1.*", "sparsity": 0.5, "pattern": "sr_ste", "size": 4},
        ],
    )
    expected = model(tokens)
    densify(model).save_pretrained(tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(read(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    assert read.transformer.wte.weight is read.lm_head.weight


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (spec("gtp2"), r"^model\.name: transformers \S+ has no causal language model 'gtp2'; close names: gpt2"),
        (spec("@"), r"has no causal language model '@'; it has, for example, "),
        (spec("vit"), r"has no causal language model 'vit'; close names"),
        (spec(n_layers=3), r"^model\.args: the configuration of gpt2 has no 'n_layers'; close names: n_layer"),
        (spec(use_cache=True), r"^model\.args: the configuration of gpt2 has no 'use_cache'"),
        (spec(n_layer="two"), r"^model\.args: transformers \S+ cannot build gpt2 with {.*}: \w+: .*'n_layer' expected int"),
        (spec(n_head=3), r"cannot build gpt2 with {.*'n_head': 3.*}: ValueError"),
        (spec(activation_function="gelo"), r"cannot build gpt2 with .*KeyError: 'gelo'"),
    ],
)  # fmt: skip
def test_wrong_names_and_arguments_are_named(wrong, message):
    before = torch.get_rng_state()
    with pytest.raises(JobError, match=f"(?s){message}"):
        build(wrong, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_arguments_may_have_the_name_that_all_models_know():
    assert len(build(spec(num_hidden_layers=1, n_layer=1), seed=0).transformer.h) == 1
