"""Answers to many prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import UsageError
from trimtab.quiet import quiet
from trimtab.tasks.evaluating import device_of, evaluating

Turn = Mapping[str, str]
Prompt = str | Sequence[Turn]


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    progress: Callable[[float, int], None] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    around: Callable[[list[int]], AbstractContextManager[Any]] | None = None,
) -> list[str]:
    """The model's answer to each prompt, in the order of the prompts, without special tokens.

    A prompt is plain text, or a chat as a list of {"role", "content"} turns that goes through the tokenizer's chat
    template. An answer ends at max_new_tokens, at the end token, or at the template's end of turn.
    temperature: 0 takes the likeliest token each time; above 0, tokens are sampled from the whole distribution at that
    temperature, and `seed` and batch_size settle the outcome without touching the global random state.
    around: called with the indices of each batch's prompts, row by row; the batch is generated within the context it
    returns. With it each row can have its own adapter.
    progress(done, total) counts prompts; those of a batch under way count by the share of max_new_tokens they have.
    Neither model nor tokenizer is changed. Raises UsageError for an empty prompt, one that leaves no room for
    max_new_tokens, and a chat without a chat template.
    """
    if max_new_tokens < 1 or batch_size < 1 or not temperature >= 0:
        raise UsageError(
            f"max_new_tokens and batch_size must be at least 1 and temperature at least 0, but they are "
            f"{max_new_tokens}, {batch_size} and {temperature}"
        )
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    _check_lengths(model, ids, max_new_tokens)
    settings = _settings(model, tokenizer, max_new_tokens, temperature)
    device = device_of(model)
    # The longest first: rows of a batch are alike in length, and a batch that is too large fails at once.
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    answers = [""] * len(ids)

    def tell(before: int, size: int, share: float) -> None:
        if progress is not None:
            progress(before + share * size, len(order))

    with evaluating(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            with around(batch) if around is not None else nullcontext():
                new = _batch(model, [ids[i] for i in batch], settings, partial(tell, start, len(batch)))
            for index, answer in zip(batch, new, strict=True):
                answers[index] = tokenizer.decode(answer, skip_special_tokens=True)
            tell(start, len(batch), 1.0)
    return answers


def encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The token ids of a prompt; a chat ends where the assistant's turn begins. UsageError when there are none."""
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
    else:
        _need_template(tokenizer)
        text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise UsageError("a prompt is empty; give at least one token to continue")
    return ids


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the model's and tokenizer's end tokens, and the chat template's end of turn."""
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = set(declared if isinstance(declared, list) else [declared]) | {tokenizer.eos_token_id}
    if getattr(tokenizer, "chat_template", None):
        answer = "ANSWER"
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
        tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(answer)[2]
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
        ends.add(next((i for i in ids if i in special), None))
    return sorted(end for end in ends if end is not None)


def _need_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("the tokenizer has no chat template, so a chat cannot be written out; give plain text instead")


def _check_lengths(model: Any, ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for index, row in enumerate(ids):
        if isinstance(limit, int) and limit > 0 and len(row) + max_new_tokens > limit:
            raise UsageError(
                f"prompt {index + 1} has {len(row)} tokens, which with max_new_tokens {max_new_tokens} goes beyond "
                f"the model's {limit}; shorten it or lower max_new_tokens"
            )


def _settings(model: Any, tokenizer: Any, max_new_tokens: int, temperature: float) -> Any:
    from transformers import GenerationConfig

    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    # Each is given, because what is left out here transformers takes from the model's own generation config.
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        num_beams=1,
        use_cache=True,
        **sampling,
    )


def _batch(model: Any, rows: Sequence[Sequence[int]], settings: Any, tell: Callable[[float], None]) -> list[list[int]]:
    """The new token ids of each row, up to and without its end token. tell: hears which share of the tokens is made."""
    from transformers import StoppingCriteriaList

    device = device_of(model)
    longest = max(len(row) for row in rows)
    # Pads on the left, so that every row continues at the same column.
    padded = [[settings.pad_token_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    # An encoder-decoder gives back its start token and the answer, a decoder the prompt and the answer.
    before = 1 if model.config.is_encoder_decoder else longest

    def listen(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        # A stopping criterion that stops nothing: the one place that transformers calls after each token.
        share = (ids.shape[1] - before) / settings.max_new_tokens
        if share < 1:
            tell(share)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    with quiet():
        output = model.generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([listen]),
        )
    ends = set(settings.eos_token_id or [])
    new: list[list[int]] = output[:, before:].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in new]


@torch.no_grad()
def stream(
    model: Any, tokenizer: Any, turns: Sequence[Turn], *, max_new_tokens: int, temperature: float = 0.0
) -> Iterator[str]:
    """The answer to a chat, piece by piece as it is computed. Raises UsageError as `generate` does.

    temperature: 0 takes the likeliest token; above 0 samples, with torch's global random state.
    """
    ids = encode(tokenizer, turns)
    _check_lengths(model, [ids], max_new_tokens)
    ends = set(end_tokens(model, tokenizer))
    device = device_of(model)
    told, new = "", list[int]()
    step: dict[str, Any] = {"input_ids": torch.tensor([ids], device=device)}
    with evaluating(model):
        for _ in range(max_new_tokens):
            output = model(**step, use_cache=True)
            logits = output.logits[0, -1].float()
            sampled = temperature > 0
            token = int((logits / temperature).softmax(-1).multinomial(1) if sampled else logits.argmax())
            if token in ends:
                break
            new.append(token)
            text = tokenizer.decode(new, skip_special_tokens=True)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may take several tokens
                yield text[len(told) :]
                told = text
            step = {"input_ids": torch.tensor([[token]], device=device), "past_key_values": output.past_key_values}
