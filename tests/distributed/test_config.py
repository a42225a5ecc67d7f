"""Every key of the generated ds_config reaches the engine: DeepSpeed drops unknown root keys without a word."""

from __future__ import annotations

from typing import Any

import pytest

from dst_train.engine import compile_config
from dst_train.job import BatchPlan, Job
from tests.distributed.ranks import run_ranks


def _job(precision: str, stage: int) -> Job:
    return Job.model_validate(
        {
            "name": "test",
            "model": {"builder": "mlp", "in_features": 784, "hidden_features": [32], "num_classes": 2},
            "sparsity": {"rules": [{"match": "layers.*", "sparsity": 0.5}]},
            "data": {"train": {"shards": "x.tar", "samples": 100, "transform": "digits"}},
            "train": {
                "epochs": 1,
                "batch_size": 24,
                "micro_batch_size": 4,
                "precision": precision,
                "clip_grad_norm": 0.7,
            },
            "optimizer": {"name": "sgd", "lr": 0.1},
            "deepspeed": {
                "zero_optimization": {
                    "stage": stage,
                    "overlap_comm": True,
                    "reduce_bucket_size": 1000,
                    "allgather_bucket_size": 2000,
                    "stage3_param_persistence_threshold": 30,
                }
            },
        }
    )


def _read_back(precision: str, stage: int) -> dict[str, Any]:
    from dst_train.engine.session import build_session, init_distributed

    _, world_size = init_distributed()
    job = _job(precision, stage)
    engine = build_session(job, BatchPlan.of(job, world_size)).engine
    return {
        "train_batch_size": engine.train_batch_size(),
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "gradient_clipping": engine.gradient_clipping(),
        "zero_allow_untested_optimizer": engine.zero_allow_untested_optimizer(),
        "steps_per_print": engine.steps_per_print(),
        "zero_optimization": {
            "stage": engine.zero_optimization_stage(),
            "overlap_comm": engine.zero_overlap_comm(),
            "reduce_bucket_size": engine.zero_reduce_bucket_size(),
            "allgather_bucket_size": engine.zero_allgather_bucket_size(),
            "stage3_param_persistence_threshold": engine.zero_param_persistence_threshold(),
        },
        "torch_autocast": {
            "enabled": engine.torch_autocast_enabled(),
            "dtype": str(engine.torch_autocast_dtype()).removeprefix("torch."),
            "lower_precision_safe_modules": engine.torch_autocast_lower_precision_safe_modules(),
        },
        "bf16": {"enabled": engine.bfloat16_enabled()},
    }


@pytest.mark.parametrize(("precision", "stage"), [("bf16", 1), ("bf16_params", 2), ("fp32", 3)])
def test_every_key_is_read_back(precision: str, stage: int) -> None:
    (engine,) = run_ranks(1, _read_back, precision, stage)
    job = _job(precision, stage)
    config = compile_config(job, BatchPlan.of(job, 1))
    assert config == {key: engine[key] for key in config}
    assert engine["torch_autocast"]["enabled"] == (precision == "bf16")
    assert engine["bf16"]["enabled"] == (precision == "bf16_params")
