"""Directions: definitions against dense computation, scores by hand, nulls against real random matrices, verdicts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from random_changes import a_change, some_changes
from torch import Tensor, nn

import trimtab
from toys import MODULES, built, holder, numbers, small, stir
from trimtab.analyze.changes import Changed, of_adapter
from trimtab.analyze.directions import (
    Projected,
    check_directions,
    project,
    project_all,
    scores,
    shared,
    top,
)
from trimtab.analyze.findings import Findings, Source, look_at, look_at_pairs
from trimtab.analyze.lifts import against, by_shape, layer_of
from trimtab.analyze.overlap import compare, compare_all, group
from trimtab.analyze.picks import picks
from trimtab.analyze.sharing import share
from trimtab.deltas import make_method
from trimtab.deltas.core_bases import change_rates, core_bases
from trimtab.errors import UsageError
from trimtab.formats.peft import export_peft

METHODS = ("lora", "dash", "full")


def by_definition(weight: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """(uᵢᵀ ΔW vᵢ, change rates), from the dense matrices in fp64."""
    U, sigma, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    along = (U.T @ change.double() @ Vh.T).diagonal()
    return along, along.abs() / (sigma + 1e-6 * sigma[0])


def assert_by_definition(projected: Projected, weight: Tensor, change: Tensor) -> None:
    along, rates = by_definition(weight, change)
    # fp32 vectors of singular values that lie close turn a little into each other.
    limits = {"rtol": 2e-3, "atol": 2e-4 * float(along.abs().max())}
    torch.testing.assert_close(torch.from_numpy(projected.along), along, **limits)
    torch.testing.assert_close(
        torch.from_numpy(projected.rates), rates, rtol=2e-3, atol=2e-4 * float(rates.abs().max())
    )


# --- definitions ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [kind for kind in MODULES if "scaled" not in kind])
def test_projections_and_rates_are_those_of_the_dense_change(method: str, kind: str) -> None:
    model, _ = holder(kind)
    adapter = stir(trimtab.attach(model, small(method), targets="layer"))
    ((path, projected),) = project_all(of_adapter(adapter)).items()
    delta = adapter.deltas[path]
    weight = model.layer.weight.detach()
    matrix = delta.layout.matrix(weight)
    assert projected.shape == tuple(matrix.shape)
    assert_by_definition(projected, matrix, delta.weight_change(weight).detach())
    assert projected.rank == {"lora": 2, "dash": 4, "full": None}[method]


@pytest.mark.parametrize("shape", [(7, 7), (5, 9), (9, 5)])
def test_factors_and_the_dense_change_give_the_same(shape: tuple[int, int]) -> None:
    W, B, A = numbers(*shape, seed=1), numbers(shape[0], 2, seed=2), numbers(2, shape[1], seed=3)
    low, dense = (project(Changed("w", W, lambda made=made: made)) for made in ((B, A), B @ A))
    np.testing.assert_allclose(low.along, dense.along, rtol=1e-4, atol=1e-5)
    assert (low.rank, dense.rank) == (2, None)
    np.testing.assert_allclose(low.rates, change_rates(core_bases(W), B, A).double().numpy(), rtol=1e-5)


def test_only_what_changes_counts_as_rank() -> None:
    adapter = trimtab.attach(holder("linear")[0], trimtab.Dash(rank=2, directions=3, warm_up_steps=5), targets="layer")
    with torch.no_grad():
        adapter.deltas["layer"].B.copy_(numbers(6, 2))
    assert project(of_adapter(adapter)[0]).rank == 2  # without the columns for directions that are not chosen yet


def test_directions_of_no_singular_value_have_finite_rates() -> None:
    for W in (numbers(6, 2, seed=1) @ numbers(2, 6, seed=2), torch.zeros(4, 4)):
        factors = numbers(len(W), 2), numbers(2, len(W))
        projected = project(Changed("w", W, lambda made=factors: made))
        assert np.isfinite(projected.rates).all()
        assert projected.rates.any()


def test_slices_of_a_fused_projection_have_directions_of_their_own() -> None:
    model = built("gpt2")
    flags = {"c_attn": (True, False, True)}
    adapter = stir(trimtab.attach(model, trimtab.LoRA(rank=2), targets="c_attn", slices=flags))
    found = project_all(of_adapter(adapter))
    path, delta = next(iter(adapter.deltas.items()))
    weight = adapter.sites[path].weight.detach()
    assert [name for name in found if name.startswith(path)] == [f"{path}[0:16]", f"{path}[32:48]"]
    rows = slice(32, 48)
    change = delta.weight_change(weight).detach()[rows]
    assert_by_definition(found[f"{path}[32:48]"], weight.T[rows], change)


def test_the_ones_that_change_most_stand_first() -> None:
    projected = a_change("w", np.array([4.0, 2.0, 1.0, 0.5]), np.array([4.0, -1.0, 3.0, 0.5]))
    assert projected.picked(3).tolist() == [2, 0, 3]
    assert top(np.array([[1.0, 3.0, 2.0], [9.0, 7.0, 8.0]]), 2).tolist() == [[1, 2], [0, 2]]
    assert top(np.array([[1.0, 3.0, 2.0]]), 3).tolist() == [[1, 2, 0]]


def test_what_does_not_change_is_left_out_and_told(caplog: pytest.LogCaptureFixture) -> None:
    model = built("llama")
    adapter = trimtab.attach(model, trimtab.LoRA(rank=2), targets="q_proj")
    with pytest.raises(UsageError, match="no weight is changed at all"):
        project_all(of_adapter(adapter))
    with torch.no_grad():
        adapter.deltas["model.layers.1.self_attn.q_proj"].B.fill_(1.0)
    assert list(project_all(of_adapter(adapter))) == ["model.layers.1.self_attn.q_proj"]
    assert "1 of 2 weights are not changed and left out, the first model.layers.0.self_attn.q_proj" in caplog.text


def test_a_change_that_is_not_finite_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the change of a\.b is not finite"):
        project(Changed("a.b", numbers(4, 4), lambda: torch.full((4, 4), float("nan"))))


def test_more_directions_than_there_are_are_refused() -> None:
    changes = [Changed("a.b", numbers(6, 5), lambda: numbers(6, 5))]
    check_directions(5, changes)
    with pytest.raises(UsageError, match=r"6 directions are above the 5 core directions of a\.b"):
        check_directions(6, changes)
    with pytest.raises(UsageError, match="twice the 3 directions, which is above the 5 core"):
        check_directions(3, changes, compared=True)
    with pytest.raises(UsageError, match="directions is 0"):
        check_directions(0, changes)


# --- scores ---


def test_accuracy_and_recall_are_those_of_the_paper() -> None:
    actual = np.arange(100, 116)  # the first four are those that recall looks for
    predicted = np.array([115, 101, 3, 4, 5, 103, 6, 108])
    found = scores(predicted, actual, 8)
    assert float(found.accuracy) == 4 / 8
    assert float(found.recall) == 2 / 4
    both = scores(np.stack([predicted, actual[:8]]), actual, 8)
    assert both.accuracy.tolist() == [0.5, 1.0]
    assert both.recall.tolist() == [0.5, 1.0]
    assert float(shared(np.array([1, 2, 3]), np.array([3, 1, 9, 7]))) == 2


def test_the_same_change_meets_itself_and_chance_is_what_drawing_gives() -> None:
    change = some_changes(1, seed=1)["m.0.q"]
    found = compare(change, change)
    assert (float(found.found.accuracy), float(found.found.recall)) == (1.0, 1.0)
    assert float(found.nulls["chance"].accuracy[0]) == 16 / 64
    assert float(found.nulls["chance"].recall[0]) == 8 / 64
    generator = np.random.default_rng(0)
    drawn = np.stack([generator.permutation(64)[:8] for _ in range(4000)])
    by_drawing = scores(drawn, change.picked(16), 8)
    assert by_drawing.accuracy.mean() == pytest.approx(16 / 64, abs=0.01)  # 4 standard errors
    assert by_drawing.recall.mean() == pytest.approx(8 / 64, abs=0.012)


def test_the_smallest_singular_values_are_scored_as_a_prediction() -> None:
    along = np.zeros(64)
    along[[63, 62, 0, 1]] = 100.0, 50.0, 90.0, 80.0
    along[2:62] = np.linspace(0.5, 0.1, 60)
    change = a_change("m.0.q", np.ones(64), along)
    smallest = compare(change, change).nulls["smallest"]
    assert smallest.recall.tolist() == [2 / 4]  # 63 and 62 of the first four, 63, 0, 1, 62
    assert smallest.accuracy.tolist() == [2 / 8]


def test_changes_of_different_weights_are_not_compared() -> None:
    first = some_changes(1, seed=1)["m.0.q"]
    for other in (first._replace(shape=(64, 64)), first._replace(sigma=first.sigma + 1)):
        with pytest.raises(UsageError, match="are not the same weight"):
            compare(first, other)
        with pytest.raises(UsageError, match="are not the same weight"):
            share(first, other)
    with pytest.raises(UsageError, match="changes none of the weights"):
        compare_all({"a": first}, {"b": first})
    with pytest.raises(UsageError, match="draws is 99, but must be at least 100"):
        compare(first, first, draws=99)


# --- verdicts ---


def verdict(predicted: dict[str, Projected], actual: dict[str, Projected], seed: int = 0) -> tuple[bool, str]:
    found = group("64×96", compare_all(predicted, actual, seed=seed), 8)
    return found.predicts, found.verdict()


def test_noise_is_never_called_a_prediction() -> None:
    for seed in range(12):
        predicts, sentence = verdict(some_changes(10, seed), some_changes(10, seed + 100, rank=None), seed)
        assert not predicts
        assert "not more than noise gives" in sentence
        assert "two random changes" in sentence


def test_that_two_changes_read_the_same_inputs_is_no_finding() -> None:
    """Adapters of one seed begin with the same A: whatever B learns, they pick many of the same directions."""
    above_random = 0
    for seed in range(6):
        first, second = (some_changes(30, seed + 100 * n, rank=1, seed_of_A=seed) for n in (1, 2))
        found = group("64×96", compare_all(first, second, seed=seed), 8)
        above_random += found.accuracy["random"].answer == "more"
        assert found.accuracy["same_A"].answer == "no more"
        assert not found.predicts
        (pair,) = look_at_pairs([Source(str(n), "d", "adapter", some) for n, some in enumerate((first, second))])
        assert pair.shapes[0].share.answer == "no more"
    assert above_random == 6


def test_directions_that_lora_dash_hardly_uses_hardly_count_as_inputs(tmp_path: Path) -> None:
    """Its V has rows of norm 1 beside an A that is far smaller; an export as a LoRA is the same."""
    weight = holder("linear")[0].layer.weight
    found = []
    for size in (0.0, 1e-5):
        adapter = stir(trimtab.attach(holder("linear")[0], small("dash"), targets="layer"))
        with torch.no_grad():
            adapter.deltas["layer"].d.fill_(size)
        found.append(project(Changed("layer", weight, adapter.deltas["layer"].factors)).inputs)
        lora = trimtab.load(holder("linear")[0], export_peft(adapter, tmp_path / str(size)), name="lora")
        found.append(project(of_adapter(lora)[0]).inputs)
    for inputs in found[1:]:
        np.testing.assert_allclose(inputs, found[0], rtol=1e-3)


@pytest.mark.parametrize("method", ["lora-xs", "pissa", "milora"])
def test_changes_within_a_few_of_the_weights_own_directions_predict_nothing(method: str) -> None:
    """Their A is made of W's singular vectors, so that any two of them move the same few directions."""
    layers = nn.ModuleList(nn.Linear(48, 64, bias=False) for _ in range(12))
    for seed, layer in enumerate(layers):
        layer.weight.data = numbers(64, 48, seed=seed)
    changes = []
    for seed in (100, 200):
        adapter = stir(trimtab.attach(layers, make_method(method, rank=16), targets="re:.*"), seed=seed, size=0.02)
        changes.append(project_all(of_adapter(adapter)))
        adapter.remove()
    found = group("64×48", compare_all(*changes), 8)
    assert found.accuracy["random"].answer == "more"
    assert not found.predicts, found.verdict()
    (pair,) = look_at_pairs([Source(str(n), "d", "adapter", some) for n, some in enumerate(changes)])
    assert pair.shapes[0].share.answer != "more"


def test_a_planted_signal_is_told() -> None:
    predicts, sentence = verdict(some_changes(12, 1, signal=4.0), some_changes(12, 2, signal=4.0, rank=None))
    assert predicts
    assert sentence.startswith("64×96 (12 weights): the adapter predicts the directions; accuracy")


def test_a_signal_that_the_smallest_singular_values_have_too_is_none() -> None:
    changes = []
    for seed in (1, 2):
        found = some_changes(12, seed, rank=None)
        for change in found.values():
            change.along[-8:] += 30
        changes.append(found)
    predicts, sentence = verdict(*changes)
    assert not predicts
    assert "not more than the 8 smallest σ give" in sentence


def test_of_a_few_layers_nothing_is_concluded() -> None:
    predicts, sentence = verdict(some_changes(4, 1, signal=4.0), some_changes(4, 2, signal=4.0))
    assert not predicts
    assert "no verdict, for 4 layers are too few for an interval (at least 5)" in sentence


def test_the_weights_of_one_layer_count_once() -> None:
    assert layer_of("model.layers.12.self_attn.q_proj") == "model.layers.12"
    assert layer_of("h.3.attn.c_attn[0:16]") == "h.3"
    assert layer_of("classifier.dense") == "classifier.dense"
    figures = [1.0, 1.0, 0.0, 0.0, 0.5, 0.6, 0.2, 0.3, 0.9, 0.8]
    paths = [f"m.{i // 2}.w{i % 2}" for i in range(10)]
    by_layer = against(figures, [np.zeros(1)] * 10, paths)
    by_weight = against(figures, [np.zeros(1)] * 10, [f"w{i}" for i in range(10)])
    assert (by_layer.layers, by_weight.layers) == (5, 10)
    width = [one.interval.high - one.interval.low for one in (by_layer, by_weight)]
    assert width[0] > 1.2 * width[1]


def test_square_weights_stand_apart_and_last() -> None:
    changes = [a_change(f"m.0.{i}", np.ones(4), np.ones(4), shape=s) for i, s in enumerate([(8, 8), (4, 8), (8, 4)])]
    assert list(by_shape(changes)) == ["4×8", "8×4", "8×8"]


def test_picks_that_stand_where_noise_puts_them_are_called_so() -> None:
    held = look_at(Source("a", "a", "adapter", some_changes(10, 1)), None)
    assert held.picked["64×96"]["held"].answer == "no more"
    strong = look_at(Source("a", "a", "adapter", some_changes(10, 1, signal=20.0)), None)
    assert strong.picked["64×96"]["held"].answer == "more"
    one = picks(a_change("m.0.q", np.ones(64), np.eye(64)[5] + 1e-3), 8)
    assert one.found["held"] > 0.9
    assert one.found["smallest"] == 0.0
    assert one.picked[0] == 5


# --- sharing ---


def test_a_matrix_says_which_ranks_are_shared() -> None:
    first, second = np.zeros(64), np.zeros(64)
    first[[10, 20, 30]] = 9.0, 8.0, 7.0
    second[[30, 10, 40]] = 9.0, 8.0, 7.0
    found = share(a_change("w", np.ones(64), first), a_change("w", np.ones(64), second), directions=3)
    assert found.cells.tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert found.found == 2 / 3
    assert found.null.mean() == pytest.approx(3 / 64, abs=0.05)  # where all σ are equal, as of random picks


def test_tasks_that_share_no_more_than_noise_are_told_so() -> None:
    sources = [Source(str(n), "d", "adapter", some_changes(10, n)) for n in (1, 2)]
    (noise,) = look_at_pairs(sources)
    assert noise.shapes[0].share.answer == "no more"
    signal = [Source(str(n), "d", "adapter", some_changes(10, n, signal=4.0)) for n in (1, 2)]
    (told,) = look_at_pairs(signal)
    assert told.shapes[0].share.answer == "more"
    assert told.shapes[0].cells.shape == (8, 8)
    assert told.shapes[0].cells.sum() / 8 == pytest.approx(told.shapes[0].share.found)
    assert told.shapes[0].chance == 8 / 64
    assert look_at_pairs([signal[0], Source("x", "d", "adapter", {"else": noise_of("else")})]) == []


def noise_of(path: str) -> Projected:
    return a_change(path, np.ones(64), np.ones(64))


def test_all_that_is_found_can_be_written_as_json() -> None:
    sources = [Source(str(n), "d", "adapter", some_changes(6, n)) for n in (1, 2)]
    found = [look_at(source, sources[1]) for source in sources]
    findings = Findings("m", 8, 100, 0, found, sources[1], look_at_pairs(sources))
    told = json.loads(json.dumps(findings.to_dict()))
    assert told["adapters"][1]["overlap"]["weights"][0]["accuracy"]["found"] == 1.0
    assert told["verdicts"] == findings.sentences()
    assert len(told["sharing"][0]["weights"]) == 6
