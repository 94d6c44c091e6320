"""Which packing a model gets, and that a tree gives what separate sequences give, on several architectures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trimtab
from tiny_training import VOCABULARY, make_examples, make_llama
from trimtab.data.encode import Example
from trimtab.data.pack import pack, pack_shared
from trimtab.errors import UsageError
from trimtab.models.attention import NAME, attending_by_tree, seeing, why_no_tree
from trimtab.models.readout import readout_of
from trimtab.ops import products
from trimtab.train.loss import causal_loss
from trimtab.train.packing import PAD, dropout_of, leaks, packing_for
from trimtab.train.plan import micro_batches
from trimtab.train.settings import Settings

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
}


def made(name: str, **options):
    import transformers as t

    kinds = {
        "llama": (t.LlamaForCausalLM, t.LlamaConfig, {"num_key_value_heads": 2}),
        "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config, {"num_key_value_heads": 2}),  # biases on q, k and v
        "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config, {"num_key_value_heads": 1, "head_dim": 8}),
        "gemma2": (t.Gemma2ForCausalLM, t.Gemma2Config, {"num_key_value_heads": 2, "head_dim": 4}),  # soft caps
        "cohere": (t.CohereForCausalLM, t.CohereConfig, {"num_key_value_heads": 2}),  # scaled logits
        "gpt2": (t.GPT2LMHeadModel, t.GPT2Config, {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}),
        "mistral": (t.MistralForCausalLM, t.MistralConfig, {"num_key_value_heads": 2, "sliding_window": 5}),
        "bloom": (t.BloomForCausalLM, t.BloomConfig, {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
        "mamba": (t.MambaForCausalLM, t.MambaConfig, {}),
        "rwkv": (t.RwkvForCausalLM, t.RwkvConfig, {"attention_hidden_size": 16}),
        "doge": (t.DogeForCausalLM, t.DogeConfig, {"num_key_value_heads": 2, "keep_window_size": 8}),
        "opt": (t.OPTForCausalLM, t.OPTConfig, {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    }
    cls, config, own = kinds[name]
    torch.manual_seed(0)
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return cls(config(**{**SIZES, **tokens, **own, **options})).eval()


def adapted(model, targets="all-linear", **options):
    adapter = trimtab.attach(model, trimtab.LoRA(rank=2, alpha=4, **options), targets=targets)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


def relatives() -> list[Example]:
    """Examples that share prefixes, one a prefix of another, two the same but for what is supervised."""
    rows = [
        [1, 2, 3, 4, 5],
        [1, 2, 3, 4, 5],
        [1, 2, 3],
        [1, 2, 3, 9, 9, 9],
        [1, 2, 8, 8],
        [7, 2, 3, 4],
        [1, 2, 3, 4, 6],
    ]
    return [
        Example(ids, [(i + row) % 3 > 0 for i in range(len(ids))], row + 1, 0, False) for row, ids in enumerate(rows)
    ]


def gradients(adapter, examples, name: str, together: bool):
    """(loss, gradient) of the examples' sum, in one batch or one by one."""
    packing = packing_for(adapter, name, examples)
    size = len(examples) if together else 1
    parts = micro_batches(examples, range(len(examples)), Settings(batch_size=len(examples), micro_batch=size), packing)
    with packing.on(adapter.model):
        losses = [causal_loss(adapter.model, part) for part in parts]
        each = [torch.autograd.grad(loss, adapter.parameters()) for loss in losses]
    flat = sum(torch.cat([g.flatten() for g in found]) for found in each)
    return sum(loss.item() for loss in losses), flat


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "cohere", "gpt2"])
@pytest.mark.parametrize("packing", ["tree", "pack"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_gradients_are_those_of_separate_examples(name: str, packing: str, dtype: torch.dtype) -> None:
    adapter = adapted(made(name).to(dtype))
    adapter.model.to(dtype)
    loss, gradient = gradients(adapter, relatives(), packing, together=True)
    true_loss, true_gradient = gradients(adapter, relatives(), "pad", together=False)
    assert loss == pytest.approx(true_loss, rel=1e-6)
    assert (gradient - true_gradient).norm() < 1e-5 * true_gradient.norm()


@pytest.mark.parametrize("known", [set(), {torch.bfloat16}], ids=["wide products", "own products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tree_differs_by_rounding_alone(dtype: torch.dtype, known: set[torch.dtype], monkeypatch) -> None:
    monkeypatch.setattr(products, "COMPUTED_ON_CPU", known)
    adapter = adapted(made("llama").to(dtype))
    loss, gradient = gradients(adapter, relatives(), "tree", together=True)
    true_loss, true_gradient = gradients(adapter, relatives(), "pad", together=False)
    loss_off, gradient_off = abs(loss / true_loss - 1), (gradient - true_gradient).norm() / true_gradient.norm()
    allowed = (1e-5, 1e-5) if dtype == torch.float32 else (1e-2, 5e-2)  # bf16 keeps 8 bits; seen: 0.1 % and 1 to 2 %
    assert loss_off < allowed[0]
    assert gradient_off < allowed[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_a_model_is_tried_in_its_own_dtype(name: str, dtype: torch.dtype) -> None:
    model = made(name).to(dtype)
    assert why_no_tree(model, 10) is None
    model = made(name).to(dtype)
    own = model.forward

    def by_row(*args, position_ids=None, **inputs):
        return own(*args, **inputs)

    model.forward = by_row
    assert "other logits for a tree" in (why_no_tree(model, 10) or "")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(1, 3), min_size=2, max_size=8), min_size=1, max_size=8), st.randoms())
def test_random_trees_in_any_order_give_the_separate_loss_and_gradient(rows, random) -> None:
    examples = [
        Example(ids, [random.random() < 0.7 for _ in ids[1:]] + [True], row, 0, False) for row, ids in enumerate(rows)
    ]
    adapter = adapted(make_llama())
    alone, true_gradient = gradients(adapter, examples, "pad", together=False)
    whole, gradient = gradients(adapter, examples, "tree", together=True)
    random.shuffle(examples)
    again, _ = gradients(adapter, examples, "tree", together=True)
    assert whole == pytest.approx(again, rel=1e-6)  # equal terms may be added up in another order
    assert whole == pytest.approx(alone, rel=1e-5)
    assert (gradient - true_gradient).norm() <= 1e-5 * true_gradient.norm()


def test_a_tree_of_one_example_is_that_example() -> None:
    example = make_examples(1)[0]
    tree, row = pack_shared([example]), pack([example])
    assert torch.equal(tree.input_ids, row.input_ids)
    assert torch.equal(tree.position_ids, row.position_ids)
    assert torch.equal(tree.predictors, row.predictors)
    read = len(example.input_ids) - 1  # its last token predicts nothing
    assert tree.tree.segments == ((0, read, read),)


def test_no_token_sees_another_branch() -> None:
    model = made("llama")
    rows = [[1, 2, 3, 4, 1], [1, 2, 5, 6, 1], [1, 2, 5, 7, 1]]
    batch = pack_shared([Example(ids, [True] * 5, 1, 0, False) for ids in rows])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    other = batch.input_ids.clone()
    other[0, 2:4] = torch.tensor([11, 12])  # another first branch
    with torch.no_grad(), attending_by_tree(model), seeing(batch.tree):
        before, after = (model(ids, position_ids=batch.position_ids).logits[0] for ids in (batch.input_ids, other))
    assert torch.equal(before[[0, 1, 4, 5, 6]], after[[0, 1, 4, 5, 6]])
    assert not torch.equal(before[2:4], after[2:4])


def test_each_distinct_prefix_stands_once_and_counts_for_all() -> None:
    batch = pack_shared(relatives())
    prefixes = {tuple(e.input_ids[: i + 1]) for e in relatives() for i in range(len(e.input_ids) - 1)}
    assert batch.input_ids.numel() == len(prefixes)
    assert batch.real_tokens == sum(len(e.input_ids) for e in relatives())
    assert batch.weights.sum() == batch.supervised_tokens == sum(sum(e.supervised[1:]) for e in relatives())
    assert len(batch.targets) < batch.supervised_tokens


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_auto_takes_the_tree_where_it_is_exact(name: str) -> None:
    assert packing_for(adapted(made(name)), "auto", make_examples()).name == "tree"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mistral", "attends within a window of 5 tokens, and the longest example has 13"),
        ("bloom", "does not use transformers' attention interface"),
        ("mamba", "has layers of linear_attention"),
    ],
)
def test_a_tree_is_refused_with_the_reason_where_it_would_not_be_exact(name: str, why: str) -> None:
    adapter = adapted(made(name), "in_proj" if name == "mamba" else "all-linear")
    with pytest.raises(UsageError, match=why):
        packing_for(adapter, "tree", make_examples())
    auto = packing_for(adapter, "auto", make_examples())
    assert auto.name == ("pack" if name == "mistral" else "pad")
    assert why in auto.reason


def test_a_window_wider_than_every_example_is_no_obstacle() -> None:
    adapter = adapted(made("mistral", sliding_window=64))
    assert packing_for(adapter, "tree", make_examples()).shares


def test_a_sliding_window_packs_without_sharing_exactly() -> None:
    adapter = adapted(made("mistral"))
    loss, gradient = gradients(adapter, make_examples(), "auto", together=True)
    true_loss, true_gradient = gradients(adapter, make_examples(), "pad", together=False)
    assert loss == pytest.approx(true_loss, rel=1e-5)
    assert (gradient - true_gradient).norm() < 1e-5 * true_gradient.norm()


def test_with_dropout_sharing_is_the_users_choice() -> None:
    adapter = adapted(made("llama"), dropout=0.1)
    auto = packing_for(adapter, "auto", make_examples())
    assert (auto.name, auto.shares) == ("pack", False)
    assert "dropout 0.1" in auto.reason
    assert auto.build_eval is pack_shared
    assert packing_for(adapter, "tree", make_examples()).shares


@pytest.mark.parametrize("options", [{"attention_dropout": 0.1}, {"resid_pdrop": 0.1}])
def test_the_models_own_dropout_counts(options) -> None:
    model = made("llama", **options) if "attention_dropout" in options else made("gpt2", **options)
    assert not packing_for(adapted(model), "auto", make_examples()).shares


def test_a_loss_of_ones_own_reads_padded_batches() -> None:
    def own(model, batch):
        raise AssertionError

    adapter = adapted(made("llama"))
    assert packing_for(adapter, "auto", make_examples(), own).build is PAD.build
    with pytest.raises(UsageError, match="another loss takes 'pad'"):
        packing_for(adapter, "tree", make_examples(), own)


def test_the_models_attention_comes_back() -> None:
    model = made("llama")
    before = model.config._attn_implementation
    with attending_by_tree(model):
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before


def test_a_model_attending_by_tree_still_takes_padded_batches() -> None:
    model, examples = made("llama"), make_examples()
    batch = PAD.build(examples, 0)
    with torch.no_grad():
        before = causal_loss(model, batch)
        with attending_by_tree(model):
            assert causal_loss(model, batch) == pytest.approx(before.item(), rel=1e-6)


def by_length(kind: str):
    if kind == "dynamic":
        return made("llama", max_position_embeddings=8, rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    factors = {"short_factor": [1.0, 1.0], "long_factor": [3.0, 4.0]}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 8, **factors}
    return made("llama", rope_parameters=rope)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_depend_on_the_rows_length_are_neither_packed_nor_padded_unsaid(kind: str, caplog) -> None:
    adapter, examples = adapted(by_length(kind)), make_examples()
    short = [example for example in examples if len(example.input_ids) <= 8]
    assert packing_for(adapter, "auto", short).name == "tree"
    assert packing_for(adapter, "auto", examples).name == "pad"
    assert "with micro_batch 1 no example is padded" in caplog.text
    for name in ("tree", "pack"):
        with pytest.raises(UsageError, match="rotates by other angles in rows of more than 8 tokens"):
            packing_for(adapter, name, examples)
    together, alone = (gradients(adapter, examples, "pad", together=whole)[0] for whole in (True, False))
    assert together != pytest.approx(alone, rel=1e-4)  # were it the same, nothing would have to be said


@pytest.mark.parametrize(("name", "exact"), [("llama", True), ("bloom", True), ("mamba", True), ("doge", False)])
def test_a_model_that_sees_padding_is_known(name: str, exact: bool, caplog) -> None:
    packing_for(adapted(made(name), "in_proj" if name == "mamba" else "all-linear"), "pad", make_examples(longest=40))
    assert ("does not compute an example in a padded batch" in caplog.text) == (not exact)


def test_a_model_attending_by_tree_is_itself_without_one() -> None:
    model = made("gemma2")  # soft caps, which torch's own attention does not take
    adapter, ids, found = adapted(model), torch.tensor([[3, 4, 5]]), []
    trimtab.fit(
        adapter,
        make_examples(),
        Settings(batch_size=4, max_steps=1, packing="tree"),
        on_step=lambda _report: found.append(model(ids).logits.detach()),
    )
    torch.testing.assert_close(found[0], model(ids).logits.detach())
    assert readout_of(model) is not None


def test_models_that_cannot_tell_packed_examples_apart_are_known() -> None:
    assert [leaks(made(name)) for name in ("llama", "gpt2", "bloom")] == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trace_of_the_example_before_is_a_leak(dtype: torch.dtype) -> None:
    model = made("mistral", sliding_window=None).to(dtype)
    assert not leaks(model)
    own = model.model.forward

    def forward(*given, **named):
        out = own(*given, **named)
        out.last_hidden_state = out.last_hidden_state + 0.01 * out.last_hidden_state[:, :1]
        return out

    model.model.forward = forward
    assert leaks(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_mixes_tokens_without_attention_gets_no_tree(dtype: torch.dtype) -> None:
    import transformers as t

    torch.manual_seed(0)
    config = t.xLSTMConfig(vocab_size=VOCABULARY, hidden_size=32, num_heads=2, num_blocks=2)
    why = why_no_tree(t.xLSTMForCausalLM(config).eval().to(dtype), 8)  # in few bits its logits hardly differ
    assert "xLSTMForCausalLM attends in 0 of" in str(why)


def test_attention_that_takes_more_than_a_tree_serves_is_named() -> None:
    import transformers as t

    sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    config = t.GptOssConfig(**sizes, layer_types=["full_attention"] * 2, sliding_window=64, pad_token_id=0)
    assert "s_aux, which prefix trees do not serve" in str(why_no_tree(t.GptOssForCausalLM(config).eval(), 8))


def test_a_model_that_can_only_up_to_a_length_is_known_by_the_longest_example() -> None:
    model = made("doge")
    assert [leaks(model, longest) for longest in (4, 24)] == [False, True]


@pytest.mark.parametrize("name", ["rwkv", "mamba"])
def test_a_recurrent_model_in_padded_batches_computes_each_example_as_alone(name: str) -> None:
    model, examples = made(name), make_examples()
    with torch.no_grad():
        together = causal_loss(model, PAD.build(examples, 0)).item()
        alone = sum(causal_loss(model, PAD.build([example], 0)).item() for example in examples)
    assert together == pytest.approx(alone, rel=1e-5)


def test_dropout_that_no_module_holds_is_seen() -> None:
    adapter = trimtab.attach(made("opt"), trimtab.LoRA(rank=2))
    assert dropout_of(adapter) == 0.1
    assert "dropout 0.1" in packing_for(adapter, "auto", make_examples()).reason


def test_the_attention_of_every_part_of_a_model_is_put_back() -> None:
    import transformers as t

    text = t.LlamaConfig(**{**SIZES, "num_key_value_heads": 2})
    vision = t.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    kinds = {"text_config": "sdpa", "vision_config": "eager"}
    config = t.LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    model = t.LlavaForConditionalGeneration._from_config(config, attn_implementation=kinds)
    with attending_by_tree(model):
        assert model.config.text_config._attn_implementation == NAME
    assert {key: getattr(model.config, key)._attn_implementation for key in kinds} == kinds


@pytest.mark.parametrize("checkpointing", [True, False])
def test_trees_train_through_the_loop(tmp_path, checkpointing: bool) -> None:
    states = []
    for name in ("tree", "pad"):
        adapter = adapted(made("llama"))
        options = Settings(batch_size=4, lr=1e-2, packing=name, shuffle=False, gradient_checkpointing=checkpointing)
        trimtab.fit(adapter, relatives(), options, eval_examples=make_examples(3))
        states.append(torch.cat([p.detach().flatten() for p in adapter.parameters()]))
    assert (states[0] - states[1]).norm() < 1e-4 * states[1].norm()
