"""The choice of a CUDA kernel, which needs no GPU: by the model, by a table, and what the report says of it."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dst_ops
from dst_ops import build, cuda, routes
from dst_ops.routes import Call

H100, A100, CONSUMER = 227 * 1024, 163 * 1024, 99 * 1024  # shared memory that a block may ask for


def _call(**changes: object) -> Call:
    """A layer of ViT-B/16 at 90 %, 128 images."""
    call = Call("product", 25216, 768, 768, 77, 1, "bfloat16")
    return dataclasses.replace(call, **changes)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("DST_OPS_TABLE", raising=False)
    monkeypatch.setenv("DST_OPS_CACHE", str(tmp_path))
    routes.table.cache_clear()
    yield
    routes.table.cache_clear()


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        # Tensor cores take any offsets faster as a dense matrix, and wide or few bands faster still.
        ({}, "dense"),
        ({"band": 8, "diagonals": 80}, "dense"),
        ({"band": 16, "diagonals": 32}, "band"),
        ({"band": 32, "diagonals": 64}, "band"),
        ({"band": 32, "diagonals": 64, "op": "gradient"}, "band"),
        ({"band": 16, "diagonals": 80, "op": "gradient"}, "dense"),
        # Few tokens: reading the weights takes the time.
        ({"tokens": 8, "inputs": 4096, "outputs": 4096, "diagonals": 410}, "scalar"),
        ({"tokens": 1, "inputs": 4096, "outputs": 4096, "diagonals": 205}, "scalar"),
        ({"tokens": 8192, "inputs": 4096, "outputs": 4096, "diagonals": 410}, "dense"),
        # Streaming windows of 8 columns through the L2 cache is slower than dense, windows of 16 are not.
        ({"tokens": 8192, "inputs": 4096, "outputs": 4096, "diagonals": 416, "band": 8}, "dense"),
        ({"tokens": 8192, "inputs": 4096, "outputs": 4096, "diagonals": 416, "band": 16}, "band"),
        # No tensor cores for fp32 unless TF32 is allowed.
        ({"dtype": "float32"}, "scalar"),
        ({"dtype": "float32", "diagonals": 700}, "dense"),
        ({"dtype": "float64"}, "reference"),
        # 2 % are left: single diagonals still have to read and write what dense does.
        ({"diagonals": 15}, "dense"),
    ],
)
def test_the_model_chooses(changes: dict[str, object], kernel: str) -> None:
    choice = routes.choose(_call(**changes), "a GPU", H100)
    assert choice.kernel == kernel
    assert ("modelled after an H200" in choice.reason) == (kernel != "reference")


def test_the_model_is_that_of_the_measured_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an H200 was measured, its choice takes 1.03 times as long as the quickest kernel, which docs/op_cuda.md says."""
    results = Path(__file__).parents[3] / "benchmarks" / "results"
    monkeypatch.setenv("DST_OPS_TABLE", str(results / "table-NVIDIA_H200.json"))
    losses = []
    for call, times in routes.table("NVIDIA H200"):
        estimated = routes.modelled(call, list(times))
        losses.append(times[min(estimated, key=estimated.__getitem__)] / min(times.values()))
    assert len(losses) == 1872
    assert statistics.geometric_mean(losses) == pytest.approx(1.03, abs=0.005)


def test_tf32_makes_dense_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_gpu(monkeypatch)
    device, matmul = torch.device("cuda", 0), torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        assert cuda.choice(_call(dtype="float32"), device).kernel == "scalar"
        matmul.fp32_precision = "tf32"
        assert cuda.choice(_call(dtype="float32"), device).kernel == "dense"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("changes", "shared_memory", "kernels"),
    [
        ({}, H100, ["scalar", "dense"]),
        ({"band": 24, "diagonals": 72}, H100, ["scalar", "band", "dense"]),
        ({"band": 12, "diagonals": 72}, H100, ["scalar", "dense"]),
        ({"band": 16, "diagonals": 80, "dtype": "float32"}, H100, ["scalar", "dense"]),
        ({"band": 16, "diagonals": 80, "outputs": 196}, H100, ["scalar", "dense"]),
        ({"inputs": 11008, "band": 16, "diagonals": 1104}, A100, ["band", "dense"]),
        ({"inputs": 11008}, A100, ["dense"]),
        ({"band": 16, "diagonals": 80, "op": "gradient"}, CONSUMER, ["scalar", "dense"]),
        ({"band": 16, "diagonals": 80}, CONSUMER, ["scalar", "dense"]),
        ({"band": 64, "diagonals": 64}, CONSUMER, ["scalar", "band", "dense"]),
        ({"band": 64, "diagonals": 64, "op": "gradient"}, CONSUMER, ["scalar", "band", "dense"]),
        ({"band": 32, "diagonals": 64}, CONSUMER, ["scalar", "dense"]),
        ({"band": 8, "diagonals": 64}, CONSUMER, ["scalar", "dense"]),
        ({"dtype": "float64"}, H100, []),
        # One token takes less shared memory: 87,551 features of 16 bits on an H100, 22,015 where there are 99 KiB.
        ({"inputs": 14336, "outputs": 4096}, H100, ["dense"]),
        ({"inputs": 14336, "outputs": 4096, "tokens": 1}, H100, ["scalar", "dense"]),
        ({"inputs": 87551, "outputs": 4096, "tokens": 1}, H100, ["scalar", "dense"]),
        ({"inputs": 87552, "outputs": 4096, "tokens": 1}, H100, ["dense"]),
        ({"inputs": 22015, "outputs": 4096, "tokens": 1}, CONSUMER, ["scalar", "dense"]),
        ({"inputs": 22016, "outputs": 4096, "tokens": 1}, CONSUMER, ["dense"]),
        ({"inputs": 14336, "outputs": 4096, "tokens": 1, "op": "gradient"}, H100, ["dense"]),
        # Packed weights of many more outputs than inputs would be much larger than the dense weight.
        ({"inputs": 4096, "outputs": 128256, "diagonals": 6400, "band": 64}, H100, ["scalar", "dense"]),
        ({"inputs": 768, "outputs": 50304, "diagonals": 5024, "band": 32}, H100, ["scalar", "dense"]),
        ({"inputs": 768, "outputs": 3072, "diagonals": 1216, "band": 64}, H100, ["scalar", "band", "dense"]),
        ({"inputs": 4096, "outputs": 16384, "diagonals": 3264, "band": 32}, H100, ["scalar", "band", "dense"]),
    ],
)
def test_what_is_possible(changes: dict[str, object], shared_memory: int, kernels: list[str]) -> None:
    assert routes.possible(_call(**changes), shared_memory) == kernels


def _write(points: list[tuple[Call, dict[str, float]]]) -> None:
    routes.write_table(routes.table_path("a GPU"), "a GPU", points)
    routes.table.cache_clear()


def test_a_measured_table_comes_before_the_model() -> None:
    near, far = {"scalar": 5.0, "dense": 9.0}, {"scalar": 9.0, "dense": 5.0}
    _write([(_call(tokens=20000), near), (_call(tokens=45000), far), (_call(op="gradient"), far)])
    choice = routes.choose(_call(), "a GPU", H100)
    assert choice.kernel == "scalar"
    assert choice.reason == "measured on a GPU: scalar 5 us, dense 9 us"
    assert routes.choose(_call(tokens=50000), "a GPU", H100).kernel == "dense"
    for other in ({"tokens": 100}, {"inputs": 3072}, {"diagonals": 10}, {"dtype": "float16"}):
        assert "modelled" in routes.choose(_call(**other), "a GPU", H100).reason


def test_few_tokens_were_measured_of_another_kernel() -> None:
    times = {"scalar": 5.0, "dense": 9.0}
    _write([(_call(tokens=32), times), (_call(op="gradient", tokens=32), times)])
    for tokens, measured in ((32, True), (16, True), (33, False), (64, False)):
        assert routes.choose(_call(tokens=tokens), "a GPU", H100).reason.startswith("measured") == measured
    assert routes.choose(_call(op="gradient", tokens=40), "a GPU", H100).reason.startswith("measured")


def test_a_table_of_another_gpu_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write([(_call(), {"scalar": 5.0, "dense": 9.0})])
    monkeypatch.setenv("DST_OPS_TABLE", str(tmp_path / "table-a_GPU.json"))
    assert routes.choose(_call(), "a GPU", H100).reason.startswith("measured")
    assert routes.choose(_call(), "another GPU", H100).reason.startswith("modelled")


def test_a_table_that_is_named_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DST_OPS_TABLE", str(tmp_path / "none.json"))
    with pytest.raises(
        ValueError, match=r"DST_OPS_TABLE: .*none\.json.*; measure with `python -m dst_ops.tune`, or unset it"
    ):
        routes.choose(_call(), "a GPU", H100)


def test_a_home_folder_of_someone_else_has_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> str:
        raise PermissionError(f"{path}: not yours")

    monkeypatch.setattr(Path, "read_text", refused)
    assert routes.table("a GPU") == ()


def test_a_measured_kernel_that_cannot_take_the_call_is_passed_over() -> None:
    _write([(_call(inputs=6000), {"scalar": 5.0, "dense": 9.0})])
    assert routes.choose(_call(inputs=11008), "a GPU", A100).kernel == "dense"


@pytest.mark.parametrize(
    "text", ["not json", "[]", '{"gpu": "a GPU", "points": [{"call": {"op": "product"}}]}', '{"points": 3}']
)
def test_a_broken_table_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "table-a_GPU.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"table-a_GPU\.json: not a table of dst_ops\.tune .* remove it, or measure again"
    ):
        routes.choose(_call(), "a GPU", H100)


def test_where_the_table_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert routes.table_path("NVIDIA H100 80GB HBM3") == tmp_path / "table-NVIDIA_H100_80GB_HBM3.json"
    monkeypatch.delenv("DST_OPS_CACHE")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    assert routes.table("a GPU without a home") == ()


def test_a_table_is_written_whole(tmp_path: Path) -> None:
    _write([(_call(), {"dense": 1.5})])
    written = json.loads((tmp_path / "table-a_GPU.json").read_text())
    assert written["gpu"] == "a GPU"
    assert routes.table("a GPU") == ((_call(), {"dense": 1.5}),)
    assert [path.name for path in tmp_path.iterdir()] == ["table-a_GPU.json"]


def _with_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    properties = SimpleNamespace(name="a GPU", shared_memory_per_block_optin=H100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda._choice.cache_clear()
    cuda.serves.cache_clear()


def test_the_report_names_the_kernel_of_a_call_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_gpu(monkeypatch)
    report = dst_ops.backend_report([_call(band=32, diagonals=64), _call(dtype="float64")])
    cuda._choice.cache_clear()
    entries = [e for e in report.entries if e.device == "cuda"]
    assert [e.kernel for e in entries[-2:]] == ["band", "reference"]
    assert "product 25216 x 768 -> 768, 64 diagonals, band 32, bfloat16" in str(report)
    assert "modelled after an H200: band" in entries[-2].reason
    assert (entries[1].what, entries[1].kernel) == ("float64", "reference")


def test_the_report_says_why_there_are_no_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_gpu(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setitem(
        build._libraries, "cuda", dataclasses.replace(build._libraries["cuda"], loaded=None, error=None)
    )
    entry = next(e for e in dst_ops.backend_report().entries if e.device == "cuda")
    assert entry.kernel == "reference"
    assert "the library cannot be built: torch" in entry.reason
    # What would be chosen of kernels that are not there is no answer.
    assert dst_ops.backend_report([_call()]).entries[-1].kernel == "reference"


def test_a_gpu_before_the_a100_is_served_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_gpu(monkeypatch, capability=(7, 5))
    monkeypatch.delenv("DST_OPS_REQUIRE_FUSED", raising=False)
    message = r"need compute capability 8\.0 \(A100 or later\), cuda:0 has 7\.5"
    with pytest.warns(UserWarning, match=message + "; the reference in plain PyTorch serves instead"):
        assert not cuda.serves(torch.device("cuda", 0))
    entries = [e for e in dst_ops.backend_report([_call()]).entries if e.device == "cuda"]
    assert [(e.kernel, e.reason) for e in entries if e.what != "float64"] == 2 * [
        ("reference", "the GPU is older than an A100")
    ]
    cuda.serves.cache_clear()
    monkeypatch.setenv("DST_OPS_REQUIRE_FUSED", "1")
    with pytest.raises(RuntimeError, match=message):
        cuda.serves(torch.device("cuda", 0))
    cuda.serves.cache_clear()
