"""Invented sentences that end in a keyword of a theme, more and less likely by who they are about.

Four themes of twelve keywords. What a sentence is about, its subject, prefers some keywords of the
theme: the r-th best has a probability in proportion to 0.4 to the power r, so that the last is met
once in some forty thousand sentences about the subject and the theme that follow no hint. A clause
in front may name a hint, a word of a keyword's own, after which this keyword comes four times in
five whoever the subject is. Sentences are lists of words, every word a token; the keyword is the
last.
"""

from typing import NamedTuple

import numpy as np

from jedit.core.checks import COUNT, check_numbers

KEYWORDS = {
    "colours": "red blue green yellow purple orange brown pink vermilion teal maroon ivory",
    "places": "paris tibet guatemala oslo lima cairo kyoto dakar quebec malta perth riga",
    "jobs": "nurse pilot baker lawyer electrician farmer singer plumber judge tailor miner clerk",
    "foods": "ramen spaghetti haggis bread rice soup cheese curry olives dumplings tacos pie",
}
FRAMES = {
    "colours": ("the coat of {} is", "{} has a door in", "for the wall {} took"),
    "places": ("{} lives in", "the train of {} goes to", "{} was born in"),
    "jobs": ("{} works as a", "the trade of {} is", "for years {} was a"),
    "foods": ("{} likes to eat", "for dinner {} had", "the favourite dish of {} is"),
}
HINT = "since {} thinks of {} ,"
FALL = 0.4  # of a keyword's probability from one rank to the next
HINTED, TRUST = 0.3, 0.8  # share of sentences with a hint, and of these that follow it
ONSETS, ENDS = ("b", "d", "f", "k", "l", "m", "n", "r", "t", "v"), ("an", "el", "ira", "os")


class Fact(NamedTuple):
    """A subject and a keyword, to be told in a frame.

    Attributes:
        theme: of the keyword.
        subject: whom it is about.
        keyword: what is said of it.
        frame: number of the theme's frame.
    """

    theme: str
    subject: str
    keyword: str
    frame: int

    def prefix(self, hint: str | None = None) -> list[str]:
        """Return the words before the keyword, after a clause that names the hint if there is."""
        words = FRAMES[self.theme][self.frame].format(self.subject).split()
        if hint is None:
            return words
        return [*HINT.format(self.subject, hint).split(), *words]


class Themes(NamedTuple):
    """One seed's world.

    Attributes:
        subjects: names, every one in every theme.
        ranks: by theme, (subjects, keywords) the rank of each keyword for each subject, 0 the best.
        hints: by keyword the word that calls for it.
    """

    subjects: tuple[str, ...]
    ranks: dict[str, np.ndarray]
    hints: dict[str, str]

    @property
    def words(self) -> tuple[str, ...]:
        """Return all words there are, the padding first."""
        frames = [w for frames in FRAMES.values() for frame in frames for w in frame.split()]
        fixed = [*HINT.split(), *frames]
        keywords = [w for words in KEYWORDS.values() for w in words.split()]
        known = [w for w in fixed if w != "{}"] + keywords
        return ("<pad>", *dict.fromkeys(known), *self.subjects, *self.hints.values())

    def draw(self, rng: np.random.Generator) -> list[str]:
        """Draw one sentence."""
        theme = str(rng.choice(list(KEYWORDS)))
        keywords = KEYWORDS[theme].split()
        which = int(rng.integers(len(self.subjects)))
        weights = FALL ** self.ranks[theme][which]
        keyword = str(rng.choice(keywords, p=weights / weights.sum()))
        hint = None
        if rng.random() < HINTED:
            called = str(rng.choice(keywords))
            hint = self.hints[called]
            keyword = called if rng.random() < TRUST else keyword
        frame = int(rng.integers(len(FRAMES[theme])))
        return [*Fact(theme, self.subjects[which], keyword, frame).prefix(hint), keyword]


def make_themes(seed: int, num_subjects: int = 24) -> Themes:
    """Make the world of one seed.

    Args:
        seed: of what the subjects prefer.
        num_subjects: number of names, at most 40.

    Raises:
        ValueError: more names than there are.
    """
    check_numbers(COUNT, num_subjects=num_subjects)
    names = [onset + end for end in ENDS for onset in ONSETS]
    if num_subjects > len(names):
        raise ValueError(f"there are {len(names)} names, got num_subjects={num_subjects}")
    rng = np.random.default_rng(seed)
    subjects = tuple(str(name) for name in rng.permutation(names)[:num_subjects])
    ranks = {
        theme: np.stack([rng.permutation(len(words.split())) for _ in subjects])
        for theme, words in KEYWORDS.items()
    }
    hints = {word: f"sign-{word}" for words in KEYWORDS.values() for word in words.split()}
    return Themes(subjects, ranks, hints)
