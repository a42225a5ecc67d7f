"""Two blocks of a ViT in bf16, trained through the CUDA kernels: forward, backward and topology update."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dst_ops import cuda, routes

timm = pytest.importorskip("timm")
pytest.importorskip("dst_train.sparse")

from dst_train import Topology, sparsify  # noqa: E402

BAND = 16
pytestmark = pytest.mark.cuda_only


@pytest.fixture(autouse=True)
def device(pytestconfig: pytest.Config) -> Iterator[str]:
    """Where the model is trained; it is made on the CPU, as everywhere."""
    with torch.device("cpu"):
        yield "cuda" if pytestconfig.getoption("--backend") == "cuda" else "cpu"


def _model(device: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
    model = timm.models.VisionTransformer(**sizes)
    rules = [{"match": f"blocks.*.{name}", "sparsity": 0.7, "band": BAND} for name in ("attn.proj", "mlp.fc*")]
    report = sparsify(model, rules)
    assert len(report.layers) == 6
    return model.to(device)


def _loss(model: nn.Module, low_precision: bool) -> Tensor:
    weight = next(model.parameters())
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(weight)
    labels = torch.arange(8, device=weight.device) % 10
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=low_precision):
        return F.cross_entropy(model(images), labels)


def _gradients(model: nn.Module, low_precision: bool) -> list[Tensor]:
    return list(torch.autograd.grad(_loss(model, low_precision), list(model.parameters())))


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """(kernel, op) of all calls; band kernels where they can."""
    seen: set[tuple[str, str]] = set()

    def choice(call: routes.Call, device: torch.device) -> routes.Choice:
        able = routes.possible(call, 227 * 1024)
        kernel = "band" if "band" in able else able[0] if able else "reference"
        seen.add((kernel, call.op))
        return routes.Choice(kernel, "the test's")

    monkeypatch.setattr(cuda, "choice", choice)
    return seen


def test_gradients(used: set[tuple[str, str]], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all parameters: at most twice as far from fp64 as with the definition of the op in bf16, and a rounding."""
    model = _model(device)
    ours = _gradients(model, low_precision=True)
    assert used == {("band", "product"), ("band", "gradient")}
    truth = _gradients(copy.deepcopy(model).double(), low_precision=False)
    assert ("reference", "product") in used  # fp64
    monkeypatch.setattr(cuda, "choice", lambda call, device: routes.Choice("reference", ""))
    plain = _gradients(model, low_precision=True)
    for got, usual, exact in zip(ours, plain, truth, strict=True):
        bound = 2 * (usual.double() - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
        assert (got.double() - exact).abs().max() <= bound


def test_training_with_topology_updates(
    used: set[tuple[str, str]], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a GPU torch's own convolution and attention may add in another order each time.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    runs = []
    for _ in range(2):
        model = _model(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        topology = Topology(model, method="rigl", every=3, total_steps=12, drop_fraction=0.5).bind(optimizer)
        losses, updates = [], []
        for _ in range(9):
            optimizer.zero_grad()
            with sdpa_kernel(SDPBackend.MATH):
                loss = _loss(model, low_precision=True)
                loss.backward()
            optimizer.step()
            updates.append(topology.step())
            losses.append(loss.item())
        runs.append((losses, [u.digest for u in updates if u is not None]))
        assert sum(u is not None and u.churn > 0 for u in updates) >= 2
        assert losses[-1] < losses[0]
    assert runs[0] == runs[1]  # nothing depends on the order in which threads happen to run
    assert used == {("band", "product"), ("band", "gradient")}
