from __future__ import annotations

from collections import Counter

from trimtab.tasks.knowledge import questions


def test_every_position_is_right_equally_often():
    assert Counter(question.answer for question in questions()) == {0: 20, 1: 20, 2: 20, 3: 20}


def test_each_question_has_four_different_choices_of_like_length():
    for question in questions():
        assert len(set(question.choices)) == 4
        lengths = [len(choice) for choice in question.choices]
        assert max(lengths) <= 2.5 * min(lengths) + 3, question


def test_no_question_is_asked_twice():
    assert len({question.question for question in questions()}) == 80


def test_the_right_choice_is_not_the_longest_or_shortest_more_than_the_others():
    longest = sum(max(q.choices, key=len) == q.choices[q.answer] for q in questions())
    shortest = sum(min(q.choices, key=len) == q.choices[q.answer] for q in questions())
    # 20 of 80 by chance; 35 is four standard deviations above.
    assert longest < 35
    assert shortest < 35


def test_several_topics_are_covered():
    topics = Counter(question.topic for question in questions())
    assert len(topics) >= 5
    assert min(topics.values()) >= 5
