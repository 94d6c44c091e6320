"""A tiny GGUF file and a tiny model folder, made here so that no test needs a network."""

from __future__ import annotations

import numpy as np
import pytest

HIDDEN, LAYERS, HEADS, FEED_FORWARD = 64, 2, 4, 96


def tokens():
    """Byte-level BPE without merges, as GGUF lists it: tokens and their types (1 normal, 3 control)."""
    from tokenizers import pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*special, *alphabet, "th"], [3] * 3 + [1] * (len(alphabet) + 1)


def _write_gguf(path, seed=0, architecture="llama"):
    """A Llama with random weights: Q8_0 matrices, fp32 norms, tied head, a chat template. Returns the arrays."""
    import gguf

    names, types = tokens()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    for add, value in (
        (writer.add_context_length, 128),
        (writer.add_embedding_length, HIDDEN),
        (writer.add_block_count, LAYERS),
        (writer.add_feed_forward_length, FEED_FORWARD),
        (writer.add_head_count, HEADS),
        (writer.add_head_count_kv, HEADS),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_freq_base, 10000.0),
        (writer.add_vocab_size, len(names)),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "smollm"),
        (writer.add_token_list, names),
        (writer.add_token_types, types),
        (writer.add_token_merges, ["t h"]),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_pad_token_id, 2),
        (writer.add_unk_token_id, 0),
        (writer.add_chat_template, "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"),
    ):
        add(value)
    arrays = {}
    random = np.random.default_rng(seed)
    for name, shape in shapes(len(names)).items():
        array = random.normal(0, 0.2, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, array)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(array, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            array = gguf.quants.dequantize(packed, kind)
        arrays[name] = array
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays


def shapes(vocabulary):
    found = {"token_embd.weight": (vocabulary, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            found[f"blk.{layer}.{name}.weight"] = (HIDDEN, HIDDEN)
        for name in ("ffn_gate", "ffn_up"):
            found[f"blk.{layer}.{name}.weight"] = (FEED_FORWARD, HIDDEN)
        found[f"blk.{layer}.ffn_down.weight"] = (HIDDEN, FEED_FORWARD)
        for name in ("attn_norm", "ffn_norm"):
            found[f"blk.{layer}.{name}.weight"] = (HIDDEN,)
    return found


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Every test converts into its own cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TRIMTAB_CACHE", str(folder))
    return folder / "models"


@pytest.fixture
def write_gguf():
    """write_gguf(path, seed=0, architecture="llama"): writes the file and returns its arrays by GGUF name."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    return _write_gguf


@pytest.fixture
def tiny_gguf(tmp_path, write_gguf):
    path = tmp_path / "tiny model.gguf"
    return path, write_gguf(path)


@pytest.fixture
def llama_folder(tmp_path):
    """A saved random Llama in bf16, without a tokenizer."""
    import torch

    from toys import built

    folder = tmp_path / "llama"
    built("llama").to(torch.bfloat16).save_pretrained(folder)
    return folder
