"""What holds for every projection, and what each of them promises: norms, orthogonality, its matrix, its seeds."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.ops.hadamard import hadamard
from trimtab.subspace import blocks, matrices
from trimtab.subspace.blocks import Fastfood, FastfoodBlocks
from trimtab.subspace.draws import GENERATOR
from trimtab.subspace.linear import Projection
from trimtab.subspace.projection import PROJECTIONS, make_projection, most_dimensions

KINDS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in PROJECTIONS),
    ("fastfood", {"diagonal": "sign"}),
    ("fastfood-blocks", {"diagonal": "gaussian"}),
]
every = pytest.mark.parametrize(("name", "options"), KINDS, ids=[" ".join([n, *o.values()]) for n, o in KINDS])
UNIT_COLUMNS = ["uni", "sparse", "sparse-global", "dense"]


def matrix(projection: Projection) -> Tensor:
    """P [D, d], in fp64."""
    return projection.expand(torch.eye(projection.d, dtype=torch.float64)).T


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of several blocks each, in small projections."""
    monkeypatch.setattr(blocks, "CHUNK", 64)


# --- what holds for all ---


@every
@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.data())
def test_the_adjoint_is_the_transpose(
    name: str, options: dict[str, Any], sizes: list[int], data: st.DataObject
) -> None:
    D = sum(sizes)
    d = data.draw(st.integers(1, D), label="d")
    columns = data.draw(st.none() | st.integers(d, D), label="columns")
    seed = data.draw(st.integers(0, 2**40), label="seed")
    projection = make_projection(name, sizes, d, seed, columns=columns, **options)
    u, v = drawn(d, seed=seed % 2**31), drawn(D, seed=seed % 2**31 + 1)
    forwards, backwards = projection.expand(u) @ v, u @ projection.adjoint(v)
    assert abs(forwards - backwards) < 1e-12 * u.norm() * v.norm()
    assert projection.D == D


@every
def test_the_adjoint_is_the_transpose_over_several_chunks(
    name: str, options: dict[str, Any], small_chunks: None
) -> None:
    projection = make_projection(name, [100, 7, 200], 10, 1, **options)
    torch.testing.assert_close(matrix(projection), projection.adjoint(torch.eye(307, dtype=torch.float64)))


@every
def test_gradients_are_exact_to_the_second_order(name: str, options: dict[str, Any]) -> None:
    projection = make_projection(name, [12, 5], 6, 0, **options)
    theta_d, g = drawn(6).requires_grad_(), drawn(17).requires_grad_()
    assert torch.autograd.gradcheck(projection.expand, (theta_d,))
    assert torch.autograd.gradcheck(projection.adjoint, (g,))
    assert torch.autograd.gradgradcheck(lambda t: projection.expand(t).pow(3), (theta_d,))


@every
@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_vmap_and_grad_of_torch_func_go_through(name: str, options: dict[str, Any], cache_bytes: int) -> None:
    projection = make_projection(name, [12, 5], 6, 0, cache_bytes=cache_bytes, **options)
    several = drawn(3, 6)

    def loss(theta_d: Tensor) -> Tensor:
        return projection.expand(theta_d).pow(3).sum()

    slopes = torch.func.vmap(torch.func.grad(loss))(several)
    P = matrix(projection)
    torch.testing.assert_close(slopes, 3 * (several @ P.T).square() @ P)
    torch.testing.assert_close(torch.func.vmap(projection.expand, in_dims=1)(several.T), several @ P.T)


@every
def test_leading_dimensions_are_kept(name: str, options: dict[str, Any]) -> None:
    projection = make_projection(name, [12, 5], 6, 0, **options)
    P, x, g = matrix(projection), drawn(2, 3, 6), drawn(2, 3, 17)
    torch.testing.assert_close(projection.expand(x), x @ P.T)
    torch.testing.assert_close(projection.adjoint(g), g @ P)


@every
@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 8), (torch.bfloat16, 1)])
def test_the_result_has_the_dtype_of_the_input_and_sums_are_in_fp32(
    name: str, options: dict[str, Any], dtype: torch.dtype, roundings: int
) -> None:
    projection = make_projection(name, [300, 5], 20, 0, **options)
    theta_d = drawn(20).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = projection.expand(theta_d)
    true = projection.expand(theta_d.double())
    assert found.dtype == dtype
    assert (found.double() - true).norm() < roundings * torch.finfo(dtype).eps / 2 * true.norm()


@every
def test_inputs_are_left_as_they_are(name: str, options: dict[str, Any]) -> None:
    projection = make_projection(name, [128], 16, 0, **options)
    for product, x in ((projection.expand, drawn(16)), (projection.adjoint, drawn(128))):
        before = x.clone()
        product(x)
        assert torch.equal(x, before)


# --- seeds ---


@every
def test_options_as_json_make_the_same_projection_again(name: str, options: dict[str, Any]) -> None:
    first = make_projection(name, [40, 3], 9, 5, columns=12, **options)
    again = make_projection(**json.loads(json.dumps(first.options())))
    assert torch.equal(matrix(again), matrix(first))
    assert again.options() == first.options()


@every
def test_another_seed_is_another_projection(name: str, options: dict[str, Any]) -> None:
    first, second = (matrix(make_projection(name, [400], 5, seed, **options)) for seed in (0, 1))
    assert (first - second).norm() > 0.5 * first.norm()


@every
def test_the_global_random_state_is_neither_read_nor_moved(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    first = matrix(make_projection(name, [50], 5, 3, **options))
    assert torch.equal(torch.random.get_rng_state(), torch.manual_seed(0).get_state())
    torch.manual_seed(7)
    assert torch.equal(matrix(make_projection(name, [50], 5, 3, **options)), first)


@every
def test_drawn_again_for_every_product_it_is_the_same(name: str, options: dict[str, Any], small_chunks: None) -> None:
    kept = make_projection(name, [200, 50], 12, 3, **options)
    again = make_projection(name, [200, 50], 12, 3, cache_bytes=0, **options)
    assert torch.equal(matrix(again), matrix(kept))
    g = drawn(250)
    assert torch.equal(again.adjoint(g), kept.adjoint(g))


@every
def test_the_first_columns_of_one_matrix_are_nested(name: str, options: dict[str, Any]) -> None:
    whole = matrix(make_projection(name, [90, 9], 33, 2, columns=33, **options))
    for d in (1, 8, 20):
        part = matrix(make_projection(name, [90, 9], d, 2, columns=33, **options))
        torch.testing.assert_close(part, whole[:, :d])


DRAWN = {
    "uni": [-2.12132034, 0.57735027, 1.41421356],
    "fastfood-blocks": [1.33333333, -2.0, -2.66666667],
    "fastfood": [-2.87501819, -2.23558955, 0.22572721],
    "sparse": [-1.38275179, -0.69475499, -1.9239479],
    "sparse-global": [-2.30940104, 0.5, 2.30940104],
    "dense": [0.55953212, 4.01910077, -1.77873825],
}
"""The first entries of P θ_d for one seed: what was trained before belongs to these numbers. See GENERATOR."""


@pytest.mark.parametrize("name", DRAWN)
def test_what_was_drawn_once_is_drawn_for_ever(name: str) -> None:
    found = make_projection(name, [6, 3], 4, 7).expand(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(found[:3], torch.tensor(DRAWN[name], dtype=torch.float64), atol=1e-6, rtol=0)


# --- norms, orthogonality, rank ---


@pytest.mark.parametrize("name", UNIT_COLUMNS)
@pytest.mark.parametrize(("sizes", "d"), [([300, 20, 1], 40), ([4], 4), ([3, 1, 1], 5)])
def test_columns_have_norm_one(name: str, sizes: list[int], d: int) -> None:
    norms = matrix(make_projection(name, sizes, d, 0)).norm(dim=0)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-7, rtol=0)  # values kept in fp32


@pytest.mark.parametrize(("name", "sizes"), [("fastfood", [1000, 24]), ("fastfood-blocks", [1000, 24])])
@pytest.mark.parametrize("diagonal", ["gaussian", "sign"])
def test_uncut_fastfood_columns_have_norm_one(name: str, sizes: list[int], diagonal: str) -> None:
    norms = matrix(make_projection(name, sizes, 30, 0, diagonal=diagonal)).norm(dim=0)
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("name", ["fastfood", "fastfood-blocks"])
def test_cut_fastfood_columns_have_norm_one_in_expectation(name: str) -> None:
    norms = torch.cat([matrix(make_projection(name, [700], 300, seed)).norm(dim=0) for seed in range(8)])
    assert abs(norms.square().mean() - 1.0) < 0.01
    assert norms.std() < 0.1


def test_columns_of_uni_are_orthonormal_for_any_sizes(small_chunks: None) -> None:
    for D, d, columns in ((100, 7, None), (100, 100, None), (101, 50, None), (99, 20, 64), (5, 1, 1)):
        P = matrix(make_projection("uni", [D], d, 0, columns=columns))
        torch.testing.assert_close(P.T @ P, torch.eye(d, dtype=torch.float64))
        assert int((P != 0).sum(1).max()) == 1


def test_sign_blocks_are_orthonormal_where_they_divide_the_rows(small_chunks: None) -> None:
    P = matrix(make_projection("fastfood-blocks", [32 * 9], 20, 0))
    torch.testing.assert_close(P.T @ P, torch.eye(20, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("name", "options"), [kind for kind in KINDS if "sparse" not in kind[0]])
def test_as_many_columns_as_rows_reach_every_point(name: str, options: dict[str, Any]) -> None:
    P = matrix(make_projection(name, [25, 7], 32, 0, **options))
    assert torch.linalg.matrix_rank(P) == 32


@pytest.mark.parametrize("name", ["fastfood", "fastfood-blocks", "dense"])
def test_more_columns_than_a_tensor_has_entries_all_reach_it(name: str) -> None:
    """The released ports cut θ_d at the padded size of each tensor, so that a bias saw its first entries alone."""
    normal = {} if name == "dense" else {"diagonal": "gaussian"}  # sums of signs may be zero
    P = matrix(make_projection(name, [4, 500], 100, 0, **normal))
    assert (P[:4] != 0).all()


# --- Fastfood against its explicit matrix ---


@pytest.mark.parametrize("diagonal", ["gaussian", "sign"])
@pytest.mark.parametrize("d", [1, 5, 8, 27])
@pytest.mark.parametrize("name", ["fastfood", "fastfood-blocks"])
def test_fastfood_is_the_product_of_its_factors(name: str, d: int, diagonal: str, small_chunks: None) -> None:
    projection = make_projection(name, [20, 7], d, 4, diagonal=diagonal)
    assert isinstance(projection, Fastfood)
    m, D = projection.block, 27
    assert m == (32 if name == "fastfood" else 2 ** math.ceil(math.log2(d)))
    H = hadamard(torch.eye(m, dtype=torch.float64))
    stacked, squares = [], 0.0
    for number, count, _ in projection._chunks():
        B, order, G = projection._draw(number, count)
        for k in range(count):
            permuted = torch.eye(m, dtype=torch.float64)[order[k * m : (k + 1) * m] - k * m]
            b = torch.zeros(m, dtype=torch.float64)
            b[: B.shape[1]] = B[k].double()
            stacked.append(H @ G[k].double().diag() @ permuted @ H @ b.diag())
            squares += float(G[k].double().square().sum())
    P = torch.cat(stacked)[:D, :d] / (math.sqrt(m * squares) * math.sqrt(D / (m * len(stacked))))
    torch.testing.assert_close(matrix(projection), P)


def test_blocks_of_fastfood_differ(small_chunks: None) -> None:
    P = matrix(make_projection("fastfood-blocks", [16 * 16], 16, 0)).view(16, 16, 16)
    assert all(not torch.equal(P[i], P[j]) for i in range(16) for j in range(i))


def test_a_block_is_as_long_as_the_columns_need_however_many_parameters_there_are() -> None:
    projection = make_projection("fastfood-blocks", [10**12], 3, 0)
    assert isinstance(projection, FastfoodBlocks)
    assert projection.block == 4


# --- sparse and dense ---


@pytest.mark.parametrize("name", ["sparse", "sparse-global"])
def test_sparse_densities_are_one_over_the_root_of_the_size(name: str) -> None:
    P = matrix(make_projection(name, [10_000, 100], 200, 0)) != 0
    parts = [(P[:10_000], 0.01), (P[10_000:], 0.1)] if name == "sparse" else [(P, 10_100**-0.5)]
    for part, density in parts:
        expected = part.numel() * density
        assert abs(int(part.sum()) - expected) < 4 * math.sqrt(expected)  # 4 standard deviations


def test_a_tensor_has_its_share_of_a_sparse_column() -> None:
    P = matrix(make_projection("sparse", [9000, 1000], 150, 0))
    share = P[:9000].square().sum(0).mean()
    assert abs(share - 0.9) < 0.02  # about 127 entries a column


def test_signs_of_sparse_entries_are_even() -> None:
    entries = matrix(make_projection("sparse-global", [10_000], 100, 0))
    entries = entries[entries != 0].sign()
    assert abs(float(entries.sum())) < 4 * math.sqrt(len(entries))


def test_columns_of_dense_are_independent_normals() -> None:
    P = matrix(make_projection("dense", [5000], 20, 0)) * math.sqrt(5000)
    overlap = (P.T @ P / 5000 - torch.eye(20)).abs()
    assert overlap.max() < 5 / math.sqrt(5000)
    assert abs(float(P.pow(4).mean()) - 3.0) < 0.1  # a normal's fourth moment


# --- bad input ---


@every
@pytest.mark.parametrize(
    ("sizes", "d", "columns", "message"),
    [
        ([10, 5], 0, None, "d is 0, but must be from 1 to 15"),
        ([10, 5], -3, None, "d is -3"),
        ([10, 5], 16, None, "d is 16, but must be from 1 to 15"),
        ([10, 5], 8, 7, "columns is 7, but must be from d = 8 to 15"),
        ([10, 5], 8, 16, "columns is 16"),
        ([10, 5], 2.0, None, "d is 2.0, but must be a whole number"),
        ([], 1, None, "sizes are"),
        ([3, 0], 1, None, "sizes are"),
    ],
)
def test_values_out_of_range_are_refused(
    name: str, options: dict[str, Any], sizes: list[int], d: Any, columns: int | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make_projection(name, sizes, d, 0, columns=columns, **options)


def test_unknown_names_and_options_are_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown projection 'fastfod'; did you mean fastfood"):
        make_projection("fastfod", [10], 2, 0)
    with pytest.raises(UsageError, match="no option 'diagnal'; did you mean diagonal"):
        make_projection("fastfood", [10], 2, 0, diagnal="sign")
    with pytest.raises(UsageError, match="projection uni has no option 'diagonal'"):
        make_projection("uni", [10], 2, 0, diagonal="sign")
    with pytest.raises(UsageError, match="diagonal is 'gausian', but must be gaussian or sign; did you mean gaussian"):
        make_projection("fastfood-blocks", [10], 2, 0, diagonal="gausian")


def test_a_projection_of_another_generator_is_refused() -> None:
    saved = make_projection("uni", [10], 2, 0).options()
    with pytest.raises(UsageError, match=f"version {GENERATOR + 1} of the generator"):
        make_projection(**{**saved, "generator": GENERATOR + 1})


@pytest.mark.parametrize("length", [5, 15])
def test_a_vector_of_another_length_is_refused(length: int) -> None:
    projection = make_projection("uni", [12], 4, 0)
    with pytest.raises(UsageError, match="d = 4"):
        projection.expand(drawn(length))
    with pytest.raises(UsageError, match="D = 12"):
        projection.adjoint(drawn(length))


@pytest.mark.parametrize("name", ["dense", "sparse", "sparse-global"])
def test_a_matrix_beyond_the_limit_is_refused_before_it_is_drawn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "MATRIX_BYTES", 2**20)
    with pytest.raises(UsageError, match="take uni or fastfood-blocks"):
        make_projection(name, [355_000_000], 1000, 0)


# --- memory ---


@pytest.mark.parametrize("name", ["uni", "fastfood-blocks"])
def test_nothing_is_kept_beyond_the_limit(name: str) -> None:
    for cache_bytes, expected in ((0, 0), (2**30, 1)):
        projection = make_projection(name, [1000], 10, 0, cache_bytes=cache_bytes)
        projection.expand(drawn(10))
        assert isinstance(projection, blocks.Blocks)
        assert len(projection._kept) == expected


@pytest.mark.parametrize("name", ["uni", "fastfood-blocks"])
def test_a_product_of_what_is_drawn_anew_makes_nothing_as_long_as_the_parameters_but_its_result(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor that expand or adjoint makes is counted; all but the result are of one chunk."""
    monkeypatch.setattr(blocks, "CHUNK", 2**13)
    D = 32 * blocks.CHUNK
    projection = make_projection(name, [D], 200, 0, cache_bytes=0)
    for product, x, results in ((projection.expand, torch.ones(200), 1), (projection.adjoint, torch.ones(D), 0)):
        with Storages() as made:
            product(x)
        assert sorted(made.bytes)[::-1][results] <= 2 * 8 * blocks.CHUNK  # int64, a chunk of whole blocks
        assert sum(size >= 4 * D for size in made.bytes) == results


class Storages(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of every new storage that operations return."""

    def __enter__(self) -> Storages:
        self.bytes: list[int] = []
        self._known: set[int] = set()
        self._alive: list[Tensor] = []
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            address = result.untyped_storage().data_ptr()
            if address not in self._known | inputs:
                self._known.add(address)
                self._alive.append(result)  # an address freed meanwhile could be another tensor's
                self.bytes.append(result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("name", PROJECTIONS)
def test_the_largest_d_there_is_room_for_can_be_made_and_no_larger_one(name: str) -> None:
    sizes = [2_000_000, 9_000_000]
    most = most_dimensions(name, sizes)
    assert make_projection(name, sizes, most, 0).d == most  # nothing is drawn before it is used
    with pytest.raises(UsageError, match=r"must be from 1 to|above the limit of 8"):
        make_projection(name, sizes, most + 1, 0)
    assert most == sum(sizes) or name in ("dense", "sparse", "sparse-global")
    assert most_dimensions("dense", sizes) == 8 * 2**30 // (4 * sum(sizes))
    assert most_dimensions(name, [30, 7]) == 37
