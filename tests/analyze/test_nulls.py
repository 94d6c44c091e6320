"""Nulls: drawn along the core directions as real random matrices would come out, and what they give on real weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from random_changes import some_changes
from torch import Tensor

from toys import numbers
from trimtab.analyze.changes import Changed, StoredTensors
from trimtab.analyze.directions import Projected, project, project_all, scores, shared, top
from trimtab.analyze.nulls import random_along, random_picks, random_rates
from trimtab.analyze.overlap import compare, compare_all
from trimtab.deltas.core_bases import core_bases
from trimtab.models.convert import cache_folder
from trimtab.models.embedded import EMBEDDED


def dense_draws(bases: tuple[Tensor, Tensor], rank: int | None, count: int, A: Tensor | None) -> np.ndarray:
    """cᵢ of random changes that are really made, [count, n]. A: [rank, in], kept in all of them."""
    U, V = bases
    generator = torch.Generator().manual_seed(4)
    if rank is None:
        made = torch.randn(count, len(U), len(V), generator=generator)
    else:
        B = torch.randn(count, len(U), rank, generator=generator)
        made = B @ (torch.randn(count, rank, len(V), generator=generator) if A is None else A)
    return (U.T @ made @ V).diagonal(dim1=1, dim2=2).numpy()


@pytest.mark.parametrize(("rank", "keeps_A"), [(None, False), (1, False), (3, False), (1, True), (3, True)])
@pytest.mark.parametrize("shape", [(12, 12), (12, 20), (20, 12)])
def test_the_shortcut_draws_what_random_matrices_give(shape: tuple[int, int], rank: int | None, keeps_A: bool) -> None:
    count = 3000
    weight = numbers(*shape, seed=1)
    U, sigma, V = core_bases(weight)
    A = numbers(rank, shape[1], seed=7) if keeps_A and rank else None
    made = dense_draws((U, V), rank, count, A)
    inputs = None if A is None else project(Changed("w", weight, lambda: (numbers(shape[0], len(A)), A))).inputs
    drawn = random_along(np.random.default_rng(5), count, 12, rank, inputs)
    like = Projected("w", shape, rank, sigma.double().numpy(), np.ones(12), inputs)
    rates = [np.abs(c) / sigma.numpy() for c in (made, drawn)]
    statistics = {
        "size": [np.abs(c).mean(1) for c in (made, drawn)],
        "square": [(c**2).mean(1) for c in (made, drawn)],
        "small": [(np.abs(c) < 0.3).mean(1) for c in (made, drawn)],  # heavier tails go with a sharper peak
        "last": [np.abs(c[:, -1]) for c in (made, drawn)],
        "together": [(c[:, 0] ** 2 - 1) * (c[:, 1] ** 2 - 1) for c in (made, drawn)],
        "smallest picked": [shared(top(r, 3), np.arange(9, 12)) for r in rates],
        "meeting": [scores(top(r[: count // 2], 3), top(r[count // 2 :], 6), 3).accuracy for r in rates],
    }
    for name, (dense, short) in statistics.items():
        spread = np.sqrt(dense.var() / len(dense) + short.var() / len(short))
        assert abs(dense.mean() - short.mean()) < 4 * spread, name
    picked = shared(random_picks(like, np.random.default_rng(6), count, 3), np.arange(9, 12))
    dense = statistics["smallest picked"][0]
    assert abs(picked.mean() - dense.mean()) < 4 * np.sqrt((picked.var() + dense.var()) / count)


def test_rank_matters_to_the_null() -> None:
    one, many = (np.abs(random_along(np.random.default_rng(1), 500, 64, rank)) for rank in (1, 64))
    assert one.mean() / np.sqrt((one**2).mean()) < 0.75 < many.mean() / np.sqrt((many**2).mean())


def test_random_rates_have_the_size_of_the_change() -> None:
    like = some_changes(1, seed=3)["m.0.q"]
    rates = random_rates(like, np.random.default_rng(1), 50)
    size = ((rates * like.sigma) ** 2).sum(1)
    np.testing.assert_allclose(size, (like.along**2).sum(), rtol=1e-4)


def test_one_null_is_random_on_both_sides_and_one_on_the_side_of_the_prediction_alone() -> None:
    predicted, actual = (some_changes(1, seed)["m.0.q"] for seed in (1, 2))
    found = compare(predicted, actual).nulls
    other = compare(predicted, actual._replace(along=actual.along[::-1] ** 3)).nulls
    assert np.array_equal(found["random"].accuracy, other["random"].accuracy)
    assert not np.array_equal(found["prediction"].accuracy, other["prediction"].accuracy)
    replaced = compare(predicted._replace(along=predicted.along[::-1] ** 3), actual).nulls
    assert all(np.array_equal(found[null].recall, replaced[null].recall) for null in found)


def test_a_null_does_not_depend_on_the_other_weights_and_depends_on_the_seed() -> None:
    changes = some_changes(3, seed=1)
    alone = compare(changes["m.2.q"], changes["m.2.q"])
    among = compare_all(changes, changes)[2]
    other = compare(changes["m.2.q"], changes["m.2.q"], seed=1)
    assert np.array_equal(alone.nulls["random"].accuracy, among.nulls["random"].accuracy)
    assert not np.array_equal(alone.nulls["random"].accuracy, other.nulls["random"].accuracy)


@pytest.fixture(scope="module")
def smollm2() -> StoredTensors:
    embedded = EMBEDDED["smollm2-135m"]
    folders = sorted(cache_folder().glob(f"{Path(embedded.file).stem}-*/model.safetensors"))
    if not folders:
        pytest.skip("the embedded model smollm2-135m is not in the cache: trimtab demo puts it there")
    return StoredTensors(folders[-1].parent)


@pytest.mark.parametrize(
    ("kind", "accuracy", "recall"),
    [
        ("self_attn.q_proj", 0.76, 0.76),
        ("self_attn.k_proj", 0.41, 0.34),
        ("self_attn.v_proj", 0.26, 0.19),
        ("mlp.up_proj", 0.21, 0.19),
        ("mlp.down_proj", 0.20, 0.16),
    ],
)
def test_random_changes_overlap_on_real_weights_as_much_as_was_reported_of_training(
    smollm2: StoredTensors, kind: str, accuracy: float, recall: float
) -> None:
    """Square weights give the accuracy of three quarters that is reported of adapters; wide ones far less."""
    paths = [f"model.layers.{layer}.{kind}" for layer in range(0, 30, 3)]
    weights = {path: smollm2[f"{path}.weight"] for path in paths}
    changes = [Changed(path, weight, lambda w=weight: numbers(*w.shape)) for path, weight in weights.items()]
    found = [compare(change, change) for change in project_all(changes).values()]
    # Layers differ with standard deviations of 0.02 (q) to 0.06 (k, down), so means of ten by up to 0.02: twice that.
    assert np.mean([o.nulls["random"].accuracy for o in found]) == pytest.approx(accuracy, abs=0.04)
    assert np.mean([o.nulls["random"].recall for o in found]) == pytest.approx(recall, abs=0.04)
