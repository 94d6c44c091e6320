from __future__ import annotations

import gzip
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from trimtab.errors import FormatError, UsageError
from trimtab.tasks.idx import FILES, read_idx
from trimtab.tasks.problems import make_problem
from trimtab.tasks.vision import VALIDATION, fully_connected, lenet

TRAIN = VALIDATION + 200


def idx(values):
    values = np.asarray(values, np.uint8)
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


def write_mnist(folder, labels=None, train=TRAIN, test=100):
    """Random images and labels that go round, in MNIST's four files; the training images gzipped."""
    rng = np.random.default_rng(0)
    for half, count in (("train", train), ("test", test)):
        images_name, labels_name = FILES[half]
        images = rng.integers(0, 256, (count, 28, 28))
        files = {images_name: images, labels_name: np.arange(count) % 10 if labels is None else labels(count)}
        for name, values in files.items():
            if half == "train" and values.ndim == 3:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(values), 1))
            else:
                (folder / name).write_bytes(idx(values))
    return folder


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    return write_mnist(tmp_path_factory.mktemp("mnist"))


def count(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("width", "depth", "D"), [(200, 2, 199_210), (50, 1, 39_760), (400, 5, 959_610), (100, 3, 99_710)]
)
def test_fully_connected_nets_have_the_papers_sizes(mnist, width, depth, D):
    assert make_problem("mnist-fc", mnist, width=width, depth=depth).D == D


def test_lenet_has_the_papers_size(mnist):
    problem = make_problem("mnist-lenet", mnist)
    assert problem.D == 44_426 == count(lenet(0))
    assert problem.sizes == (150, 6, 2400, 16, 30720, 120, 10080, 84, 840, 10)
    assert problem.make_model(0)(problem.test.inputs[:3]).shape == (3, 10)


def test_lenet_is_two_convolutions_each_pooled_and_three_layers():
    net = lenet(0)
    images = torch.rand(5, 784, generator=torch.Generator().manual_seed(0))
    w = list(net.parameters())
    hidden = functional.max_pool2d(functional.conv2d(images.view(5, 1, 28, 28), *w[0:2]).relu(), 2)
    hidden = functional.max_pool2d(functional.conv2d(hidden, *w[2:4]).relu(), 2).flatten(1)
    hidden = functional.linear(functional.linear(hidden, *w[4:6]).relu(), *w[6:8]).relu()
    expected = functional.linear(hidden, *w[8:10])
    torch.testing.assert_close(net(images), expected)
    gradients = (torch.autograd.grad(outputs.square().sum(), w) for outputs in (net(images), expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # fp32 sums over places and images


def test_kernels_start_as_he_has_it_and_biases_at_zero():
    net = fully_connected((784, 200, 200, 10), seed=0)
    for layer in net[::2]:
        fan_in = layer.weight.shape[1]
        # the standard error of a deviation over n draws is deviation / √(2 n)
        spread = math.sqrt(2 / fan_in)
        assert abs(float(layer.weight.detach().std()) - spread) < 4 * spread / math.sqrt(2 * layer.weight.numel())
        assert not layer.bias.any()


@pytest.mark.parametrize("make", [lenet, lambda seed: fully_connected((64, 32, 10), seed)])
def test_a_start_depends_on_its_seed_alone(make):
    first, again, other = (torch.cat([p.detach().reshape(-1) for p in make(seed).parameters()]) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_splits_are_named_and_in_the_files_order(mnist):
    problem = make_problem("mnist-fc", mnist)
    assert (len(problem.train), len(problem.validation), len(problem.test)) == (TRAIN - VALIDATION, VALIDATION, 100)
    assert problem.train.name == "first 200 of MNIST's training set"
    assert problem.validation.name == "last 10000 of MNIST's training set"
    assert problem.scored == "test"
    images = read_idx(mnist / f"{FILES['train'][0]}.gz", 3).reshape(TRAIN, 784)
    assert torch.equal(problem.train.inputs, torch.from_numpy(images[:200].astype(np.float32)) / 255)
    assert torch.equal(problem.validation.inputs[0], torch.from_numpy(images[200].astype(np.float32)) / 255)
    assert problem.train.targets.tolist() == [i % 10 for i in range(200)]
    assert problem.chance == 0.1


def test_a_folder_above_mnist_will_do_and_so_will_the_environment(mnist, tmp_path, monkeypatch):
    (tmp_path / "mnist").symlink_to(mnist)
    monkeypatch.setenv("TRIMTAB_DATA", str(tmp_path))
    assert len(make_problem("mnist-lenet").test) == 100


@pytest.fixture
def hub(mnist, tmp_path, monkeypatch):
    """Where downloads of the dataset some/mnist are kept, with its revisions main and small; there is no connection."""
    import huggingface_hub.constants

    repository = tmp_path / "hub" / "datasets--some--mnist"
    (repository / "refs").mkdir(parents=True)
    for revision, digit in (("main", "a"), ("small", "b")):
        folder = repository / "snapshots" / (digit * 40)
        folder.mkdir(parents=True)
        (repository / "refs" / revision).write_text(digit * 40)
        if revision == "main":
            for file in mnist.iterdir():
                (folder / file.name).symlink_to(file)
        else:
            write_mnist(folder, test=30)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return repository


@pytest.mark.parametrize(("name", "images"), [("some/mnist", 100), ("some/mnist@main", 100), ("some/mnist@small", 30)])
def test_a_dataset_of_the_hub_that_holds_the_files_will_do(hub, name, images):
    assert len(make_problem("mnist-fc", Path(name)).test) == images


def test_a_folder_goes_before_a_dataset_of_its_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("some/mnist").mkdir(parents=True)
    write_mnist(Path("some/mnist"), test=40)
    assert len(make_problem("mnist-fc", Path("some/mnist")).test) == 40


@pytest.mark.parametrize("name", ["some/other", "some/mnist@nowhere"])
def test_a_dataset_that_cannot_be_had_says_what_is_needed(hub, name):
    with pytest.raises(UsageError, match=f"{name}, which is no folder here, and as a dataset .* cannot be had") as told:
        make_problem("mnist-fc", Path(name))
    assert all(file in str(told.value) for pair in FILES.values() for file in pair)


def test_a_dataset_without_all_of_the_files_is_refused(hub):
    (hub / "snapshots" / ("a" * 40) / FILES["test"][1]).unlink()
    with pytest.raises(UsageError, match=f"--data-dir names some/mnist, which lacks {FILES['test'][1]}"):
        make_problem("mnist-fc", Path("some/mnist"))


def test_shuffled_pixels_are_one_permutation_of_all_images(mnist):
    plain, shuffled, again, other = (
        make_problem("mnist-fc", mnist, **options)
        for options in ({}, {"shuffle": "pixels"}, {"shuffle": "pixels"}, {"shuffle": "pixels", "shuffle_seed": 1})
    )
    assert torch.equal(shuffled.train.inputs, again.train.inputs)
    assert not torch.equal(shuffled.train.inputs, other.train.inputs)
    # A column of the training images tells where it went; there the other splits must have it too.
    columns = {tuple(column): i for i, column in enumerate(plain.train.inputs.T.tolist())}
    order = [columns[tuple(column)] for column in shuffled.train.inputs.T.tolist()]
    assert sorted(order) == list(range(784))
    assert order != list(range(784))
    for split in ("validation", "test"):
        assert torch.equal(plain.splits[split].inputs[:, order], shuffled.splits[split].inputs)
    assert torch.equal(plain.train.targets, shuffled.train.targets)


def test_shuffled_labels_are_scored_where_they_were_trained(mnist):
    plain, shuffled = make_problem("mnist-fc", mnist), make_problem("mnist-fc", mnist, shuffle="labels", share=0.5)
    assert shuffled.scored == "train"
    assert len(shuffled.train) == 100
    assert not torch.equal(shuffled.train.targets, plain.train.targets[:100])
    assert torch.equal(shuffled.train.targets.sort().values, plain.train.targets[:100].sort().values)
    assert torch.equal(shuffled.test.targets, plain.test.targets)
    assert (shuffled.defaults.epochs, shuffled.defaults.lr) == (500, 1e-4)


def test_a_class_missing_from_a_split_is_refused(tmp_path):
    write_mnist(tmp_path, labels=lambda n: np.arange(n) % 10 if n == TRAIN else np.arange(n) % 9)
    with pytest.raises(UsageError, match=r"test split .* none of class 9"):
        make_problem("mnist-fc", tmp_path)


def test_a_share_that_leaves_a_class_out_is_refused(mnist):
    with pytest.raises(UsageError, match=r"train split .* 5 examples\) has none of class 5, 6, 7, 8, 9"):
        make_problem("mnist-fc", mnist, share=5 / 200)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 0}, "width is 0"),
        ({"share": 0}, "share is 0"),
        ({"share": 1.5}, "1.5"),
        ({"shuffle": "rows"}, "rows"),
    ],
)
def test_options_out_of_range_are_refused(mnist, options, words):
    with pytest.raises(UsageError, match=words):
        make_problem("mnist-fc", mnist, **options)


def test_missing_data_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("TRIMTAB_DATA", raising=False)
    names = [name for pair in FILES.values() for name in pair]
    with pytest.raises(UsageError, match="--data-dir") as told:
        make_problem("mnist-fc")
    assert all(name in str(told.value) for name in names)
    with pytest.raises(UsageError, match="no folder"):
        make_problem("mnist-fc", tmp_path / "absent")
    (tmp_path / names[0]).write_bytes(idx([[[1]]]))
    with pytest.raises(UsageError, match=f"lacks {', '.join(names[1:])}; MNIST needs"):
        make_problem("mnist-lenet", tmp_path)


def test_images_and_labels_that_do_not_fit_are_refused(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / FILES["test"][1]).write_bytes(idx(np.arange(99) % 10))
    with pytest.raises(FormatError, match=r"100 images, but .* 99 labels"):
        make_problem("mnist-fc", tmp_path)
    write_mnist(tmp_path, labels=lambda n: np.full(n, 10))
    with pytest.raises(UsageError, match="labels above 9"):
        make_problem("mnist-fc", tmp_path)


arrays = st.lists(st.integers(0, 255), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=arrays, zipped=st.booleans())
def test_an_idx_file_gives_back_what_it_holds(tmp_path, values, zipped):
    file = tmp_path / "labels-idx1-ubyte"
    file.write_bytes(gzip.compress(idx(values)) if zipped else idx(values))
    assert read_idx(file, 1).tolist() == values


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=arrays, zipped=st.booleans(), share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_idx_file_is_refused_by_name(tmp_path, values, zipped, share):
    file = tmp_path / "labels-idx1-ubyte"
    whole = gzip.compress(idx(values)) if zipped else idx(values)
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(FormatError, match="labels-idx1-ubyte"):
        read_idx(file, 1)


@pytest.mark.parametrize("begin", [b"\0\0\x08\x03", b"\0\0\x0d\x01", b"PK\x03\x04", b"\x01\0\x08\x01"])
def test_a_wrong_magic_number_is_refused_by_name(tmp_path, begin):
    file = tmp_path / "labels-idx1-ubyte"
    file.write_bytes(begin + idx([1, 2, 3])[4:])
    with pytest.raises(FormatError, match=rf"labels-idx1-ubyte begins with {begin.hex()}.*00000801"):
        read_idx(file, 1)


def test_values_past_the_end_are_refused(tmp_path):
    file = tmp_path / "labels-idx1-ubyte"
    file.write_bytes(idx([1, 2, 3]) + b"\0")
    with pytest.raises(FormatError, match="holds 4 values, but its header says 3"):
        read_idx(file, 1)


def test_the_digits_are_split_without_overlap():
    pytest.importorskip("sklearn", reason="scikit-learn, which carries the digits, is not installed")
    problem = make_problem("digits")
    assert problem.D == 2410
    assert [len(split) for split in problem.splits.values()] == [997, 400, 400]
    rows = torch.cat([split.inputs for split in problem.splits.values()])
    assert len(rows.unique(dim=0)) == 1797
    assert (float(rows.min()), float(rows.max())) == (0, 1)
    assert problem.chance < 0.15


def test_the_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install scikit-learn"):
        make_problem("digits")


def test_mnist_itself_is_read_whole():
    named = Path(os.environ.get("TRIMTAB_DATA", "")).expanduser()
    if not os.environ.get("TRIMTAB_DATA") or not (named / "mnist").is_dir():
        pytest.skip("TRIMTAB_DATA names no folder with mnist/ in it")
    problem = make_problem("mnist-fc")
    assert [len(split) for split in problem.splits.values()] == [50_000, 10_000, 10_000]
    assert problem.chance == 0.1135  # 1135 ones among the test images
    assert problem.train.targets[:5].tolist() == [5, 0, 4, 1, 9]
