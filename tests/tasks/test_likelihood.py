from __future__ import annotations

import pytest
import torch

from trimtab.errors import UsageError
from trimtab.tasks.knowledge import Question, questions
from trimtab.tasks.likelihood import choice_scores, prompt_of


def asked():
    """Prompts and choices of several lengths, one that differs by a single token, one with two choices."""
    return [
        *questions()[:6],
        Question("Which letter?", ("a", "b", "c", "d"), 2, "letters"),
        Question("Yes or no?", ("yes, certainly", "no"), 1, "letters"),
    ]


def by_hand(model, tokenizer, question):
    """Log-likelihood per byte of each choice, from one full forward pass a choice."""
    scores = []
    start = len(tokenizer(prompt_of(question))["input_ids"])
    for choice in question.choices:
        ids = torch.tensor([tokenizer(f"{prompt_of(question)} {choice}")["input_ids"]])
        logs = model(input_ids=ids).logits.float().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        scores.append(logs[start - 1 :].sum().item() / len(f" {choice}".encode()))
    return scores


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_scores_are_those_of_full_forward_passes(architecture, batch_size, tokenizer, request):
    model = request.getfixturevalue(architecture).eval()
    result = choice_scores(model, tokenizer, asked(), batch_size=batch_size)
    for question, scores in zip(asked(), result.scores, strict=True):
        with torch.no_grad():
            expected = by_hand(model, tokenizer, question)
        # Choices may begin alike; what they share adds the same to each of them before dividing, so compare the
        # unnormalised differences instead of the values.
        sizes = [len(f" {choice}".encode()) for choice in question.choices]
        ours = [s * n for s, n in zip(scores, sizes, strict=True)]
        theirs = [s * n for s, n in zip(expected, sizes, strict=True)]
        shift = theirs[0] - ours[0]
        assert [o + shift for o in ours] == pytest.approx(theirs, abs=1e-3)


def test_picks_follow_the_scores_and_accuracy_the_picks(llama, tokenizer):
    result = choice_scores(llama, tokenizer, asked())
    for question, scores, pick, correct in zip(asked(), result.scores, result.picks, result.correct, strict=True):
        assert scores[pick] == max(scores)
        assert correct == (pick == question.answer)
    assert result.accuracy == pytest.approx(sum(result.correct) / len(asked()))
    assert result.interval.low <= result.accuracy <= result.interval.high
    assert result.chance == pytest.approx((7 * 0.25 + 0.5) / 8)


def test_a_model_that_keeps_no_cache_gets_the_same_scores(llama, tokenizer):
    kept = choice_scores(llama, tokenizer, asked())
    forward = llama.forward

    def without_cache(*args, **kwargs):
        output = forward(*args, **{**kwargs, "use_cache": False})
        output.past_key_values = None
        return output

    llama.forward = without_cache
    again = choice_scores(llama, tokenizer, asked())
    for one, other in zip(kept.scores, again.scores, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_what_choices_share_is_computed_once(llama, tokenizer):
    seen = []
    hook = llama.get_input_embeddings().register_forward_hook(lambda module, given, out: seen.append(given[0].numel()))
    try:
        one = Question("Which of the two is it, when all is said and done?", ("this", "that"), 0, "words")
        choice_scores(llama, tokenizer, [one])
        apart = [len(tokenizer(f"{prompt_of(one)} {choice}")["input_ids"]) for choice in one.choices]
    finally:
        hook.remove()
    assert seen[-1] < 0.7 * sum(apart)


def test_training_modes_are_as_before(llama, tokenizer):
    llama.train()
    llama.model.layers[0].eval()
    before = [module.training for module in llama.modules()]
    choice_scores(llama, tokenizer, asked())
    assert [module.training for module in llama.modules()] == before


def test_progress_ends_at_the_number_of_questions(llama, tokenizer):
    seen = []
    choice_scores(llama, tokenizer, asked(), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (8, 8)
    assert seen == sorted(seen)


def test_no_questions_are_refused(llama, tokenizer):
    with pytest.raises(UsageError, match="no questions"):
        choice_scores(llama, tokenizer, [])
