"""The ds_config of a job. DeepSpeed ignores unknown root keys, so every key comes from here and a test reads each back."""

from __future__ import annotations

from typing import Any

from dst_train.job import BatchPlan, Job

NEVER = 2**31 - 1


def compile_config(job: Job, plan: BatchPlan) -> dict[str, Any]:
    """The dictionary that `deepspeed.initialize` gets for this job on `plan.world_size` ranks."""
    config: dict[str, Any] = {
        "train_batch_size": plan.batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": job.train.clip_grad_norm or 0.0,
        "zero_optimization": job.deepspeed.zero_optimization.model_dump(exclude_none=True),
        # DeepSpeed knows Adam only; SGD goes through the same partitioned code.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": NEVER,
    }
    if job.train.precision == "bf16":
        # No module is declared safe for low-precision *communication*: gradients are reduced in fp32.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    elif job.train.precision == "bf16_params":
        config["bf16"] = {"enabled": True}
    return config
