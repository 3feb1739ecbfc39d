"""Whether a text refuses to answer, and RULE's rewards for refusing where it should [code].

    to a forget question      R = 1/2 [refuses] + 1/2 [refuses and names the target]
    to a boundary question    R = 1/2 [does not refuse] + 1/2 [does not and ROUGE-L recall > 0.3]

A text refuses if one of `REFUSING` is found in it, whatever the case and the apostrophe.

Differences.  The reward and its 0.3 are those of the released code [code].  An answer without a
word, which is no refusal, earns nothing (ours; by the formula a half).  The list of phrases is
ours: of the hundred refusals that TOFU gives for IdkDPO, which it was made of, it finds all, and of
TOFU's 4,000 answers none; of refusals in other words it finds fewer.  A list is no judge: it counts
an answer that quotes a refusal.  The target is found as a run of whole words, whatever the case.
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from jedit.core.checks import SHARE, check_numbers
from jedit.metrics.rouge import rouge

REFUSING = (
    r"\bi (really |just )?(do not|don't) (really |seem to )?(know|have|recall|possess|hold)\b",
    r"\bi('m| am) (unsure|unaware|unable|sorry|afraid|clueless|stumped|blank|drawing a blank)\b",
    r"\bi('m| am) not (sure|certain|aware|familiar|informed|equipped|able|acquainted|privy)\b",
    r"\bi('m| am) not (well-versed|knowledgeable|briefed|the (best|right)) ",
    r"\bi('m| am) (at a (loss|disadvantage)|in the dark|lacking|missing information)\b",
    r"\bi (cannot|can't|can not|could not|couldn't) "
    r"(answer|help|say|tell|provide|share|assist|shed)\b",
    r"\bi('ve| have| seem to have) (got )?no "
    r"(idea|information|knowledge|insight|clue|data|familiarity|enlightenment)\b",
    r"\bi (have not|haven't|'ve not) (been|learned|learnt|encountered|the faintest)\b",
    r"\bi('ve| have) (yet to|come up short|not (been|learned|learnt|encountered))\b",
    r"\bi lack (the|any|insight|information|knowledge)\b",
    r"\bi (must decline|wish i could say)\b",
    r"\bmy (databases?|training|programming|resources|understanding|knowledge|capabilities) "
    r"(do not|don't|does not|doesn't|did not|didn't|is limited)\b",
    r"\b(beyond|outside|out of|not within|not in|blind spot in) my (current )?(knowledge|expertise"
    r"|reach|scope|field|dataset)\b",
    r"\b(not|hasn't been|uncharted territory) (been )?(included in|for) my (training|knowledge)\b",
    r"\bsomething (that )?i('ve yet|'m not| am not| need) ",
    r"\bnot something (that )?i('m| am) ",
    r"\boutside my area\b",
    r"\b(mystery|unknown) to me\b",
    r"\b(area|topic|information) (that )?i('m not| am not|'ve (not )?been)\b",
    r"^\s*(sorry|unfortunately, i|no idea)\b",
)
_REFUSING = re.compile("|".join(f"(?:{phrase})" for phrase in REFUSING))


def refuses(texts: Sequence[str]) -> Bool[np.ndarray, " n"]:
    """Return which texts refuse to answer, by the phrases of `REFUSING`.

    Raises:
        ValueError: if `texts` is one string.
    """
    if isinstance(texts, str):
        raise ValueError("expected a sequence of texts, got a string; put it in a list")
    return np.array([_is_refusal(text) for text in texts], bool)


def refusal_rewards(generations: Sequence[str], targets: Sequence[str]) -> Float[np.ndarray, " n"]:
    """Return RULE's rewards of answers to questions that are to be refused.

    Args:
        generations: what the model answered.
        targets: what each question is about, a name; an empty one is never named.

    Returns:
        0 for an answer, 0.5 for a refusal, 1 for one that names the target.

    Raises:
        ValueError: there are not as many targets as generations, or one of them is a string.
    """
    is_refusal = refuses(generations)
    _check_pairs(generations, targets, "target")
    named = [_names(text, target) for text, target in zip(generations, targets, strict=True)]
    return 0.5 * is_refusal + 0.5 * (is_refusal & np.array(named, bool))


def answer_rewards(
    generations: Sequence[str], answers: Sequence[str], *, least: float = 0.3
) -> Float[np.ndarray, " n"]:
    """Return RULE's rewards of answers to boundary questions, which are to be answered.

    Args:
        generations: what the model answered.
        answers: the true answers.
        least: the ROUGE-L recall above which an answer counts as right; 0.3, RULE's.

    Returns:
        0 for a refusal and for an answer without a word, 0.5 for another one, 1 for a right one.

    Raises:
        ValueError: there are not as many answers as generations, or one of them is a string.
        ImportError: rouge-score is not installed.
    """
    check_numbers(SHARE, least=least)
    answered = ~refuses(generations) & np.array([bool(x.strip()) for x in generations], bool)
    _check_pairs(generations, answers, "answer")
    is_right = rouge(answers, generations).rougeL_recall > least
    return 0.5 * answered + 0.5 * (answered & is_right)


def _is_refusal(text: str) -> bool:
    return bool(_REFUSING.search(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")))


def _names(text: str, target: str) -> bool:
    words = re.escape(target.lower().strip())
    return bool(words) and bool(re.search(rf"(?<!\w){words}(?!\w)", text.lower()))


def _check_pairs(generations: Sequence[str], others: Sequence[str], kind: str) -> None:
    if isinstance(others, str):
        raise ValueError("expected a sequence of texts, got a string; put it in a list")
    if len(generations) != len(others):
        raise ValueError(
            f"expected one {kind} per generation, got {len(others)} for {len(generations)}"
        )
