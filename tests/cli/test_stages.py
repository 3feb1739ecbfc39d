"""Stages on stderr: plain lines in a file, a bar with the time left on a terminal."""

import io
import time

from rich.console import Console

from jedit.cli.stages import Stages
from jedit.recipes.progress import Within, tell


def run(console):
    stages = Stages(console)
    with stages:
        say = Within("toy", stages)
        say("training [a model]")
        for done in range(5):
            time.sleep(0.02)
            tell(say, done, 4)
            stages.bar.refresh()
        say("judging")
    return console.file.getvalue()


def test_in_a_file_a_stage_is_one_line():
    lines = run(Console(file=io.StringIO(), width=80)).splitlines()
    assert [line.split("s  ")[1] for line in lines] == ["toy: training [a model]", "toy: judging"]


def test_on_a_terminal_a_bar_shows_how_far_a_stage_is_and_the_time_left():
    text = run(Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None))
    assert text.count("toy: training [a model]") > 5
    for part in ("25%", "50%", "75%", "100%", "0:00:00"):
        assert part in text
    # The next stage has said nothing of its length yet.
    assert "%" not in text[text.rindex("s  toy: judging") :].replace("0%", "")


def test_a_plain_function_hears_of_the_stages_alone():
    heard = []
    say = Within("toy", heard.append)
    say("training")
    tell(say, 1, 2)
    tell(heard.append, 1, 2)
    assert heard == ["toy: training"]


def test_it_can_be_told_before_it_is_shown():
    stages = Stages(Console(file=io.StringIO()))
    stages("loading")
    stages.progress(1, 2)
    assert stages.bar.tasks[0].percentage == 50
