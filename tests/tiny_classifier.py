"""Tiny models to classify with, and made-up sentences whose class one word gives away."""

from __future__ import annotations

import random
from typing import Any

import torch

from tiny_tokenizer import byte_level

WORDS = ("the", "a", "film", "plot", "is", "was", "very", "good", "bad", '"', "of")


def word_tokenizer() -> Any:
    """Whole words, with BERT's marks around sentences and pairs."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def make_folder(folder, kind="encoder", classes=None, **options):
    """The folder of a random two-layer model: an encoder, one with a head for so many classes, or a causal model."""
    import transformers as t

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = byte_level() if kind == "causal" else word_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "causal":
            config = t.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=len(tokenizer), initializer_range=0.2)
            model = t.LlamaForCausalLM(config)
        else:
            bert = t.BertConfig(
                **sizes, vocab_size=len(tokenizer), max_position_embeddings=32, initializer_range=0.2, **options
            )
            bert.num_labels = classes or bert.num_labels
            model = t.BertForSequenceClassification(bert) if classes else t.BertModel(bert)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lines(count=40, seed=0, pairs=False):
    """Rows of a table, (label, sentence...), label first: good is 1 and bad is 0, in turn."""
    draw = random.Random(seed)

    def sentence(label):
        words = [draw.choice(WORDS[:7]) for _ in range(draw.randrange(1, 7))]
        words.insert(draw.randrange(len(words) + 1), ("bad", "good")[label])
        return " ".join(words)

    return [(str(i % 2), *(sentence(i % 2) for _ in range(1 + pairs))) for i in range(count)]


def write_table(path, rows, header=True, labels=("0", "1")):
    """A file of `lines`: with a header, or as SST-2 has it."""
    rows = [(labels[int(label)], *sentences) for label, *sentences in rows]
    if header:
        names = ("label", "sentence") if len(rows[0]) == 2 else ("label", "sentence1", "sentence2")
        table = [names, *rows]
    else:
        table = [(sentence, label) for label, sentence in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in table), encoding="utf-8")
    return path
