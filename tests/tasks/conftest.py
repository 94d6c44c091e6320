"""A tiny tokenizer and tiny random models, built here so that no test needs a network."""

from __future__ import annotations

import pytest

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE without merges, so every text can be written; with a chat template, without a pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<|text|>", "<|start|>", "<|end|>", *alphabet])}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "a"), ("Ġ", "b"), ("i", "n")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|text|>", additional_special_tokens=["<|start|>", "<|end|>"]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture
def llama(tokenizer):
    """A random two-layer Llama in fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.5,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def gpt2(tokenizer):
    """A random two-layer GPT-2 in fp32: absolute positions instead of rotary ones."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.5,
        eos_token_id=None,
        bos_token_id=None,
    )
    return GPT2LMHeadModel(config)
