"""Attention over trees against the whole mask and against each sequence alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from counting import saved_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.ops import tree as shape
from trimtab.ops import tree_attention as module
from trimtab.ops.tree import Tree
from trimtab.ops.tree_attention import tree_attention


@pytest.fixture(params=["blocks", "small blocks", "many shapes", "flash"], scope="module", autouse=True)
def path_taken(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test here holds for each way of computing it on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "small blocks":
            patch.setattr(shape, "ROWS", 3)
        if request.param == "many shapes":
            patch.setattr(module, "SHAPES", 0)
        if request.param == "flash":
            patch.setattr(module, "LONGEST", 0)
            patch.setattr(module, "LONGEST_NARROW", 0)
        yield request.param


def ends(parents: list[int]) -> list[int]:
    """The ends of tokens given their parents (-1: a root) in depth-first order."""
    end = [0] * len(parents)
    for j in reversed(range(len(parents))):
        end[j] = max([j + 1, *(end[c] for c in range(j + 1, len(parents)) if parents[c] == j)])
    return end


@st.composite
def trees(draw: st.DrawFn) -> list[int]:
    """Parents of a random forest in depth-first order: each token hangs below one on the path to the last."""
    parents, path = [-1], [0]
    for j in range(1, draw(st.integers(1, 24))):
        keep = draw(st.integers(0, len(path))) if draw(st.booleans()) else len(path)
        path = path[:keep]
        parents.append(path[-1] if path else -1)
        path.append(j)
    return parents


def inputs(tokens: int, heads: int = 4, key_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(tokens)
    shapes = [(heads, tokens, 8), (key_heads, tokens, 8), (key_heads, tokens, 8)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[0] // k.shape[0], 0) for t in (k, v))
    return (q @ k.transpose(1, 2) * scale).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def test_the_mask_is_that_of_ancestors() -> None:
    #        0 - 1 - 2
    #              \ 3 - 4
    #        5
    tree = Tree.of(ends([-1, 0, 1, 1, 3, -1]))
    assert tree.end.tolist() == [5, 5, 3, 5, 5, 6]
    seen = [[j for j in range(6) if tree.mask()[i, j]] for i in range(6)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [5]]
    assert tree.segments == ((0, 2, 5), (2, 3, 3), (3, 5, 5), (5, 6, 6))


@settings(max_examples=60, deadline=None)
@given(trees(), st.sampled_from([(4, 2), (3, 3), (3, 1)]))
def test_any_tree_gives_what_its_mask_gives(parents: list[int], heads: tuple[int, int]) -> None:
    tree, results = Tree.of(ends(parents)), []
    q, k, v = inputs(len(parents), *heads)
    g = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=q.dtype)
    for y in (tree_attention(q, k, v, tree, scale=0.3), masked(q, k, v, tree.mask(), 0.3)):
        results.append((y.detach(), *torch.autograd.grad(y, (q, k, v), g)))
    for ours, true in zip(*results, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(trees())
def test_each_path_gives_what_it_gives_alone(parents: list[int]) -> None:
    q, k, v = (t.detach() for t in inputs(len(parents)))
    whole = tree_attention(q, k, v, Tree.of(ends(parents)))
    for leaf in range(len(parents)):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        own = [t[:, path].repeat_interleave(4 // t.shape[0], 0) for t in (q, k, v)]
        alone = F.scaled_dot_product_attention(*own, is_causal=True)
        torch.testing.assert_close(whole[:, path], alone, rtol=1e-10, atol=1e-10)


def test_gradients_agree_with_finite_differences() -> None:
    tree = Tree.of(ends([-1, 0, 1, 1, 3, -1, 5, 5]))
    assert torch.autograd.gradcheck(lambda q, k, v: tree_attention(q, k, v, tree), inputs(8))


def test_perturbing_one_branch_leaves_the_other_alone() -> None:
    parents = [-1, 0, 1, 1, 3, 1, 5]
    tree = Tree.of(ends(parents))
    q, k, v = (t.detach() for t in inputs(7))
    before = tree_attention(q, k, v, tree)
    k[:, 3:5] += 100.0
    v[:, 3:5] -= 100.0
    after = tree_attention(q, k, v, tree)
    untouched = [0, 1, 2, 5, 6]
    assert torch.equal(before[:, untouched], after[:, untouched])
    assert not torch.allclose(before[:, 3:5], after[:, 3:5])


def test_fp32_gradients_over_long_segments_hold() -> None:
    parents = [*range(-1, 99), *[99, *range(100, 199)], *[99, *range(200, 259)]]
    tree, results = Tree.of(ends(parents)), []
    exact = inputs(260)
    for dtype in (torch.float32, torch.float64):
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in exact)
        y = tree_attention(q, k, v, tree) if dtype == torch.float32 else masked(q, k, v, tree.mask(), 8**-0.5)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for ours, true in zip(*results, strict=True):
        assert (ours.double() - true).norm() < 1e-5 * true.norm()


@pytest.mark.parametrize("size", [1, 3])
def test_bf16_differs_by_its_rounding_alone(size: int, narrow_products: str) -> None:
    tree = Tree.of(ends([*range(-1, 29), 9, *range(30, 49)]))
    q, k, v = (
        (t * s).detach().requires_grad_()
        for t, s in zip(inputs(50, dtype=torch.bfloat16), (size, size, 1), strict=True)
    )
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    y, true = tree_attention(q, k, v, tree), masked(*exact, tree.mask(), 8**-0.5)
    g = torch.ones_like(y)
    found = [y.detach(), *torch.autograd.grad(y, (q, k, v), g)]
    for ours, wanted in zip(found, [true.detach(), *torch.autograd.grad(true, exact, g.double())], strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - wanted).norm() < 0.01 * wanted.norm()  # 8 bits


def test_bf16_inputs_are_kept_as_they_are(narrow_products: str, path_taken: str) -> None:
    tree = Tree.of(ends([*range(-1, 29), 9, *range(30, 49)]))
    q, k, v = (t * 1.0 for t in inputs(50, dtype=torch.bfloat16))
    kept = saved_bytes(lambda: tree_attention(q, k, v, tree))
    rest = 0
    if path_taken == "flash":
        rest = 2 * q.numel() + 4 * 4 * 50  # the result, and log-sums
    elif narrow_products == "computed in bf16" and path_taken != "many shapes":
        rest = 2 * few_probabilities(tree)
    assert kept == 2 * (q.numel() + k.numel() + v.numel()) + rest


def test_inputs_and_what_is_no_larger_are_kept(path_taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape, "WASTE", 0)
    tree = Tree.of(ends([*range(-1, 29), 9, *range(30, 49)]))
    q, k, v = (t * 1.0 for t in inputs(50))
    kept = saved_bytes(lambda: tree_attention(q, k, v, tree))
    probabilities = few_probabilities(tree)
    assert 0 < probabilities <= 2 * q.numel()
    rest = q.numel() + 4 * 50 if path_taken == "flash" else probabilities
    assert kept == (q.numel() + k.numel() + v.numel() + rest) * 8


def few_probabilities(tree: Tree) -> int:
    """How many probabilities of 4 heads are kept: those of rows that see at most twice as many tokens as q is wide."""
    few = [(b - a, sum(end - start for start, end in path)) for (a, b), path, _ in tree.blocks]
    return 4 * sum(rows * path for rows, path in few if path <= 2 * 8)


@given(trees(), st.sampled_from([0, 5, 4000]))
def test_blocks_hold_every_row_once_and_see_what_it_sees(parents: list[int], waste: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shape, "WASTE", waste)
        tree = Tree.of(ends(parents))
        blocks = tree.blocks
    assert [row for own, _, _ in blocks for row in range(*own)] == list(range(len(parents)))
    seen = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for (start, stop), path, mask in blocks:
        columns = [j for a, b in path for j in range(a, b)]
        masked = mask.shape[1]
        seen[start:stop, columns[:-masked]] = True
        seen[start:stop, columns[-masked:]] = mask == 0
        assert ((mask == 0) | (mask == -torch.inf)).all()
        assert all(b < c for (_, b), (c, _) in itertools.pairwise(path))
    assert torch.equal(seen, tree.mask())
    assert tree.longest == int(tree.mask().sum(1).max())


def test_small_segments_are_one_block_and_large_ones_are_not(path_taken: str) -> None:
    small = Tree.of(ends([-1, 0, 1, 1, 3, -1, 5]))
    large = Tree.of(ends([i - 1 if i % 48 else -1 for i in range(96)]))
    assert len(small.blocks) == (3 if path_taken == "small blocks" else 1)
    if path_taken != "small blocks":
        assert len(large.blocks) == 2  # 96 rows would do, but together they waste 4,608


@pytest.mark.parametrize("parents", [[*range(-1, 6)], [-1, 0, 1, 1, 3, -1, 5]])
def test_flex_attention_computes_the_same(parents: list[int]) -> None:
    tree = Tree.of(ends(parents))
    q, k, v = (t.detach().float() for t in inputs(7))
    torch.testing.assert_close(module._flex(q, k, v, tree, 0.3), tree_attention(q, k, v, tree, scale=0.3))


def capped(q: Tensor, k: Tensor, v: Tensor, tree: Tree, cap: float) -> Tensor:
    scores = cap * torch.tanh(q @ k.repeat_interleave(2, 0).transpose(1, 2) * 8**-0.5 / cap)
    return scores.masked_fill(~tree.mask(), -torch.inf).softmax(-1) @ v.repeat_interleave(2, 0)


def test_a_soft_cap_bounds_the_scores() -> None:
    tree = Tree.of(ends([-1, 0, 1, 1, 3, -1, 5]))
    q, k, v = inputs(7)
    torch.testing.assert_close(tree_attention(q, k, v, tree, soft_cap=0.5), capped(q, k, v, tree, 0.5))
    assert torch.autograd.gradcheck(lambda q, k, v: tree_attention(q, k, v, tree, soft_cap=0.5), (q, k, v))


def test_a_soft_cap_and_values_of_another_width_keep_no_mask(path_taken: str) -> None:
    tree = Tree.of([400] * 400)
    q, k, v = (t.float().detach().requires_grad_() for t in inputs(400))
    wide = torch.cat([v, v], -1).detach().requires_grad_()
    sizes = [t.numel() * t.element_size() for t in (q, k, v)]
    assert saved_bytes(lambda: tree_attention(q, k, v, tree, soft_cap=0.5)) <= sum(sizes)
    assert saved_bytes(lambda: tree_attention(q, k, wide, tree)) <= sum(sizes) + sizes[2] + 2 * sizes[0]


def test_dropout_changes_what_is_attended_to() -> None:
    tree = Tree.of(ends([-1, 0, 1, 1, 3, -1, 5]))
    q, k, v = inputs(7)
    assert not torch.allclose(tree_attention(q, k, v, tree, dropout=0.5), tree_attention(q, k, v, tree))


@pytest.mark.parametrize("soft_cap", [None, 0.5])
def test_with_the_whole_mask_it_is_the_same(soft_cap: float | None) -> None:
    tree = Tree.of(ends([-1, 0, 1, 1, 3, -1, 5]))
    q, k, v = inputs(7)
    dense = module._dense(q, k, v, tree, 0.3, 0.0, soft_cap)
    torch.testing.assert_close(dense, tree_attention(q, k, v, tree, scale=0.3, soft_cap=soft_cap))


@pytest.mark.parametrize("soft_cap", [None, 0.5])
def test_dropout_is_what_its_masks_say(soft_cap: float | None) -> None:
    tree = Tree.of(ends([-1, 0, 1, 1, 3, -1, 5]))
    q, k, v = inputs(7)
    eye = torch.eye(7, dtype=torch.float64).expand(2, 7, 7)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(3)
        return tree_attention(q, k, v, tree, dropout=0.5, soft_cap=soft_cap)

    dropped = attend(q, k, eye)  # the probabilities themselves
    whole = tree_attention(q, k, eye, tree, soft_cap=soft_cap)
    factors = (dropped / whole)[whole > 0]
    assert set(factors.detach().round(decimals=9).tolist()) == {0.0, 2.0}
    torch.testing.assert_close(attend(q, k, v), dropped @ v.repeat_interleave(2, 0))
    assert torch.autograd.gradcheck(attend, (q, k, v))


def test_dropout_keeps_no_mask() -> None:
    tree = Tree.of([400] * 400)
    q, k, v = (t.float().detach().requires_grad_() for t in inputs(400))
    kept = saved_bytes(lambda: tree_attention(q, k, v, tree, dropout=0.1))
    assert kept <= sum(t.numel() * t.element_size() for t in (q, k, v)) + 4 * 4 * 400 * module.KEPT * 8


def test_values_of_another_width_are_served() -> None:
    tree = Tree.of(ends([-1, 0, 1, 1, 3, -1, 5]))
    q, k, v = inputs(7)
    v = torch.cat([v, v[..., :3]], -1)
    torch.testing.assert_close(tree_attention(q, k, v, tree), masked(q, k, v, tree.mask(), 8**-0.5))
    assert torch.autograd.gradcheck(lambda q, k, v: tree_attention(q, k, v, tree), (q, k, v.detach().requires_grad_()))
