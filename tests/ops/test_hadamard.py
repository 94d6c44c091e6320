"""The Walsh-Hadamard transform against its matrix, in every length that is computed another way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.ops import hadamard as module
from trimtab.ops.hadamard import hadamard, hadamard_


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sylvester(length: int) -> Tensor:
    """H[i, j] = (−1)^(number of bits that i and j share)."""
    i = torch.arange(length)
    shared = i[:, None] & i[None, :]
    return torch.tensor([[(-1.0) ** int(entry).bit_count() for entry in row] for row in shared.tolist()]).double()


def butterflies(x: Tensor) -> Tensor:
    h = 1
    while h < x.shape[-1]:
        a, b = x.view(*x.shape[:-1], -1, 2, h).unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2).view(x.shape)
        h *= 2
    return x


@pytest.mark.parametrize("length", [1, 2, 4, 32, 64, 256])
@pytest.mark.parametrize("before", [(), (3,), (2, 1, 3)])
def test_it_is_the_product_with_its_matrix(length: int, before: tuple[int, ...]) -> None:
    x = drawn(*before, length)
    torch.testing.assert_close(hadamard(x), x @ sylvester(length))


@pytest.mark.parametrize("shape", [(2**11,), (2**15,), (3, 2**16), (2**19,), (2**21,), (600, 2**10)])
def test_long_and_many_are_done_in_blocks(shape: tuple[int, ...]) -> None:
    x = drawn(*shape)
    torch.testing.assert_close(hadamard(x), butterflies(x))


def test_lengths_within_and_across_blocks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn(3, 2**10)
    whole = hadamard(x)
    monkeypatch.setattr(module, "INNER", 8)
    monkeypatch.setattr(module, "BLOCK", 64)
    torch.testing.assert_close(hadamard(x), whole)


def test_twice_is_the_length_times_the_input_which_is_left_alone() -> None:
    x = drawn(5, 512)
    before = x.clone()
    torch.testing.assert_close(hadamard(hadamard(x)), 512 * x)
    assert torch.equal(x, before)


def test_in_place_it_is_the_same() -> None:
    x = drawn(5, 64)
    expected = hadamard(x)
    assert hadamard_(x) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("strided", ["transposed", "every second"])
def test_strided_inputs_are_read_as_they_are(strided: str) -> None:
    x = drawn(16, 8).T if strided == "transposed" else drawn(4, 32)[:, ::2]
    torch.testing.assert_close(hadamard(x), butterflies(x.contiguous()))


def test_gradients_are_exact_to_the_second_order() -> None:
    x = drawn(2, 16).requires_grad_()
    assert torch.autograd.gradcheck(hadamard, (x,))
    assert torch.autograd.gradgradcheck(lambda x: hadamard(x).pow(3), (x,))


def test_vmap_and_grad_of_torch_func_go_through() -> None:
    x = drawn(3, 16)
    torch.testing.assert_close(torch.func.vmap(hadamard)(x), hadamard(x))
    torch.testing.assert_close(torch.func.vmap(hadamard, in_dims=1)(x.T), hadamard(x))
    slopes = torch.func.vmap(torch.func.grad(lambda row: hadamard(row).pow(3).sum()))(x)
    torch.testing.assert_close(slopes, 3 * hadamard(hadamard(x).square()))


def test_bf16_is_rounded_once() -> None:
    x = drawn(4, 1024, dtype=torch.bfloat16)
    y = hadamard(x)
    assert torch.equal(y, hadamard(x.double()).to(torch.bfloat16))


def test_autocast_does_not_round_it() -> None:
    x = drawn(2, 64, dtype=torch.float32)
    expected = hadamard(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hadamard(x), expected)


def test_a_length_that_is_no_power_of_two_is_refused() -> None:
    for transform in (hadamard, hadamard_):
        with pytest.raises(AssertionError, match="power of two"):
            transform(drawn(2, 48))
