"""`dst-train plan` and what it refuses, and the imports that the command needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dst_train.cli import main
from dst_train.data import write_shards
from dst_train.job import JobError, load
from dst_train.plan import prepare

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    write_shards(tmp_path, "a", np.zeros((40, 28, 28), np.uint8), np.zeros(40, np.int64), 20)
    job: dict[str, Any] = {
        "name": "small",
        "model": {"builder": "mlp", "in_features": 784, "hidden_features": [64, 32], "num_classes": 4},
        "sparsity": {"rules": [{"match": "layers.*", "sparsity": 0.75}]},
        "data": {"train": {"shards": f"{tmp_path}/a-{{000000..000001}}.tar", "samples": 40, "transform": "digits"}},
        "train": {"epochs": 3, "batch_size": 8, "micro_batch_size": 2},
        "optimizer": {"lr": 0.1},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def test_the_plan_says_what_the_job_would_do(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(job_file), "--ranks", "2"]) == 0
    text = capsys.readouterr().out
    assert "8 samples per step = 2 x 2 accumulated x 2 ranks; 5 steps per epoch, 15 steps" in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith("  layers.0 ")]
    assert row == ["layers.0", "64", "x", "784", "diagonal", "196", "/", "784", "0.2500", "12,608"]
    assert '"train_micro_batch_size_per_gpu": 2' in text
    assert "fused" in text
    assert "in_features: 784" in text


def test_counts_by_hand(job_file: Path) -> None:
    plan = prepare(load(job_file), 2)
    kept = [784 // 4 * 64, 64 // 4 * 32, 32 * 4]
    # One multiplication and one addition for each weight kept, and for each weight when dense.
    assert plan.flops == (2 * sum(kept), 2 * (784 * 64 + 64 * 32 + 32 * 4))
    assert plan.report.parameters == sum(kept) + 64 + 32 + 4


def test_the_low_rank_path_counts(job_file: Path) -> None:
    plain, plan = prepare(load(job_file), 2), prepare(load(job_file, ["sparsity.low_rank={rank: 4}"]), 2)
    path = 4 * (784 + 64) + 4 * (64 + 32)
    assert (plan.flops[0] - plain.flops[0], plan.flops[1]) == (2 * path, plain.flops[1])
    assert plan.report.parameters - plain.report.parameters == 4 * (64 + 32)  # what learns
    weights = 784 * 64 + 64 * 32
    assert plan.report.density == pytest.approx(plain.report.density + path / weights)


@pytest.mark.parametrize(
    ("stage", "precision", "expected"),
    [
        # Bytes per parameter on one of 2 ranks: parameters, gradients, masters, moments.
        (0, "fp32", (4, 4, 0, 8)),
        (1, "bf16", (4, 4, 2, 4)),
        (2, "fp32", (4, 2, 2, 4)),
        (3, "fp32", (2, 2, 2, 4)),
        (1, "bf16_params", (2, 2, 2, 4)),
        (3, "bf16_params", (1, 1, 2, 4)),
    ],
)
def test_memory_by_hand(job_file: Path, stage: int, precision: str, expected: tuple[int, ...]) -> None:
    job = load(job_file, [f"deepspeed.zero_optimization.stage={stage}", f"train.precision={precision}"])
    plan = prepare(job, 2, check_data=False)
    count, held = plan.report.parameters, 4 * (784 * 64 + 64 * 32)  # one whole gradient of each sparse layer
    expected_bytes = [e * count for e in expected]
    buffers = 4 * sum(layer.num_final for layer in plan.report.layers)  # offsets
    assert tuple(plan.memory.values()) == (*expected_bytes, buffers, held, sum(expected_bytes) + buffers + held)
    # What each parameter has in all shards; at stage 3 no copy of the parameters. Of each unit when it came, and whether it was there.
    each = 8 + (4 if stage else 0) + (0 if stage == 3 else 2 if precision == "bf16_params" else 4)
    assert plan.checkpoint_bytes == each * count + buffers + 9 * sum(layer.num_units for layer in plan.report.layers)
    permuted = "sparsity.rules=[{match: 'layers.*', sparsity: 0.75, permute: learned}]"
    assert prepare(load(job_file, [permuted, "topology.method=set"]), 2).memory["growth signal"] == held
    for change in ("train.micro_batch_size=4", "topology.grow_signal=local", "topology.method=set"):
        assert "growth signal" not in prepare(load(job_file, [change]), 2).memory
    sgd = load(job_file, ["optimizer={name: sgd, lr: 1, momentum: 0}", "deepspeed.zero_optimization.stage=0"])
    assert prepare(sgd, 2).memory["optimiser"] == 0


def test_the_plan_says_when_the_topology_changes(job_file: Path) -> None:
    """15 steps, of which 11 are before `until`."""
    for override, text in (
        ("topology.update.every=4", "rigl: 2 updates, after steps 4 to 8"),
        ("topology.update.every=11", "rigl: no updates, as every=11 is not below until * total_steps=11"),
        ("topology.method=static", "static: no updates"),
    ):
        assert f"topology\n  {text}\n" in str(prepare(load(job_file, [override]), 2))


# Its attention multiplies by the weights of its layers itself.
BEIT = "model={builder: timm, name: beit_base_patch16_224, args: {in_chans: 1, img_size: 28, patch_size: 7, embed_dim: 64, depth: 1, num_heads: 4}}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.micro_batch_size=3"], "train.micro_batch_size 3 does not divide the 4 samples"),
        (["data.train.shards=none.tar"], "none.tar does not exist"),
        (["run_root=/dev/null/runs"], "run_root /dev/null/runs: /dev/null is no folder; choose another place for the runs"),
        (["schedule.warmup_epochs=1e308"], "schedule.warmup_epochs 1e+308 is inf steps, and the training has only"),
        (["data.train.samples=41"], "40 samples in 2 shards, but the job says samples: 41"),
        (["sparsity.rules=[{match: 'blocks.*', sparsity: 0.5}]"], "sparsity: rule 'blocks.*' matches no linear layer"),
        (["sparsity.rules=[{match: 'layers.*', sparsity: 0.5, band: 5}]"], "sparsity: layer layers.0 (rule 'layers.*'): band=5"),
        (["sparsity.rules=[{match: 'layers.*', sparsity: 1}]"], "input should be less than 1, got 1"),
        (["topology.method=rigle"], "did you mean 'rigl'?"),
        (["train.batch=3"], "did you mean 'batch_size'?"),
        (["model={builder: timm, name: vit_tny_patch16_224}"], "vit_tiny_patch16_224"),
        (["model={builder: timm, name: vit_tiny_patch16_224, args: {patches: 3}}"], "model.args: timm cannot build"),
        (["model.in_features=100", "sparsity=null"], "model: it does not take a sample of data.train, of shape (1, 28, 28)"),
        (["data.train.transform=next_byte", "data.train.length=9"], "bytes, needs .bin of 10 bytes"),
        (["data.eval={shards: SHARDS, samples: 40, transform: imagenet_eval}"], "it does not take a sample of data.eval, of shape (3, 224, 224)"),
        (
            ["model={builder: timm, name: resnet10t, args: {in_chans: 1}}", "sparsity=null"],
            "model: conv1.1 is a BatchNorm2d, whose running statistics differ from rank to rank",
        ),
        (
            [BEIT, "sparsity.rules=[{match: '*.qkv', sparsity: 0.5}]"],
            "sparsity: layer blocks.0.attn.qkv is not called by the model, which does not use it, or reads its weight",
        ),
        (
            [BEIT, "sparsity.rules=[{match: '*.qkv', sparsity: 0.5, pattern: unstructured}]", "topology.method=set"],
            "sparsity: layer blocks.0.attn.qkv is not called by the model",
        ),
        (
            ["model={builder: timm, name: vit_tiny_patch16_224, args: {pretrained: true}}"],
            "model.args.pretrained: sparse layers keep a part of the weights",
        ),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_with_exit_code_2(
    job_file: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = load(job_file).data.train.shards
    changes = [text for override in overrides for text in ("--set", override.replace("SHARDS", f"'{shards}'"))]
    assert main(["plan", str(job_file), "--ranks", "2", *changes]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.startswith((*(f"--set {text}: " for text in changes[1::2]), f"{job_file}:"))
    assert not output.out


def test_runs_that_cannot_be_written_are_refused(
    job_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    job = load(job_file, [f"run_root={tmp_path}/not/yet"])
    with pytest.raises(
        JobError, match=f"run_root {tmp_path}/not/yet: {tmp_path} cannot be written; choose another place"
    ):
        prepare(job, 1)
    assert prepare(job, 1, check_data=False)


def test_what_cannot_run_is_named_by_its_line(
    job_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of the file which says it, or of the nearest key above."""
    child = tmp_path / "child.yaml"
    child.write_text(
        f"extends: {job_file}\n"
        "name: child\n"
        "sparsity:\n"
        "  rules:\n"
        "    - {match: 'layers.*', sparsity: 0.75}\n"
        "    - {match: 'layers.1', sparsity: 0.5, band: 5}\n"
        "    - {match: 'layers.1', sparsity: 0.75}\n"
        "    - {match: 'layers.2', sparsity: 0.75}\n"
    )
    said = {}
    for name, overrides in (
        ("rules", []),
        ("batch", ["--set", "sparsity=null", "--ranks", "3"]),
        ("warm-up", ["--set", "sparsity=null", "--set", "schedule={name: cosine, warmup_epochs: 99}"]),
    ):
        assert main(["plan", str(child), *overrides]) == 2
        said[name] = capsys.readouterr().err
    assert said["rules"].startswith(f"{child}:8 sparsity: rule 'layers.2' matches no linear layer")
    line = job_file.read_text().splitlines().index("  batch_size: 8") + 1
    assert said["batch"].startswith(f"{job_file}:{line} train.batch_size 8 does not divide by 3 ranks")
    assert said["warm-up"].startswith("--set schedule={name: cosine, warmup_epochs: 99}: schedule.warmup_epochs 99")


def test_no_data_and_bad_ranks(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(job_file), "--set", "data.train.shards=none.tar", "--no-data"]) == 0
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(job_file), "--ranks", "0"])
    assert caught.value.code == 2
    assert "--ranks 0: must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_job_plans(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGENET", "/data")
    plan = prepare(load(path), 8 if "imagenet" in path.stem else 2, check_data=False)
    assert plan.batch.accumulation == 1
    layers = [layer.name for layer in plan.report.layers]
    if "imagenet" in path.stem:
        assert len(layers) == 36
        assert not any("qkv" in name for name in layers)
        assert plan.report.density == pytest.approx(0.1, abs=1e-3)
    if "gpt" in path.stem:
        assert len(layers) == (0 if "dense" in path.stem else 16)
        assert "lm_head" not in layers
        # Four blocks of 12 x 128^2 weights and the head, for 128 tokens; two products of attention in each block.
        assert plan.flops[1] == 2 * 128 * (4 * 12 * 128**2 + 256 * 128) + 4 * 2 * 2 * 128 * 128 * 128
    assert bool(layers) == ("dense" not in path.stem)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.args.n_positions=100"], r"it does not take a sample of data.train, of shape \(128,\) \(torch.int64 up to 255\): index out of range"),
        (["model.args.vocab_size=255"], r"a sample of data.train, of shape \(128,\) \(torch.int64 up to 255\): index out of range"),
        (["model={builder: timm, name: vit_tiny_patch16_224}", "sparsity=null"], r"a sample of data.train, of shape \(128,\)"),
        (["data.train={shards: x, samples: 96, transform: digits}", "data.eval=null"], r"shape \(1, 28, 28\) \(torch.float32\)"),
        (["sparsity.rules=[{match: lm_head, sparsity: 0.5}]"], "layer lm_head shares its weight with another module"),
        (["model.args.n_layers=3"], "has no 'n_layers'; close names: n_layer"),
    ],
)  # fmt: skip
def test_language_models_and_data_that_do_not_fit(overrides: list[str], message: str) -> None:
    with pytest.raises(JobError, match=message):
        prepare(load(JOBS / "gpt_stdlib.yaml", overrides), 2, check_data=False)


def test_data_is_checked_in_both_splits(job_file: Path) -> None:
    job = load(job_file, ["data.eval={shards: other.tar, samples: 3, transform: digits}"])
    with pytest.raises(JobError, match=r"other\.tar does not exist"):
        prepare(job, 1)


@pytest.mark.parametrize("command", ["import dst_train", "from dst_train.cli import main; main(['schema'])"])
def test_what_needs_no_torch_does_not_import_it(command: str) -> None:
    check = (
        f"{command}; import sys; print([m for m in ('torch', 'deepspeed', 'timm', 'tensorboard') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_a_plan_waits_for_no_library_that_its_job_does_not_need() -> None:
    slow = ("deepspeed", "transformers", "timm", "torchvision", "torch._dynamo")
    check = f"import dst_train.plan, sys; print([m for m in {slow} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"
