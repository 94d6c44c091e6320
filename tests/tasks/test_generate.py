from __future__ import annotations

import contextlib

import pytest
import torch

from trimtab.errors import UsageError
from trimtab.tasks.generate import encode, end_tokens, generate

PROMPTS = ["the cat", "in", [{"role": "user", "content": "a question of some length"}], "the end of the", "x"]


def greedy_by_hand(model, tokenizer, prompt, count):
    ids = encode(tokenizer, prompt)
    ends = end_tokens(model, tokenizer)
    new = []
    for _ in range(count):
        with torch.no_grad():
            token = model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax().item()
        if token in ends:
            break
        new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_batches_give_the_answers_of_one_prompt_at_a_time_in_order(architecture, batch_size, tokenizer, request):
    model = request.getfixturevalue(architecture).eval()
    expected = [greedy_by_hand(model, tokenizer, prompt, 6) for prompt in PROMPTS]
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=batch_size) == expected
    assert len(set(expected)) > 1


def test_an_answer_stops_at_the_templates_end_of_turn(llama, tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end_tokens(llama, tokenizer) == sorted([tokenizer.eos_token_id, end])
    llama.eval()
    with torch.no_grad():
        llama.model.norm.weight.mul_(0)  # all logits are equal: the first token of all, which is the end token
    assert generate(llama, tokenizer, ["the", "in the"], max_new_tokens=5) == ["", ""]


def test_the_models_own_sampling_settings_do_not_leak_into_greedy_answers(llama, tokenizer):
    plain = generate(llama, tokenizer, PROMPTS, max_new_tokens=6)
    llama.generation_config.repetition_penalty = 5.0
    llama.generation_config.do_sample = True
    assert generate(llama, tokenizer, PROMPTS, max_new_tokens=6) == plain


def test_sampling_is_settled_by_its_seed_and_leaves_the_global_state(llama, tokenizer):
    def sample(seed):
        return generate(llama, tokenizer, PROMPTS, max_new_tokens=8, temperature=1.5, seed=seed)

    state = torch.get_rng_state()
    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_neither_model_nor_tokenizer_is_changed(llama, tokenizer):
    llama.train()
    llama.model.layers[1].eval()
    llama.config.use_cache = False
    modes = [module.training for module in llama.modules()]
    before = (tokenizer.padding_side, tokenizer.pad_token, llama.generation_config.to_dict())
    generate(llama, tokenizer, PROMPTS, max_new_tokens=3)
    assert [module.training for module in llama.modules()] == modes
    assert (tokenizer.padding_side, tokenizer.pad_token, llama.generation_config.to_dict()) == before
    assert llama.config.use_cache is False


def test_each_batch_runs_within_the_context_for_its_prompts(llama, tokenizer):
    batches = []

    @contextlib.contextmanager
    def around(indices):
        batches.append(indices)
        yield

    generate(llama, tokenizer, PROMPTS, max_new_tokens=1, batch_size=2, around=around)
    assert sorted(index for batch in batches for index in batch) == [0, 1, 2, 3, 4]
    assert batches[0][0] == 2  # the longest prompt first


def test_progress_counts_prompts(llama, tokenizer):
    seen = []

    def progress(done, total):
        seen.append((done, total))

    generate(llama, tokenizer, PROMPTS, max_new_tokens=1, batch_size=2, progress=progress)
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_progress_goes_on_within_a_batch(llama, tokenizer):
    seen = []
    generate(llama, tokenizer, PROMPTS, max_new_tokens=4, batch_size=5, progress=lambda done, _: seen.append(done))
    assert seen == [1.25, 2.5, 3.75, 5]


def test_an_encoder_decoder_answers_too(tokenizer):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=1
    )
    model = T5ForConditionalGeneration(config).eval()
    together = generate(model, tokenizer, ["the cat", "in"], max_new_tokens=5)
    assert together == [generate(model, tokenizer, [text], max_new_tokens=5)[0] for text in ["the cat", "in"]]


def test_no_prompts_give_no_answers(llama, tokenizer):
    assert generate(llama, tokenizer, [], max_new_tokens=3) == []


def test_an_empty_prompt_is_refused(llama, tokenizer):
    with pytest.raises(UsageError, match="empty"):
        generate(llama, tokenizer, ["the", ""], max_new_tokens=3)


def test_a_prompt_without_room_for_its_answer_is_refused(llama, tokenizer):
    with pytest.raises(UsageError, match="prompt 2 has 250 tokens"):
        generate(llama, tokenizer, ["the", "x" * 250], max_new_tokens=7)


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"batch_size": 0}, {"temperature": -1.0}])
def test_impossible_settings_are_refused(options, llama, tokenizer):
    with pytest.raises(UsageError):
        generate(llama, tokenizer, ["the"], **{"max_new_tokens": 1, **options})


def test_a_chat_without_a_template_is_refused(llama, tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        generate(llama, bare, [[{"role": "user", "content": "a"}]], max_new_tokens=1)
