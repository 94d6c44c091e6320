"""What a search knows of its subject before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tiny_classifier import lines, make_folder, write_table
from tiny_tokenizer import byte_level
from trimtab.errors import UsageError
from trimtab.subspace.reparameterize import Subspace
from trimtab.subspace.sentences import SentenceTrainer, Setting
from trimtab.subspace.subject import of_sentences


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """A file to train on, and one that is scored."""
    written = [write_table(tmp_path / f"{name}.tsv", lines(40)) for name in ("train", "test")]
    return str(written[0]), str(written[1])


def setting(model: Path, files: tuple[str, str], **options) -> Setting:
    return Setting(str(model), "classification", *files, **options)


def test_the_budget_of_a_lora_is_of_all_linear_layers_but_the_head(files: tuple[str, str], tmp_path: Path) -> None:
    n = 16
    block = 4 * (n + n) + (n + 2 * n) + (2 * n + n)
    assert of_sentences(setting(make_folder(tmp_path / "bert"), files)).features == (
        2 * block + n + n,
        2 * 6 + 1,
    )  # and the pooler
    folder = tmp_path / "gpt2"
    tokenizer = byte_level()
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=n, n_layer=2, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transposed = (n + 3 * n) + (n + n) + (n + 4 * n) + (4 * n + n)
    assert of_sentences(setting(folder, files)).features == (2 * transposed, 2 * 4)


@pytest.mark.parametrize("layers", [None, "tensor"])
def test_the_least_d_is_one_that_can_be_trained_and_no_other_below_it(
    layers: str | None, files: tuple[str, str], tmp_path: Path
) -> None:
    own = setting(make_folder(tmp_path / "bert"), files, mode="said", layers=layers)
    subject, model = of_sentences(own), SentenceTrainer(own).load(0).model
    assert sum(p.numel() for p in Subspace.of(model, d=subject.least, mode="said", layers=layers).trained()) > 1
    with pytest.raises(UsageError, match="take d above"):
        Subspace.of(model, d=subject.least - 1, mode="said", layers=layers)
    assert of_sentences(setting(Path(own.model), files)).least == 1
