"""Image classification for measuring intrinsic dimension: MNIST as Li et al. 2018 train on it, and small digits."""

from __future__ import annotations

import gzip
import importlib.util
import math
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.errors import FormatError, UsageError
from trimtab.tasks.idx import mnist_folder, read_pair
from trimtab.tasks.problem import Problem, Protocol, Split, seed_for

CLASSES = 10
VALIDATION = 10_000
"""So many of MNIST's 60,000 training images, the last, are for validation: Li et al. train on 50,000."""

DIGITS = Protocol(epochs=60, batch_size=128, lr=3e-3, l2=1e-4)
"""Quick and of our own choosing: no published figure belongs to the digits."""


def mnist_fc(
    data_dir: Path | None = None,
    *,
    width: int = 200,
    depth: int = 2,
    shuffle: Literal["pixels", "labels"] | None = None,
    shuffle_seed: int = 0,
    share: float = 1.0,
) -> Problem:
    """MNIST and a fully connected net of `depth` hidden layers of `width`, ReLU between: D = 199,210 for 200 × 2.

    Li et al. 2018, arXiv 1804.08838, §3.1; they vary the width from 50 to 400 and the depth from 1 to 5. shuffle,
    shuffle_seed, share: see `mnist`. The published figures for shuffled labels are of width 400, depth 5.
    """
    _at_least_one(width=width, depth=depth)
    return mnist(
        f"mnist-fc {depth}×{width}",
        lambda seed: fully_connected((784, *[width] * depth, CLASSES), seed),
        data_dir,
        shuffle=shuffle,
        shuffle_seed=shuffle_seed,
        share=share,
    )


def mnist_lenet(
    data_dir: Path | None = None,
    *,
    shuffle: Literal["pixels", "labels"] | None = None,
    shuffle_seed: int = 0,
    share: float = 1.0,
) -> Problem:
    """MNIST and LeNet, D = 44,426. shuffle, shuffle_seed, share: see `mnist`."""
    return mnist("mnist-lenet", lenet, data_dir, shuffle=shuffle, shuffle_seed=shuffle_seed, share=share)


def mnist(
    name: str,
    make_model: Callable[[int], nn.Module],
    data_dir: Path | None,
    *,
    shuffle: Literal["pixels", "labels"] | None = None,
    shuffle_seed: int = 0,
    share: float = 1.0,
) -> Problem:
    """MNIST with a net: 50,000 images to train, the next 10,000 for validation, the 10,000 test images.

    Pixels are from 0 to 1. shuffle: pixels, one permutation for all images; or labels, the training labels alone, which
    then can only be learned by heart, so that training accuracy is scored (Li et al. 2018 train 500 epochs at 1e-4).
    shuffle_seed: of either. share: of the training images, the first ones.
    """
    if shuffle not in (None, "pixels", "labels"):
        raise UsageError(f"shuffle is {shuffle!r}, but must be pixels or labels")
    if not 0 < share <= 1:
        raise UsageError(f"share is {share}, but must be above 0 and at most 1")
    folder = mnist_folder(data_dir)
    (inputs, targets), (test_inputs, test_targets) = (_tensors(folder, half) for half in ("train", "test"))
    border = len(targets) - VALIDATION
    if border < 1:
        raise UsageError(
            f"{folder} has {len(targets)} training images, of which {VALIDATION} would be for validation: give "
            "MNIST's 60,000, or as many of others"
        )
    kept = max(1, round(border * share))
    generator = torch.Generator().manual_seed(seed_for(shuffle_seed, f"shuffled {shuffle}"))
    if shuffle == "pixels":
        order = torch.randperm(inputs.shape[1], generator=generator)
        inputs, test_inputs = inputs[:, order], test_inputs[:, order]
    train_targets = targets[:kept]
    if shuffle == "labels":
        train_targets = train_targets[torch.randperm(kept, generator=generator)]
    return classification(
        name + (f", {shuffle} shuffled" if shuffle else "") + (f", {kept} images" if share < 1 else ""),
        train=Split(f"first {kept} of MNIST's training set", inputs[:kept], train_targets),
        validation=Split(f"last {VALIDATION} of MNIST's training set", inputs[border:], targets[border:]),
        test=Split("MNIST's test set", test_inputs, test_targets),
        scored="train" if shuffle == "labels" else "test",
        make_model=make_model,
        defaults=Protocol(epochs=500, lr=1e-4) if shuffle == "labels" else Protocol(),
    )


def digits(*, hidden: int = 32) -> Problem:
    """The 1,797 digits of 8×8 that scikit-learn carries, and a net 64-hidden-10: D = 2,410 for 32.

    997 images to train, 400 for validation, 400 to test, drawn at random once and for all; writers are on all sides.
    Only the file in the package is read, which takes milliseconds, where importing the package takes a second.
    """
    _at_least_one(hidden=hidden)
    table = _digits_table()
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed_for(0, "digits")))
    inputs, targets = table[order, :-1] / 16, table[order, -1].long()
    train, validation, test = (
        Split(f"{len(part)} of scikit-learn's digits", inputs[part], targets[part])
        for part in torch.split(torch.arange(len(table)), [len(table) - 800, 400, 400])
    )
    return classification(
        "digits",
        train=train,
        validation=validation,
        test=test,
        scored="test",
        make_model=lambda seed: fully_connected((64, hidden, CLASSES), seed),
        defaults=DIGITS,
    )


def classification(
    name: str,
    *,
    train: Split,
    validation: Split,
    test: Split,
    scored: Literal["train", "validation", "test"],
    make_model: Callable[[int], nn.Module],
    defaults: Protocol,
) -> Problem:
    """A problem of ten classes, scored by accuracy. UsageError where a class is missing from a split."""
    splits = {"train": train, "validation": validation, "test": test}
    chances = {}
    for purpose, split in splits.items():
        counts = split.targets.bincount(minlength=CLASSES)
        if len(counts) > CLASSES:
            raise UsageError(
                f"{name}: the {purpose} split ({split.name}) has labels above {CLASSES - 1}: "
                f"give data of the {CLASSES} classes from 0 to {CLASSES - 1}"
            )
        missing = [str(label) for label in range(CLASSES) if counts[label] == 0]
        if missing:
            raise UsageError(
                f"{name}: the {purpose} split ({split.name}, {len(split)} examples) has none of class "
                f"{', '.join(missing)}, so an accuracy on it means little: take more examples"
            )
        chances[purpose] = int(counts.max()) / len(split)
    return Problem(
        name=name,
        metric="accuracy",
        chances=chances,
        train=train,
        validation=validation,
        test=test,
        scored=scored,
        make_model=make_model,
        loss=functional.cross_entropy,
        score=accuracy,
        defaults=defaults,
    )


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """The share of rows whose largest output is at their label. outputs: [rows, classes]."""
    return int((outputs.argmax(dim=1) == targets).sum()) / len(targets)


def fully_connected(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    """Linear layers of these widths, inputs and outputs included, with ReLU between them; He's start."""
    layers: list[nn.Module] = []
    with torch.device("meta"):
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return he_normal(nn.Sequential(*layers[:-1]), seed)


class Images(nn.Module):
    """Rows of 784 pixels as images of one channel, channels last: convolutions of few maps are quicker on those."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows.view(-1, 1, 28, 28).to(memory_format=torch.channels_last)


def lenet(seed: int) -> nn.Sequential:
    """LeNet as in Li et al. 2018: 5×5 convolutions to 6 and 16 maps, each with 2×2 max-pooling, then 120, 84, 10."""
    with torch.device("meta"):
        net = nn.Sequential(
            Images(),
            *(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, CLASSES)),
        )
    return he_normal(net, seed)


@torch.no_grad()
def he_normal(net: nn.Sequential, seed: int) -> nn.Sequential:
    """A net without values, filled: kernels from a normal of variance 2 / fan-in, biases at 0.

    He et al. 2015, arXiv 1502.01852.
    """
    net = net.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed_for(seed, "start"))
    for parameter in net.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.normal_(0, math.sqrt(2 / fan_in), generator=generator)
        else:
            parameter.zero_()
    return net


def _tensors(folder: Path, half: str) -> tuple[Tensor, Tensor]:
    """Images as rows of pixels from 0 to 1 and their labels."""
    images, labels = read_pair(folder, half)
    if images.shape[1:] != (28, 28):
        raise FormatError(
            f"{folder} has {half} images of {images.shape[1]}×{images.shape[2]} pixels, not of 28×28: "
            "give MNIST's own, or others scaled to that"
        )
    pixels = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32)).div_(255)
    return pixels, torch.from_numpy(labels.astype(np.int64))


def _digits_table() -> Tensor:
    """[1797, 65]: 64 pixels from 0 to 16 and the label, from the file in scikit-learn's package."""
    spec = importlib.util.find_spec("sklearn")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            try:
                with gzip.open(file, "rt") as lines:
                    return torch.from_numpy(np.loadtxt(lines, delimiter=",", dtype=np.float32))
            except (EOFError, OSError, ValueError, zlib.error) as error:
                raise FormatError(f"{file} is damaged ({error}); install scikit-learn again") from error
    raise UsageError(
        "the digits are scikit-learn's, which is not installed: pip install scikit-learn (or trimtab[digits])"
    )


def _at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise UsageError(f"{name} is {size}, but must be at least 1")
