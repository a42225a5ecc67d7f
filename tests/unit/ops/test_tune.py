"""Measuring on a GPU, as far as it needs none: what is measured, what becomes of the times, and of what goes wrong."""

from __future__ import annotations

import contextlib
import csv
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dst_ops import build, cuda, routes, tune
from dst_ops.routes import Call, Choice
from dst_ops.tune import Timing

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SHARED = 227 * 1024
LAYER = Call("product", 64, 64, 128, 16, 8, "bfloat16")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("DST_OPS_TABLE", str(tmp_path / "table.json"))
    routes.table.cache_clear()
    yield tmp_path / "table.json"
    routes.table.cache_clear()


class FakeClock:
    """Every call takes 2 us."""

    def __init__(self, samples: int = 3, sample_us: float = 1.0) -> None:
        self.calls = 0

    def time(self, calls: list[tune.Run], *, capture: bool = True) -> Timing:
        self.calls += len(calls)
        for call in calls:
            call()
        return Timing([1.9, 2.0, 2.1], "graph" if capture else "events")


def test_the_grid_has_both_directions_and_no_call_twice() -> None:
    calls = tune.grid()
    assert len(set(calls)) == len(calls)
    assert {c.tokens for c in calls} == set(tune.TOKENS)
    assert {c.dtype for c in calls} == {"bfloat16", "float32"}
    for n, m in ((768, 3072), (3072, 768), (4096, 4096)):
        assert {c.op for c in calls if (c.inputs, c.outputs) == (n, m)} == {"product", "gradient"}
    assert all(c.longer % c.band == 0 and 0 < c.diagonals <= c.longer for c in calls)
    assert calls[0].diagonals == round(0.1 * 768)  # what is most common comes first


def test_a_shape_brings_the_product_of_its_backward_pass() -> None:
    calls = tune.grid([(100, 60)], tokens=[4], sparsities=[0.9], dtypes=["bfloat16"])
    assert {(c.op, c.inputs, c.outputs) for c in calls} == {
        ("product", 100, 60),
        ("product", 60, 100),
        ("gradient", 100, 60),
    }
    assert {c.band for c in calls} == {1}  # of 60 entries in a diagonal the band kernels can take none


def test_hopeless_kernels_are_left_out() -> None:
    many = Call("product", 32768, 4096, 4096, 2048, 64, "bfloat16")
    assert routes.possible(many, SHARED) == ["scalar", "band", "dense"]
    assert tune.contenders(many, SHARED) == ["band", "dense"]


def test_a_measured_table_decides(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = Call("product", 8, 4096, 4096, 410, 1, "bfloat16")
    routes.write_table(table, "GPU", [])
    assert routes.choose(few, "GPU", SHARED).kernel == "scalar"
    times = {"scalar": 30.0, "dense": 15.0}
    points = tune.sweep([few], lambda call: ["scalar", "dense"], lambda call, kernels: times)
    assert "scalar 30 us, dense 15 us -> dense (modelled: scalar)" in capsys.readouterr().out
    routes.write_table(table, "GPU", points)
    routes.table.cache_clear()
    assert routes.choose(few, "GPU", SHARED).kernel == "dense"
    said = tune.summary(points, lambda call: ["scalar", "dense"])
    assert said == "1 points measured, 1 with another kernel than modelled; there the modelled one takes x2.00 as long"


def test_what_time_does_not_suffice_for_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.sweep([LAYER, LAYER], lambda call: ["dense"], lambda call, kernels: {"dense": 1.0}, seconds=-1) == []
    assert "2 of 2 points left to the model" in capsys.readouterr().out


@pytest.mark.parametrize("op", ["product", "gradient"])
def test_a_kernel_that_refuses_is_named_and_left_out(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    natural, taken = cuda.choice, []

    def timer(run: tune.Run) -> float:
        taken.append(cuda.choice(LAYER, CPU).kernel)
        if taken[-1] == "band":
            raise RuntimeError("does not fit\nat some line")
        assert isinstance(run(), torch.Tensor)
        return float(len(taken))

    call = Call(op, 5, 64, 128, 16, 8, "bfloat16")
    assert tune.measure(call, ["scalar", "band", "dense"], CPU, timer) == {"scalar": 1.0, "dense": 3.0}
    assert taken == ["scalar", "band", "dense"]
    assert cuda.choice is natural
    assert "band refused: does not fit" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        tune.main([])
    assert stopped.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["768", "768:", "0:8", "a:b"])
def test_a_wrong_shape_is_an_error(text: str) -> None:
    with pytest.raises(SystemExit):
        tune.main(["--shape", text])


def test_the_command_writes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "load", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    gpu = SimpleNamespace(name="A GPU", shared_memory_per_block_optin=SHARED)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: gpu)
    monkeypatch.setattr(tune, "Clock", FakeClock)
    monkeypatch.setattr(tune, "measure", lambda call, kernels, device, timer: dict.fromkeys(kernels, 1.0))
    out = tmp_path / "folder" / "table.json"
    assert tune.main(["--shape", "64:128", "--out", str(out)]) == 0
    monkeypatch.setenv("DST_OPS_TABLE", str(out))
    assert set(dict(routes.table("A GPU"))) == set(tune.grid([(64, 128)]))


class FakeGpu:
    """What Clock uses of torch.cuda: a clock that each call moves by 7 us, and a replay by what its graph captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, capturable: bool = True, ahead: bool = True) -> None:
        gpu, self.us, self.captured, self.capturable = self, 0.0, None, capturable
        self.captures = 0

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.us = 0.0

            def record(self) -> None:
                self.us = gpu.us

            def query(self) -> bool:
                return not ahead

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, later: Event) -> float:
                return (later.us - self.us) / 1e3

        stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
        graph = SimpleNamespace(replay=lambda: self.run(self.captured))
        fakes = {"Event": Event, "Stream": lambda: stream, "stream": lambda s: contextlib.nullcontext()}
        fakes |= {"CUDAGraph": lambda: graph, "graph": self.capture, "_sleep": lambda cycles: None}
        fakes |= {"current_stream": lambda: None, "synchronize": lambda: None}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def run(self, us: float = 7.0) -> None:
        self.us += us

    @contextlib.contextmanager
    def capture(self, graph: object, stream: object) -> Iterator[None]:
        self.captures += 1
        before = self.us
        yield
        self.captured, self.us = self.us - before, before
        if not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")


def test_the_clock_replays_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    timing = tune.Clock(samples=5, sample_us=100).time([gpu.run, gpu.run])
    assert timing.method == "graph"
    assert timing.samples == pytest.approx([7.0] * 5)
    assert gpu.captured == pytest.approx(8 * 14.0)  # at least 100 us


@pytest.mark.parametrize(("ahead", "method"), [(True, "events"), (False, "events, waits for the host")])
def test_after_a_failed_capture_the_clock_tries_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ahead: bool, method: str
) -> None:
    gpu = FakeGpu(monkeypatch, capturable=False, ahead=ahead)
    clock = tune.Clock(samples=4)
    for _ in range(2):
        timing = clock.time([gpu.run])
        assert timing.method == method
        assert timing.samples == pytest.approx([7.0] * 4)
    assert gpu.captures == 1
    assert capsys.readouterr().err.count("no CUDA graphs from here on") == 1


@pytest.fixture
def op_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("op_cuda")


@pytest.fixture
def plan_cuda(op_cuda: Any) -> Any:
    return importlib.import_module("plan_cuda")


def _results(plan: Any, jobs: list[Any], us: float) -> list[Any]:
    times = importlib.import_module("measuring").Times(us, us, us)
    return [plan.Result(j.part, j.case, j.dtype, j.contestant.name, work, times) for j in jobs for work in j.passes]


def test_the_plan_measures_what_the_aims_need_first(plan_cuda: Any) -> None:
    jobs = plan_cuda.plan()
    assert len({(j.contestant, j.case, j.dtype) for j in jobs}) == len(jobs)
    limits = plan_cuda.Limits(3000.0, {torch.bfloat16: 700.0, torch.float32: 50.0})
    needed = [job for job in jobs if job.needed]
    for aim in plan_cuda.aims(_results(plan_cuda, needed, 10.0), limits):
        assert aim.verdict != "not measured", aim
    dense: set[tuple[object, ...]] = set()
    for job in jobs:
        layer = (job.case.tokens, job.case.n, job.case.m, job.dtype)
        dense |= {layer} if job.part == "dense" else set()
        assert layer in dense
    ours = {(j.case.tokens, j.case.n, j.case.m, j.case.sparsity, j.case.band) for j in jobs if j.part == "ours"}
    assert len({layer[:3] for layer in ours}) == 11
    for shape in {layer[:3] for layer in ours}:
        assert {layer[3:] for layer in ours if layer[:3] == shape} == {
            (sparsity, band) for sparsity in (0.6, 0.8, 0.9, 0.95, 0.98) for band in (1, 16, 32, 64)
        }


def test_an_aim_is_reached_by_all_of_its_figures(plan_cuda: Any) -> None:
    aim = plan_cuda.Aim("text", 2.0, [("a", 2.0), ("b", 5.0)])
    assert aim.verdict == "reached"
    assert aim._replace(measured=[("a", 1.99), ("b", None)]).verdict == "missed"
    assert aim._replace(measured=[("a", 3.0), ("b", None)]).verdict == "not measured"
    assert aim._replace(measured=[]).verdict == "not measured"


def test_figures_of_a_result(plan_cuda: Any) -> None:
    case, times = plan_cuda.Case(1000, 768, 3072, 0.9, 1), importlib.import_module("measuring").Times(9.0, 10.0, 11.0)
    forward = plan_cuda.Result(
        "ours", case, torch.bfloat16, "ours", "forward", times, "band", "graph", 10**6, 2 * 10**6
    )
    assert forward.bytes == 1000 * 3840 * 2 + 2 * 10**6
    assert forward.operations == 2 * 10**9
    row = forward.row(plan_cuda.Limits(1000.0, {torch.bfloat16: 400.0}), 2.5)
    assert (row["K"], row["median_us"], row["speedup_over_dense"]) == (307, "10.000", "2.500")
    assert (row["gb_s"], row["share_of_memory_floor"]) == ("968.0", "0.968")
    assert (row["tflops"], row["share_of_matrix"]) == ("200.00", "0.5000")


def test_a_run_lists_what_is_wrong_or_refused_and_writes_all(
    op_cuda: Any, plan_cuda: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong(plan_cuda.Dense):  # type: ignore[misc, name-defined]
        name = "wrong"

        def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return super().product(x, weight, bias) + 1

    case, both = plan_cuda.Case(9, 32, 64, 0.8, 8), ("forward", "forward+backward")
    kinds = [plan_cuda.Dense, plan_cuda.Ours, plan_cuda.OursWithGelu, Wrong, plan_cuda.TwoFour]
    jobs = [plan_cuda.Job("part", case, torch.float32, kind, both) for kind in kinds]
    late = plan_cuda.Job("late", case, torch.float32, plan_cuda.Ours, both, False)
    table = op_cuda.Table(plan_cuda.Limits(1000.0, {torch.bfloat16: 1.0, torch.float32: 1.0}))
    monkeypatch.setattr(op_cuda, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(cuda, "choice", lambda call, device: Choice("scalar", "as told"))
    skipped = list(op_cuda.measure([*jobs, late], table, FakeClock(), CPU, 1, deadline=0.0))
    op_cuda.report("A GPU", table, skipped)
    written = next((tmp_path / "results").iterdir())
    assert written.name == f"op_cuda-A_GPU-torch{torch.__version__}.csv"
    with written.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["contestant"] for row in rows[::2]][:5] == [kind.name for kind in kinds]
    assert [row["median_us"] for row in rows[:6]] == ["2.000"] * 6
    assert rows[2]["speedup_over_dense"] == "1.000"
    assert all(row["note"].startswith("WRONG") for row in rows[6:8])
    assert all("CUDA" in row["note"] for row in rows[8:10])
    assert [row["contestant"] for row in rows[10:]] == ["copy", "product", "product"]
    printed = capsys.readouterr().out
    assert "skipped for lack of time: 9 tokens, 32 -> 64, ours fp32: 80 % band 8" in printed
    assert printed.count("n/a: ") >= 4


def test_sets_of_tensors_exceed_the_cache_twice(plan_cuda: Any) -> None:
    case = plan_cuda.Case(10, 100, 100, 0.9, 1)
    contestant = plan_cuda.Ours(case, torch.float32, CPU, cache=50_000)
    used = contestant.weight_bytes + 10 * 200 * 4
    assert (len(contestant.sets) - 1) * used < 100_000 <= len(contestant.sets) * used
    assert len(contestant.calls("forward")) == len(contestant.sets)


def test_a_forced_kernel_ends_with_its_block() -> None:
    natural = cuda.choice
    with tune.forced("dense"):
        assert cuda.choice(LAYER, CPU) == Choice("dense", "forced")
    assert cuda.choice is natural
