"""Commonsense questions: read, asked by likelihood and by generation, gone on with after an interruption."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from made_up_questions import question_rows, write_questions
from tiny_training import Stopped
from trimtab.data.encode import encode
from trimtab.data.read import read
from trimtab.errors import FormatError, TrimtabError, UsageError
from trimtab.tasks import TASKS, evaluate, make_task
from trimtab.tasks.commonsense import WORDS
from trimtab.tasks.digests import adapter_digest, model_digest
from trimtab.tasks.evaluate import figures
from trimtab.tasks.generate import generate
from trimtab.tasks.nlu import KNOWN
from trimtab.tasks.results import Outcome, Results, Setup
from trimtab.tasks.task import Item, subset, training_rows

DATA = Path(os.environ.get("TRIMTAB_DATA") or Path(__file__).parents[3] / "shared" / "data")
ARC = make_task("arc_easy")
SETUP = Setup("tiny", "1", "float32", "sql", "2", "likelihood", None, {"arc_easy": "3"})


@pytest.fixture
def items(tmp_path):
    write_questions(tmp_path / "data", question_rows())
    return ARC.items("test", tmp_path / "data")


# --- the data ---


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.skipif(not (DATA / "commonsense").is_dir(), reason=f"no commonsense files in {DATA} (TRIMTAB_DATA)")
def test_every_row_of_the_real_files_has_its_answer_among_its_choices(name):
    task = make_task(name)
    for split in ("test",) if name == "piqa" else ("train", "test"):
        rows = json.loads(gzip.decompress(task.path(split, DATA).read_bytes()))
        found = task.items(split, DATA)
        assert [item.answer for item in found] == [row["answer"] for row in rows]
        assert all(item.answer in item.choices and len(item.choices) > 1 for item in found)
        assert [item.index for item in found] == list(range(len(rows)))


def test_what_a_row_offers_and_answers_is_read(items):
    rows = question_rows()
    assert [item.question for item in items] == [row["instruction"] for row in rows]
    assert [item.answer for item in items] == [row["answer"] for row in rows]
    assert [len(item.choices) for item in items] == [2, 3, 4, 2, 3, 4, 2, 3, 4, 2]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"output": "answer1"}, "row 2 must have the output 'the correct answer is ' and one of answer1"),
        ({"output": "the correct answer is answer5"}, "row 2 must have the output"),
        ({"instruction": "Which one?"}, "row 2 must end in 'Answer format:'"),
        ({"instruction": "Which one?\n\nAnswer format: true/false"}, "and some of answer1/answer2"),
    ],
)
def test_a_row_that_is_no_question_is_refused_by_number(tmp_path, change, told):
    rows = question_rows(3)
    rows[1] |= change
    write_questions(tmp_path, rows)
    with pytest.raises(FormatError, match=told):
        ARC.items("test", tmp_path)


def test_where_the_data_is_missing_it_is_said_what_is_looked_for(tmp_path, monkeypatch):
    file = "commonsense/arc_easy.test.json.gz"
    monkeypatch.delenv("TRIMTAB_DATA", raising=False)
    with pytest.raises(UsageError, match=f"a folder with {file} in it: name it with --data or in TRIMTAB_DATA"):
        ARC.items()
    with pytest.raises(UsageError, match=f"--data names .*nowhere, which is no folder; {file}"):
        ARC.items("test", tmp_path / "nowhere")
    monkeypatch.setenv("TRIMTAB_DATA", str(tmp_path))
    with pytest.raises(UsageError, match=f"TRIMTAB_DATA names {tmp_path}, which has no {file}"):
        ARC.items()
    write_questions(tmp_path, question_rows(3))
    assert len(ARC.items()) == 3
    with pytest.raises(UsageError, match="piqa has no split 'train'; there is: test"):
        make_task("piqa").items("train", tmp_path)


def test_smaller_subsets_are_part_of_larger_ones_and_seeded(items):
    small, large = subset(items, 4, seed=1), subset(items, 7, seed=1)
    assert set(small) < set(large)
    assert [item.index for item in large] == sorted(item.index for item in large)
    assert small == subset(items, 4, seed=1) != subset(items, 4, seed=2)
    assert small != items[:4]
    assert subset(items, None, seed=1) == subset(items, 99, seed=1) == items
    with pytest.raises(UsageError, match="limit is 0"):
        subset(items, 0, seed=1)


def test_training_rows_are_those_that_train_reads_from_the_file(tmp_path):
    file = write_questions(tmp_path, question_rows(), split="train")
    assert training_rows(ARC, ARC.items("train", tmp_path)) == read(file).rows


def test_without_a_chat_template_a_question_is_trained_on_in_the_papers_prompt(items, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    (example, *_) = encode(training_rows(ARC, items, chat=False), tokenizer, max_length=1000)
    text = tokenizer.decode(example.input_ids)
    assert text.startswith("Below is an instruction that describes a task.")
    assert f"### Instruction:\n{items[0].question}\n\n### Response:\n{ARC.response(items[0].answer)}" in text
    learned = [i for i, supervised in zip(example.input_ids, example.supervised, strict=True) if supervised]
    assert tokenizer.decode(learned) == f"the correct answer is {items[0].answer}<|text|>"


# --- the registry ---


def test_tasks_are_listed_and_made_without_loading_torch():
    code = (
        "import sys; from trimtab.tasks import TASKS, make_task\n"
        "[make_task(name) for name, listed in TASKS.items() if listed.place]\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert {name for name, listed in TASKS.items() if listed.command == "eval"} == {*WORDS, *KNOWN, "classification"}


def test_an_unknown_task_is_told_with_the_nearest_and_another_commands_with_that_command():
    with pytest.raises(UsageError, match=r"unknown task 'bolq'; did you mean boolq\?"):
        make_task("bolq")
    with pytest.raises(UsageError, match="'naming' is part of trimtab demo; eval runs: arc_easy"):
        make_task("naming")


# --- answers ---


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("arc_easy", "the correct answer is answer2", "answer2"),
        ("arc_easy", "answer3, not answer1", "answer3"),
        ("arc_easy", "Answer2: a rock", None),  # as the papers have it: case counts
        ("arc_easy", "It is a rock.", None),
        ("arc_easy", "", None),
        ("arc_easy", "solution1", None),
        ("boolq", "that is untrue, so false", "true"),  # theirs too: a word inside another counts
        ("boolq", "True", None),
        ("piqa", "I take solution2.", "solution2"),
    ],
)
def test_the_first_of_the_tasks_words_is_the_answer(name, text, found):
    assert make_task(name).extract(text) == found


def by_hand(model, tokenizer, item):
    """The log-probability of each choice's response, from one full forward pass a choice."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": item.question}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    else:
        prompt = ARC.plain_prompt(item.question)
    start = len(tokenizer(prompt)["input_ids"])
    scores = {}
    for choice in item.choices:
        ids = torch.tensor([tokenizer(f"{prompt}the correct answer is {choice}")["input_ids"]])
        logs = model(input_ids=ids).logits.float().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        scores[choice] = logs[start - 1 :].sum().item()
    return scores


@pytest.mark.parametrize(("architecture", "chat"), [("llama", True), ("gpt2", True), ("llama", False)])
def test_scores_are_those_of_full_forward_passes(architecture, chat, items, tokenizer, request, monkeypatch):
    model = request.getfixturevalue(architecture).eval()
    if not chat:
        monkeypatch.setattr(tokenizer, "chat_template", None)
        model.config.max_position_embeddings = 512
    outcomes = evaluate.evaluate(model, tokenizer, ARC, items, batch_size=4)
    for item, outcome in zip(items, outcomes, strict=True):
        with torch.no_grad():
            expected = by_hand(model, tokenizer, item)
        assert outcome.scores == pytest.approx(expected, rel=1e-5)  # fp32 sums over some thirty tokens
        assert outcome.prediction == max(expected, key=expected.get)
        assert outcome.correct == (outcome.prediction == item.answer)


def test_generation_reads_the_answer_from_the_likeliest_tokens(items, llama, tokenizer, monkeypatch):
    outcomes = evaluate.evaluate(llama, tokenizer, ARC, items, scoring="generation", batch_size=4, max_new_tokens=5)
    prompts = [[{"role": "user", "content": item.question}] for item in items]
    assert [o.text for o in outcomes] == generate(llama, tokenizer, prompts, max_new_tokens=5, batch_size=1)
    assert all(o.prediction is None and not o.correct for o in outcomes)  # a random model writes no such word
    written = iter(["answer1"] * 5 + ["no idea"] * 5)
    monkeypatch.setattr(evaluate, "generate", lambda *a, batch_size, **_: [next(written) for _ in range(batch_size)])
    answered = evaluate.evaluate(llama, tokenizer, ARC, items, scoring="generation", batch_size=5)
    found = figures(ARC, items, answered)
    assert found.unparseable == 0.5
    assert found.accuracy == sum(o.text == "answer1" == o.answer for o in answered) / 10


def test_a_question_too_long_for_the_model_is_refused_by_number(items, llama, tokenizer):
    long = dataclasses.replace(items[3], question="?" * 300)
    with pytest.raises(UsageError, match=r"arc_easy question 3 has .* more than the model's 256"):
        evaluate.evaluate(llama, tokenizer, ARC, [*items[:2], long])


def test_scores_that_are_not_finite_are_no_answer(items, llama, tokenizer):
    with torch.no_grad():
        llama.lm_head.weight.fill_(float("nan"))
    with pytest.raises(TrimtabError, match="no finite score: load the model in float32"):
        evaluate.evaluate(llama, tokenizer, ARC, items)


# --- figures ---


def test_chance_majority_and_interval_stand_beside_the_accuracy():
    answers = [("answer1", 2), ("answer2", 2), ("answer2", 4), ("answer3", 4)]
    items = [Item(i, "?", tuple(f"answer{n + 1}" for n in range(k)), a) for i, (a, k) in enumerate(answers)]
    outcomes = [Outcome(i, "", a, a, i != 0, scores={}) for i, (a, _) in enumerate(answers)]
    found = figures(ARC, items, outcomes)
    assert found.items == 4
    assert found.accuracy == 0.75
    assert found.chance == (0.5 + 0.5 + 0.25 + 0.25) / 4
    assert found.majority == 0.5
    assert found.unparseable is None
    assert found.interval.low < 0.75 < found.interval.high <= 1


# --- results on disk ---


def counted(monkeypatch):
    """The number of questions that a model was asked."""
    asked = []
    likelihood, generation = evaluate.log_likelihoods, evaluate.generate

    def spy(model, batches, tell):
        def told(number, sums):
            asked.extend(sums)
            tell(number, sums)

        likelihood(model, batches, told)

    def spied(model, tokenizer, prompts, **options):
        asked.extend(prompts)
        return generation(model, tokenizer, prompts, **options)

    monkeypatch.setattr(evaluate, "log_likelihoods", spy)
    monkeypatch.setattr(evaluate, "generate", spied)
    return asked


class Stopping(Results):
    """Results that are interrupted when three batches are kept."""

    kept = 0

    def add(self, task, outcomes):
        super().add(task, outcomes)
        self.kept += 1
        if self.kept == 3:
            raise Stopped


@pytest.mark.parametrize("scoring", ["likelihood", "generation"])
def test_an_interrupted_evaluation_goes_on_to_the_same_bits_and_asks_nothing_twice(
    scoring, items, llama, tokenizer, tmp_path, monkeypatch
):
    fixed = {"scoring": scoring, "batch_size": 2, "max_new_tokens": 4}
    setup = dataclasses.replace(SETUP, scoring=scoring)
    whole = evaluate.evaluate(llama, tokenizer, ARC, items, results=Results(tmp_path / "whole", setup), **fixed)
    asked = counted(monkeypatch)
    results = Stopping(tmp_path / "cut", setup)
    with pytest.raises(Stopped):
        evaluate.evaluate(llama, tokenizer, ARC, items, results=results, **fixed)
    assert len((tmp_path / "cut" / "examples.jsonl").read_text().splitlines()) == 6
    seen = []
    results = Results(tmp_path / "cut", setup)
    again = evaluate.evaluate(
        llama, tokenizer, ARC, items, results=results, progress=lambda done, _: seen.append(done), **fixed
    )
    assert again == whole
    assert len(asked) == len(items)
    assert seen[0] == 6
    assert seen[-1] == 10
    lines = [sorted((tmp_path / name / "examples.jsonl").read_text().splitlines()) for name in ("whole", "cut")]
    assert lines[0] == lines[1]
    assert evaluate.evaluate(llama, tokenizer, ARC, items, results=Results(tmp_path / "cut", setup), **fixed) == whole
    assert len(asked) == len(items)


def test_a_last_line_cut_short_is_asked_again(items, llama, tokenizer, tmp_path, monkeypatch):
    whole = evaluate.evaluate(llama, tokenizer, ARC, items, batch_size=1, results=Results(tmp_path, SETUP))
    file = tmp_path / "examples.jsonl"
    lines = file.read_bytes()
    file.write_bytes(lines[:-20])
    asked = counted(monkeypatch)
    again = evaluate.evaluate(llama, tokenizer, ARC, items, batch_size=1, results=Results(tmp_path, SETUP))
    assert again == whole
    assert len(asked) == 1
    assert file.read_bytes() == lines


def test_a_larger_subset_goes_on_from_a_smaller_one(items, llama, tokenizer, tmp_path, monkeypatch):
    evaluate.evaluate(llama, tokenizer, ARC, subset(items, 4, 0), results=Results(tmp_path, SETUP))
    asked = counted(monkeypatch)
    evaluate.evaluate(llama, tokenizer, ARC, items, results=Results(tmp_path, SETUP))
    assert len(asked) == 6


def test_a_line_says_what_was_asked_and_answered(items, llama, tokenizer, tmp_path):
    outcomes = evaluate.evaluate(llama, tokenizer, ARC, items[:1], results=Results(tmp_path, SETUP))
    (line,) = (json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines())
    assert line == {
        "task": "arc_easy",
        "index": 0,
        "prompt": outcomes[0].prompt,
        "prediction": outcomes[0].prediction,
        "answer": items[0].answer,
        "correct": outcomes[0].correct,
        "scores": outcomes[0].scores,
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": "other", "model_digest": "9"}, "model tiny, but now it is other"),
        ({"model_digest": "9"}, "model tiny as it was, but its weights are others now"),
        ({"adapter": "poet", "adapter_digest": "9"}, "adapter sql, but now it is poet"),
        ({"adapter": None, "adapter_digest": None}, "adapter sql, but now it is none"),
        ({"scoring": "generation"}, "scoring likelihood, but now it is generation"),
        ({"model_digest": "9", "dtype": "bfloat16"}, "dtype float32, but now it is bfloat16"),
        ({"data": {"arc_easy": "9"}}, "arc_easy from another data file"),
    ],
)
def test_results_of_something_else_are_refused_by_name(tmp_path, change, told):
    Results(tmp_path, SETUP)
    with pytest.raises(UsageError, match=f"{told}.*choose another folder"):
        Results(tmp_path, dataclasses.replace(SETUP, **change))
    Results(tmp_path, SETUP)  # and were left as they are


def test_the_same_weights_by_another_name_and_another_task_go_on(tmp_path):
    Results(tmp_path, SETUP)
    Results(tmp_path, dataclasses.replace(SETUP, model="./tiny", data={"boolq": "4"}))
    assert json.loads((tmp_path / "evaluation.json").read_text())["data"] == {"arc_easy": "3", "boolq": "4"}


def test_lines_of_another_prompt_broken_ones_and_those_of_unknown_make_are_refused(items, llama, tokenizer, tmp_path):
    evaluate.evaluate(llama, tokenizer, ARC, items[:3], results=Results(tmp_path, SETUP))
    with pytest.raises(UsageError, match="line 1 answers another prompt than question"):
        Results(tmp_path, SETUP).done("arc_easy", dict.fromkeys(range(3), "0"))
    file = tmp_path / "examples.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1][:-9], lines[2], ""]))
    with pytest.raises(FormatError, match="line 2 is not JSON"):
        Results(tmp_path, SETUP)
    file.write_text('{"task": "arc_easy", "index": 0}\n')
    with pytest.raises(FormatError, match=r"line 1 is no result of trimtab eval"):
        Results(tmp_path, SETUP).done("arc_easy", {0: "0"})
    (tmp_path / "evaluation.json").unlink()
    with pytest.raises(UsageError, match=r"is there without evaluation\.json"):
        Results(tmp_path, SETUP)


def test_digests_tell_weights_and_configurations_apart(llama, tmp_path):
    before = model_digest(llama)
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    assert model_digest(llama) != before
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 16}')
    (tmp_path / "README.md").write_text("one")
    config = adapter_digest(tmp_path)
    (tmp_path / "README.md").write_text("two")
    assert adapter_digest(tmp_path) == config
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 32}')
    assert adapter_digest(tmp_path) != config
