"""From a PIL image to a float32 tensor, by the names a job may use, and what a model gets of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from dst_train.job.schema import Split

DIGIT_SIZE = 28
DIGIT_MEAN, DIGIT_STD = 0.1307, 0.3081


def example_input(split: Split) -> torch.Tensor:
    """An input of the shape and dtype that the split's transform makes: float32 zeros [1, channels, height, width] or
    int64 bytes [1, length], all the largest, which a model with too small a vocabulary does not take."""
    if split.length is not None:
        return torch.full((1, split.length), 255)
    size = (1, DIGIT_SIZE, DIGIT_SIZE) if split.transform.startswith("digits") else (3, 224, 224)
    return torch.zeros(1, *size)


class Transform(NamedTuple):
    """`mode`: webdataset's name of the PIL mode that `apply` expects. `random`: whether two calls may differ."""

    mode: str
    apply: Callable[[Image.Image], torch.Tensor]
    random: bool


def transform(name: str) -> Transform:
    """The transform of that name. Raises ValueError for an unknown one.

    digits: 28 x 28 grey image -> [1, 28, 28], (x / 255 - 0.1307) / 0.3081 (mean and deviation of MNIST's training
        set); no augmentation.
    digits_train: the same after a random rotation of up to 10 degrees, shift of 10 % and scale of 0.9 to 1.1.
    imagenet_train: -> [3, 224, 224]; random resized crop (bicubic), flip, RandAugment rand-m9-mstd0.5-inc1, random
        erasing 0.25 of pixels, ImageNet mean and deviation. DynaDiag (arXiv 2506.11449) states no augmentation for its
        ViTs: these are DeiT's settings (arXiv 2012.12877, table 9), without mixup and cutmix.
    imagenet_eval: -> [3, 224, 224]; bicubic resize to 248 (crop 0.9), centre crop, ImageNet mean and deviation.
    """
    if name == "digits":
        return Transform("pill", digits, random=False)
    # torchvision and timm take seconds to import, which no worker of other data should wait
    if name == "digits_train":
        from torchvision.transforms import Compose, InterpolationMode, RandomAffine

        affine = RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=InterpolationMode.BILINEAR)
        return Transform("pill", Compose([affine, digits]), random=True)
    if name not in ("imagenet_train", "imagenet_eval"):
        raise ValueError(f"unknown transform {name!r}: use digits, digits_train, imagenet_train or imagenet_eval")
    from timm.data import create_transform

    if name == "imagenet_eval":
        return Transform("pilrgb", create_transform(224, interpolation="bicubic", crop_pct=0.9), random=False)
    train = create_transform(
        224,
        is_training=True,
        interpolation="bicubic",
        auto_augment="rand-m9-mstd0.5-inc1",
        re_prob=0.25,
        re_mode="pixel",
    )
    return Transform("pilrgb", train, random=True)


def digits(image: Image.Image) -> torch.Tensor:
    """float32 [1, 28, 28]. Raises ValueError for another size."""
    if image.size != (DIGIT_SIZE, DIGIT_SIZE):
        raise ValueError(f"the image is {image.width} x {image.height}, digits are {DIGIT_SIZE} x {DIGIT_SIZE}")
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
    return ((pixels - DIGIT_MEAN) / DIGIT_STD).unsqueeze(0)
