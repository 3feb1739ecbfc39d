"""The table, the sentence, the figure and the page of streams, from made-up numbers."""

import math

import numpy as np
import pytest

from jedit.report import (
    FIELDS,
    Stream,
    StreamLearner,
    StreamReport,
    StreamRun,
    stream_figure,
    stream_page,
    stream_sentence,
    stream_sheet,
)
from jedit.report.streams import mean_of_begun

# Two tasks of two updates each, looked at five times.
SCORES = ((0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.25, 0.5), (0.5, 1.0))


def learner(name, *, final, minimum, half=0.01, seeds=(0, 1), diverged=()):
    runs = tuple(StreamRun(seed, final, minimum, 0.5, 0.75, 0.5, SCORES) for seed in seeds)
    spread = dict.fromkeys(FIELDS, (0.5, half)) | {
        "final": (final, half),
        "minimum": (minimum, half),
    }
    return StreamLearner(name, f"<{name}>", {"rate": 0.1}, runs, diverged, spread if seeds else {})


def stream(*learners, seeds=(0, 1)):
    return Stream(
        "classes", "Two & two", "A note.", ("a", "b"), seeds, 2, {"a task": 8}, {}, 1.0, learners
    )


def test_the_mean_is_over_the_tasks_begun_alone():
    run = learner("naive", final=0.5, minimum=0.25).runs[0]
    assert mean_of_begun(run, 2) == pytest.approx([0, 0.5, 0.5, 0.375, 0.75])


def test_the_table_has_intervals_where_there_are_and_says_what_diverged():
    found = stream(
        learner("naive", final=0.25, minimum=0.125),
        learner("one", final=0.5, minimum=0.5, half=math.nan, seeds=(0,), diverged=(1,)),
        learner("none", final=0.0, minimum=0.0, seeds=(), diverged=(0, 1)),
    )
    naive, one, none = stream_sheet(found).rows
    assert naive.cells[:2] == ("25.0 ± 1.0", "12.5 ± 1.0")
    assert one.cells[0] == "50.0"
    assert one.setting == "rate 0.1, 1 of 2 seeds diverged"
    assert set(none.cells) == {"–"}


def test_the_sentence_names_the_largest_means_and_what_nothing_kept_comes_to():
    found = stream(
        learner("naive", final=0.25, minimum=0.125),
        learner("end", final=0.75, minimum=0.25),
        learner("way", final=0.5, minimum=0.5),
    )
    assert stream_sentence(found) == (
        "At the end the accuracy of end is the highest mean over 2 seeds (75.0 ± 1.0 %), on the "
        "way that of way (min-ACC 50.0 ± 1.0 %); where nothing is kept it is 25.0 ± 1.0 % and "
        "12.5 ± 1.0 %."
    )
    assert stream_sentence(stream(learner("x", final=0, minimum=0, seeds=()))) == (
        "Every run diverged."
    )


@pytest.mark.parametrize("is_narrow", [False, True])
def test_the_figure_draws_each_task_from_when_it_was_begun(is_narrow):
    found = stream(
        learner("x", final=0.0, minimum=0.0, seeds=(), diverged=(0, 1)),
        learner("naive", final=0.25, minimum=0.125),
    )
    empty, axes = stream_figure(found, is_narrow=is_narrow).axes
    assert [text.get_text() for text in empty.texts] == ["diverged"]
    lines = {line.get_label(): line for line in axes.get_lines()}
    later = lines["later tasks, first seed"]
    assert np.array_equal(later.get_xdata(), [2, 3, 4])
    assert np.array_equal(later.get_ydata(), [0, 0.5, 1])
    assert len(lines["the first task, first seed"].get_xdata()) == len(SCORES)


def test_the_page_is_escaped_and_asks_the_network_for_nothing():
    pytest.importorskip("jinja2")
    found = stream(learner("naive", final=0.25, minimum=0.125))
    report = StreamReport("jedit demo", "today", 0, 1.0, 0.5, {"jax": "1"}, {"cores": 2}, (found,))
    page = stream_page(report)
    assert "&lt;naive&gt;" in page
    assert "Two &amp; two" in page
    assert "http" not in page
    assert page.count("data:image/png;base64,") == 2
