from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trimtab.data.batch import IGNORED, Batch, batches, pad
from trimtab.data.encode import Example
from trimtab.data.pack import pack, pack_shared
from trimtab.errors import UsageError


def examples(count: int, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    made = []
    for number in range(1, count + 1):
        length = rng.randint(1, 12)
        ids = [rng.randint(1, 30) for _ in range(length)]
        made.append(Example(ids, [rng.random() < 0.6 for _ in range(length)], number, 0, False))
    return made


def expected_counts(some: list[Example]) -> tuple[int, int]:
    return sum(len(e.input_ids) for e in some), sum(sum(e.supervised[1:]) for e in some)


def test_padding_is_on_the_right_and_positions_are_left_to_the_model() -> None:
    batch = pad([Example([5, 6], [True, True], 3, 0, False), Example([7, 8, 9], [False, True, False], 4, 0, False)], 0)
    assert batch.input_ids.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.position_ids is None
    assert batch.labels.tolist() == [[IGNORED, 6, IGNORED], [IGNORED, 8, IGNORED]]
    assert (batch.examples, batch.real_tokens, batch.supervised_tokens) == ((3, 4), 5, 2)


def test_packing_restarts_positions_and_never_predicts_a_first_token() -> None:
    batch = pack([Example([5, 6], [True, True], 3, 0, False), Example([7, 8, 9], [True, False, True], 4, 0, False)], 0)
    assert batch.input_ids.tolist() == [[5, 7, 8]]  # nothing reads a last token
    assert batch.position_ids.tolist() == [[0, 0, 1]]
    assert (batch.predictors.tolist(), batch.targets.tolist()) == ([0, 2], [6, 9])
    assert batch.attention_mask is None
    assert (batch.examples, batch.real_tokens, batch.supervised_tokens) == ((3, 4), 5, 2)


def test_what_follows_the_last_predictor_is_left_out() -> None:
    asked = Example([5, 6, 7, 8], [False, True, False, False], 1, 0, False)
    assert pack([asked]).input_ids.tolist() == [[5]]
    assert pack([dataclasses.replace(asked, supervised=[True, False, False, False])]).input_ids.tolist() == [[5]]


@pytest.mark.parametrize("build", [pad, pack, pack_shared])
def test_counts_are_those_of_the_terms(build: Callable[..., Batch]) -> None:
    some = examples(20)
    batch = build(some, 0)
    assert (batch.real_tokens, batch.supervised_tokens) == expected_counts(some)
    assert batch.weights.sum() == batch.supervised_tokens
    tensors = (batch.input_ids, batch.position_ids, batch.predictors, batch.targets)
    assert {tensor.dtype for tensor in tensors if tensor is not None} == {torch.int64}


def test_labels_of_a_padded_batch_are_its_terms() -> None:
    batch = pad(examples(20), 0)
    assert int((batch.labels != IGNORED).sum()) == batch.supervised_tokens
    assert torch.equal(batch.labels.flatten()[batch.predictors + 1], batch.targets)


@pytest.mark.parametrize("build", [pad, pack])
def test_a_batch_moves_whole(build: Callable[..., Batch]) -> None:
    batch = build(examples(3), 0)
    moved = batch.to("meta")
    tensors = [value for field in dataclasses.fields(Batch) if isinstance(value := getattr(moved, field.name), Tensor)]
    assert {tensor.device.type for tensor in [*tensors, *([moved.tree.end] if moved.tree else [])]} == {"meta"}
    assert (moved.attention_mask is None) == (batch.attention_mask is None)
    assert moved.supervised_tokens == batch.supervised_tokens


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError):
        pad([], 0)
    with pytest.raises(UsageError):
        pack([], 0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padded_and_packed_give_the_separate_examples_loss(attention: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).eval()
    some = examples(5, seed=2)

    def loss(batch: Batch) -> float:
        with torch.no_grad():
            logits = model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            ).logits
        chosen = logits.flatten(0, 1)[batch.predictors]
        return (torch.nn.functional.cross_entropy(chosen, batch.targets, reduction="none") * batch.weights).sum().item()

    separate = sum(loss(pad([example], 0)) for example in some)
    # float32 sums of about a dozen terms; what leaks between examples must show far above their rounding.
    packed = pack(some, 0)
    leaking = dataclasses.replace(packed, position_ids=torch.arange(packed.input_ids.numel())[None])
    assert loss(pad(some, 0)) == pytest.approx(separate, rel=1e-5)
    assert loss(packed) == pytest.approx(separate, rel=1e-5)
    assert loss(leaking) != pytest.approx(separate, rel=1e-2)


@given(
    st.lists(st.integers(1, 500), max_size=300),
    st.integers(1, 9),
    st.integers(0, 2**31),
    st.integers(0, 5),
)
def test_every_example_stands_in_exactly_one_batch(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    made = batches(lengths, size, seed=seed, epoch=epoch)
    assert sorted(index for batch in made for index in batch) == list(range(len(lengths)))
    assert sorted(map(len, made), reverse=True)[:-1] == [size] * (len(made) - 1)
    assert made == batches(lengths, size, seed=seed, epoch=epoch)


def test_epochs_and_seeds_differ_in_order() -> None:
    lengths = [random.Random(0).randint(1, 99) for _ in range(64)]
    orders = {str(batches(lengths, 4, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_batches_of_similar_lengths_need_less_padding_than_a_plain_shuffle() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(10, 400) for _ in range(1000)]

    def padded(made: list[list[int]]) -> int:
        return sum(max(lengths[i] for i in batch) * len(batch) for batch in made)

    order = list(range(1000))
    rng.shuffle(order)
    plain = padded([order[start : start + 8] for start in range(0, 1000, 8)])
    # A plain shuffle pads these by about three quarters; grouped, by under a fifth.
    assert padded(batches(lengths, 8, seed=0, epoch=0)) < 1.2 * sum(lengths) < plain


def test_short_and_long_batches_come_in_no_order() -> None:
    lengths = list(range(64))
    longest = [max(batch) for batch in batches(lengths, 4, seed=0, epoch=0)]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_a_batch_size_of_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="batch_size is 0"):
        batches([1, 2], 0, seed=0, epoch=0)
