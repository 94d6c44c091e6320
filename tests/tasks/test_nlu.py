"""Sentences and pairs with labels: read, made into batches, told apart by a trained head, measured."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import trimtab
from tiny_classifier import lines, make_folder, word_tokenizer, write_table
from tiny_training import Stopped
from toys import small
from trimtab.data.label_batch import encode_labelled, pad_labelled
from trimtab.data.labelled import LabelledRow, class_names, hold_out, read_labelled
from trimtab.errors import FormatError, TrimtabError, UsageError
from trimtab.models.classifier import load_classifier
from trimtab.tasks import make_task
from trimtab.tasks.classify import classify, encoded, refuse_random
from trimtab.tasks.confusion import confusion, f1, interval_of, matthews
from trimtab.tasks.figures import figures
from trimtab.tasks.nlu import Classification, class_record
from trimtab.tasks.results import Results, Setup
from trimtab.train.loss import class_logits, class_loss
from trimtab.train.packing import PAD

DATA = Path(os.environ.get("TRIMTAB_DATA") or Path(__file__).parents[3] / "shared" / "data")
OWN = make_task("classification")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models") / "causal", "causal")


@pytest.fixture
def items(tmp_path):
    return OWN.read(write_table(tmp_path / "rows.tsv", lines(14)))


# --- files ---


def write(path, text):
    path.write_bytes(text.encode())
    return path


def test_three_shapes_of_tables_are_read_with_their_quotes(tmp_path):
    own = read_labelled(write(tmp_path / "own.tsv", 'id\tsentence\tlabel\r\n1\tit "is\tyes\r\n2\tso\tno\r\n'))
    assert own == (LabelledRow('it "is', None, "yes", 2), LabelledRow("so", None, "no", 3))
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    mrpc = read_labelled(write(tmp_path / "mrpc.tsv", f'{header}1\t7\t8\t"A\tB\n'))
    assert mrpc == (LabelledRow('"A', "B", "1", 2),)
    packed = tmp_path / "sst2.tsv.gz"
    packed.write_bytes(gzip.compress(b"one film\t0\n\nits plot\t1\n"))
    assert read_labelled(packed) == (LabelledRow("one film", None, "0", 1), LabelledRow("its plot", None, "1", 3))
    assert read_labelled(packed, limit=1)[-1].line == 1


@pytest.mark.parametrize(
    ("task", "text", "told"),
    [
        ("sst2", "", "rows.tsv is empty"),
        ("sst2", "label\tsentence\n", "holds a header and no rows"),
        ("sst2", "one\t0\ntwo\n", "rows.tsv line 2 has 1 columns, but its first line has 2"),
        ("sst2", "one\t0\n \t1\n", "rows.tsv line 2 has an empty sentence"),
        ("sst2", "one\t0\ntwo\t\n", "rows.tsv line 2 has an empty label"),
        ("sst2", "one\t0\ntwo\t2\n", "rows.tsv line 2 has the label '2', but the classes are 0, 1"),
        ("sst2", "one\t0\ntwo\t0\n", "rows.tsv has no row of class 1 in its 2 rows"),
        ("mrpc", "one\t0\ntwo\t1\n", "other rows than mrpc, which is of pairs of sentences"),
        ("classification", "one\tx\ntwo\tx\n", "every row of rows.tsv has the label 'x'"),
        ("classification", "1\t2.5\tone\n", "begins with 3 columns (1, 2.5, one): expected a header with label and"),
        ("classification", "label\ttext\n1\tone\n", "begins with 2 columns (label, text): expected a header"),
        (
            "classification",
            "".join(f"{i}\tit is {i}\n" for i in range(101)),
            "101 different labels in its second column",
        ),
    ],
)
def test_a_bad_table_is_told_with_its_file_and_line(tmp_path, task, text, told):
    with pytest.raises(UsageError) as error:
        make_task(task).read(write(tmp_path / "rows.tsv", text))
    assert told in str(error.value)


def test_classes_are_ordered_as_numbers_where_they_are_numbers():
    rows = [LabelledRow("a", None, label, 1) for label in ("10", "9", "10", "-1")]
    assert class_names(rows, "f") == ("-1", "9", "10")
    assert class_names([LabelledRow("a", None, label, 1) for label in ("b", "10", "a")], "f") == ("10", "a", "b")


def test_held_out_rows_are_a_share_of_each_class_drawn_by_seed():
    rows = [LabelledRow(f"s{i}", None, "rare" if i % 10 == 0 else "common", i) for i in range(100)]
    rest, held = hold_out(rows, 0.2, 3)
    assert sorted([*rest, *held], key=lambda row: row.line) == rows
    assert [row.label for row in held].count("rare") == 2
    assert len(held) == 20
    assert [row.line for row in held] == sorted(row.line for row in held)
    assert hold_out(rows, 0.2, 3) == (rest, held)
    assert hold_out(rows, 0.2, 4)[1] != held
    with pytest.raises(UsageError, match="hold_out is 1, but must be a share"):
        hold_out(rows, 1, 0)
    with pytest.raises(UsageError, match="only one row has the label 'rare'"):
        hold_out(rows[:9], 0.2, 0)


def test_known_tasks_have_their_splits_and_own_files_stand_for_one(tmp_path):
    file = write_table(tmp_path / "nlu" / "x.tsv", lines(4), header=False)
    assert make_task("sst2").path("test", file) == file
    with pytest.raises(UsageError, match=r"has no nlu/mrpc\.test\.tsv\.gz"):
        make_task("mrpc").path("test", tmp_path)
    with pytest.raises(UsageError, match="mrpc has no split 'dev'"):
        make_task("mrpc").path("dev", tmp_path)
    with pytest.raises(UsageError, match="name yours with --data FILE"):
        OWN.path("test", tmp_path)
    with pytest.raises(UsageError, match="there is no such file or folder"):
        OWN.path("test", tmp_path / "nowhere.tsv")
    with pytest.raises(UsageError, match="the classes of sst2 are 0, 1, and not a, b"):
        Classification("sst2", ("a", "b"))


@pytest.mark.skipif(not (DATA / "nlu").is_dir(), reason=f"no nlu files in {DATA} (TRIMTAB_DATA)")
def test_the_real_files_have_the_published_numbers_of_rows():
    sizes = {("sst2", "train"): 6920, ("sst2", "dev"): 872, ("sst2", "test"): 1821}
    sizes |= {("mrpc", "train"): 4076, ("mrpc", "test"): 1725}
    for (name, split), count in sizes.items():
        found = make_task(name).items(split, DATA)
        assert len(found) == count
        assert all((item.second is not None) == (name == "mrpc") for item in found)
    assert sum(item.answer == "1" for item in found) / len(found) == pytest.approx(0.665, abs=5e-4)


# --- batches and the model ---


def test_pairs_carry_segments_and_padding_changes_nothing(folder, causal, items, tmp_path):
    pairs = OWN.read(write_table(tmp_path / "pairs.tsv", lines(6, pairs=True)))
    for where, rows in ((folder, items), (folder, pairs), (causal, items), (causal, pairs)):
        loaded = load_classifier(str(where), 2)
        examples = encoded(rows, loaded, 200)
        assert len({len(example.input_ids) for example in examples}) > 1
        batch = pad_labelled(examples, loaded.tokenizer.pad_token_id)
        assert batch.supervised_tokens == len(rows)
        together = class_logits(loaded.model, batch)
        alone = torch.cat([class_logits(loaded.model, pad_labelled([e], 0)) for e in examples])
        assert torch.allclose(together, alone, atol=1e-5)  # fp32 rounding in products of other shapes
        assert class_loss(loaded.model, batch).item() == pytest.approx(
            F.cross_entropy(alone, torch.tensor([int(row.answer) for row in rows]), reduction="sum").item(), rel=1e-5
        )
    batch = pad_labelled(encoded(pairs, load_classifier(str(folder), 2), 200), 0)
    first = pairs[0].question.count(" ") + 3  # with [CLS] and [SEP]
    assert batch.segments[0].nonzero()[0].item() == first


def test_what_is_too_long_is_cut_counted_and_told(caplog):
    rows = [LabelledRow("a film is good", None, "1", 4), LabelledRow("bad", None, "0", 5)]
    with caplog.at_level("WARNING"):
        long, short = encode_labelled(rows, word_tokenizer(), ("0", "1"), max_length=4)
    assert (len(long.input_ids), long.truncated, short.truncated) == (4, 2, 0)
    assert long.input_ids[-1] == 3  # [SEP] stays
    assert "1 of 2 rows are longer than 4 tokens: 2 tokens are cut off" in caplog.text
    pair = [LabelledRow("a film is very very good", "bad", "1", 1)]
    (example,) = encode_labelled(pair, word_tokenizer(), ("0", "1"), max_length=7)
    assert example.segments == [0, 0, 0, 0, 0, 1, 1]  # of a pair the longer sentence is cut
    with pytest.raises(UsageError, match="max_length is 2, but must be at least 3"):
        encode_labelled(rows, word_tokenizer(), ("0", "1"), max_length=2)


def test_a_model_is_given_segments_where_it_asks_for_them(folder, causal, items):
    def padded(where):
        loaded = load_classifier(str(where), ("0", "1"))
        return pad_labelled(encoded(items, loaded, 6), loaded.tokenizer.pad_token_id)

    batch = padded(folder)
    assert {key: tuple(t.shape) for key, t in batch.inputs.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), (14, 6)
    )
    assert batch.targets.tolist() == [i % 2 for i in range(14)]
    assert "token_type_ids" not in padded(causal).inputs


def parameters(where, *args, **options):
    return dict(load_classifier(str(where), *args, **options).model.named_parameters())


@pytest.mark.parametrize("kind", ["folder", "causal"])
def test_the_head_is_drawn_from_the_seed_and_the_rest_is_the_checkpoints(kind, request):
    where = request.getfixturevalue(kind)
    first, again, other = parameters(where, 3, 1), parameters(where, 3, 1), parameters(where, 3, 2)
    head = "classifier.weight" if kind == "folder" else "score.weight"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert [key for key in first if not torch.equal(first[key], other[key])] == [head]
    assert first[head].shape == (3, 16)
    assert load_classifier(str(where), 3).head == (head.partition(".")[0],)


def test_without_pretraining_every_matrix_is_drawn_from_the_seed(folder):
    own, first, again, other = (
        parameters(folder, 2, seed, pretrained=pretrained)
        for seed, pretrained in ((1, True), (1, False), (1, False), (2, False))
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    matrices = [key for key in first if first[key].ndim == 2]
    assert not any(torch.equal(first[key], other[key]) or torch.equal(first[key], own[key]) for key in matrices)


def test_a_head_that_the_checkpoint_has_is_kept_unless_its_classes_are_others(tmp_path):
    where = make_folder(tmp_path / "headed", classes=3)
    kept, fresh = load_classifier(str(where), 3, seed=5), load_classifier(str(where), 4, seed=5)
    assert kept.fresh == ()
    assert fresh.fresh == ("classifier.bias", "classifier.weight")
    refuse_random(kept, None)
    with pytest.raises(UsageError, match=r"has no trained classifier\.bias, so its answers would be random"):
        refuse_random(fresh, None)


def test_a_head_of_the_same_classes_keeps_its_own_order(tmp_path):
    where = make_folder(tmp_path / "named", classes=2, id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1})
    assert load_classifier(str(where), ("no", "yes")).classes == ("yes", "no")
    assert load_classifier(str(where), ("a", "b")).classes == ("a", "b")


def test_a_pooler_that_is_missing_is_trained_and_a_missing_layer_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    for name, lost in (("poolerless", "pooler."), ("holed", "encoder.layer.1.")):
        file = make_folder(tmp_path / name) / "model.safetensors"
        save_file({k: v for k, v in load_file(file).items() if not k.startswith(lost)}, file, {"format": "pt"})
    assert load_classifier(str(tmp_path / "poolerless"), 2).head == ("bert.pooler", "classifier")
    with pytest.raises(FormatError, match=r"lacks \d+ weights of the model below its head"):
        load_classifier(str(tmp_path / "holed"), 2)


@pytest.mark.parametrize("classes", [1, ("a",), ("a", "a")])
def test_fewer_than_two_classes_are_refused(folder, classes):
    with pytest.raises(UsageError, match="needs two classes or more"):
        load_classifier(str(folder), classes)


# --- training ---


def trained(where, items, out=None, method="lora", **options):
    loaded = load_classifier(str(where), ("0", "1"))
    adapter = trimtab.attach(loaded.model, small(method), extra_modules=loaded.head)
    settings = trimtab.Settings(**{"lr": 1e-2, "epochs": 12, "batch_size": 8, **options.pop("settings", {})})
    how = {"loss": class_loss, "build": pad_labelled, "pad_id": loaded.tokenizer.pad_token_id}
    done = trimtab.fit(adapter, encoded(items, loaded, 32), settings, out=out, **how, **options)
    return loaded, adapter, done


def everything(name):
    return make_task("classification").items_of([LabelledRow(s, None, y, i + 2) for i, (y, s) in enumerate(name)], "01")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_head_and_a_method_learn_what_gives_the_class_away(folder, method):
    train, test = everything(lines(40)), everything(lines(30, seed=1))
    loaded, _, done = trained(folder, train, method=method)
    assert done.supervised_tokens == 12 * 40
    # The majority rate is 0.5; 24 of 30 by chance has probability 0.0007.
    assert figures(OWN, test, classify(loaded, OWN, test)).accuracy >= 0.8


@pytest.mark.parametrize("method", ["lora", "bitfit", "full", "dash", "dora", "ia3", "houlsby", "vera"])
def test_methods_come_back_from_disk_with_their_head(folder, items, tmp_path, method):
    loaded, _, _ = trained(folder, items, tmp_path / "run", method, settings={"epochs": 2})
    found = classify(loaded, OWN, items)
    fresh = load_classifier(str(folder), ("0", "1"), seed=9)
    assert classify(fresh, OWN, items) != found
    again = trimtab.load(fresh.model, tmp_path / "run" / "adapter")
    refuse_random(fresh, again)
    assert classify(fresh, OWN, items) == found


def test_a_causal_model_learns_too(causal):
    train = everything(lines(16))
    evaluation = encoded(train, load_classifier(str(causal), ("0", "1")), 64)
    _, _, done = trained(causal, train, settings={"epochs": 10}, eval_examples=evaluation)
    assert done.eval_loss < 0.8 * done.eval_loss_before


def test_a_step_is_the_mean_over_its_rows_however_they_are_cut(items, tmp_path):
    where = make_folder(tmp_path / "dry", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    losses = [trained(where, items, settings={"micro_batch": size, "epochs": 2})[2].train_loss for size in (None, 3, 1)]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-4)  # rounding, through four steps of AdamW


def test_a_resumed_run_ends_with_the_same_bits_and_knows_its_labels(folder, items, tmp_path):
    def stop(report):
        if report.step == 2:
            raise KeyboardInterrupt

    options = {"save_every": 1, "epochs": 2}
    _, whole, _ = trained(folder, items, tmp_path / "whole", settings=options)
    with pytest.raises(KeyboardInterrupt):
        trained(folder, items, tmp_path / "cut", settings=options, on_step=stop)
    other = everything([(str(1 - int(item.answer)), item.question) for item in items])
    with pytest.raises(UsageError, match="training data was"):
        trained(folder, other, tmp_path / "cut", settings=options, resume=True)
    _, cut, _ = trained(folder, items, tmp_path / "cut", settings=options, resume=True)
    after = cut.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in whole.state_dict().items())


def test_batches_of_ones_own_need_a_loss_of_ones_own(folder, items):
    loaded = load_classifier(str(folder), 2)
    adapter = trimtab.attach(loaded.model, trimtab.LoRA(rank=2))
    with pytest.raises(UsageError, match="build is for a loss of one's own"):
        trimtab.fit(adapter, encoded(items, loaded, 32), build=pad_labelled)
    assert PAD.build is not pad_labelled


# --- answers ---


SETUP = Setup("tiny", "1", "float32", None, None, "classes", None, {"classification": "3"})


def test_an_evaluation_goes_on_where_it_was_stopped(folder, items, tmp_path):
    loaded = load_classifier(str(folder), ("0", "1"))
    whole = classify(loaded, OWN, items, batch_size=4)

    def stop(done, _):
        if done >= 8:
            raise Stopped

    with pytest.raises(Stopped):
        classify(loaded, OWN, items, batch_size=4, results=Results(tmp_path, SETUP), progress=stop)
    told = []
    again = classify(
        loaded, OWN, items, batch_size=4, results=Results(tmp_path, SETUP), progress=lambda done, _: told.append(done)
    )
    assert told == [8, 12, 14]
    assert again == whole
    assert all(sum(np.exp(list(o.scores.values()))) == pytest.approx(1) for o in whole)


def test_scores_that_are_not_finite_are_an_error(folder, items):
    loaded = load_classifier(str(folder), ("0", "1"))
    with torch.no_grad():
        loaded.model.classifier.weight.fill_(float("nan"))
    with pytest.raises(TrimtabError, match=r"line \d+ has no finite score"):
        classify(loaded, OWN, items)


def test_figures_are_f1_and_matthews_by_their_definitions():
    answers, predictions = list("1111100000"), list("1110010000")
    table = confusion(answers, predictions, ("0", "1"))
    assert table.tolist() == [[4, 1], [2, 3]]
    assert f1(table) == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    correlation = np.corrcoef([int(a) for a in answers], [int(p) for p in predictions])[0, 1]
    assert matthews(table) == pytest.approx(correlation)
    three = confusion(list("001122"), list("001220"), tuple("012"))
    by_class = [2 * 2 / (2 + 3), 2 * 1 / (2 + 1), 2 * 1 / (2 + 2)]
    assert f1(three) == pytest.approx(np.mean(by_class))
    # Gorodkin 2004: the correlation of the classes' indicators, summed over classes.
    indicator = [np.eye(3)[[int(c) for c in text]] for text in ("001122", "001220")]
    x, y = (part - part.mean(0) for part in indicator)
    assert matthews(three) == pytest.approx((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))
    assert matthews(confusion(list("0011"), list("1111"), ("0", "1"))) == 0


def test_the_interval_of_a_statistic_is_that_of_resampled_rows():
    rng = np.random.default_rng(1)
    answers = rng.integers(0, 2, 200)
    predictions = np.where(rng.random(200) < 0.8, answers, 1 - answers)
    table = confusion([str(a) for a in answers], [str(p) for p in predictions], ("0", "1"))
    found = interval_of(matthews, table)
    picks = rng.integers(0, 200, (2000, 200))
    rows = [np.corrcoef(answers[i], predictions[i])[0, 1] for i in picks]
    # Each end of 2000 draws has a spread of about 0.004.
    assert [found.low, found.high] == pytest.approx(np.quantile(rows, [0.025, 0.975]), abs=0.02)
    assert found.low < matthews(table) < found.high


def test_chance_is_the_majority_class(folder):
    items = everything([("1", "good"), ("1", "very good"), ("1", "a"), ("0", "bad")])
    found = figures(OWN, items, classify(load_classifier(str(folder), ("0", "1")), OWN, items))
    assert found.chance == found.majority == 0.75
    assert found.unparseable is None


def test_an_adapter_of_another_kind_has_no_record_of_classes(tmp_path):
    assert class_record(tmp_path) is None
    (tmp_path / "trimtab.json").write_text('{"provenance": {"classes": ["a", "b"], "task": "x", "max_length": 9}}')
    assert class_record(tmp_path).classes == ("a", "b")
