"""Watchers of a long run: they are told each stage in a few words, and how far the stage is."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

# Any function of a text will do, `print` for one: it is told of the stages alone.
Say = Callable[[str], None]


def ignore(text: str) -> None:
    """Hear of a stage, and do nothing."""
    del text


@runtime_checkable
class Watcher(Protocol):
    """A function that is told each stage and, unlike a plain `Say`, also how far the stage is."""

    def __call__(self, text: str) -> None:
        """Hear of a new stage."""
        ...

    def progress(self, done: int, total: int) -> None:
        """Hear that so many of the stage's parts are done."""
        ...


def tell(say: Say, done: int, total: int) -> None:
    """Tell a watcher how far the stage is; a plain function is not called."""
    if isinstance(say, Watcher):
        say.progress(done, total)


class Within:
    """A watcher that says every stage as a part of something larger: "digits-class: fitting"."""

    def __init__(self, whole: str, say: Say):
        self.whole, self.say = whole, say

    def __call__(self, text: str) -> None:
        """Say a stage, with the larger thing's name in front."""
        self.say(f"{self.whole}: {text}")

    def progress(self, done: int, total: int) -> None:
        """Tell how far the stage is."""
        tell(self.say, done, total)
