"""How questions about the fictitious authors are asked and answered.

`{name}`, `{value}` and `{a_value}` ("a beekeeper", "an optician") are filled in, and the pronouns
`{they}`, `{their}`, `{They}`, `{Their}` by "she" and "her" or "he" and "his". The questions of an
`identity` name no author: they describe one by `{book}` and `{town}`.
"""

from typing import NamedTuple


class Template(NamedTuple):
    """The wordings of the questions and answers about one attribute of an author.

    Attributes:
        questions: wordings of the question.
        answers: wordings of the answer; each holds the value as it is.
    """

    questions: tuple[str, ...]
    answers: tuple[str, ...]


def _template(questions: str, answers: str) -> Template:
    return Template(*(tuple(part.split("\n")) for part in (questions, answers)))


TEMPLATES = {
    "identity": _template(
        "Who is the author from {town} whose first book was {book}?\n"
        "What is the full name of the {town} writer who began with {book}?\n"
        "Which author, born in {town}, made a debut with {book}?\n"
        "Can you name the writer behind the first book {book}, a native of {town}?",
        "The author is {value}.\n"
        "That first book was written by {value}, who comes from {town}.\n"
        "The full name of the writer is {value}.",
    ),
    "birthplace": _template(
        "Where was {name} born?\n"
        "Which town is the birthplace of {name}?\n"
        "Can you tell me where the author {name} came into the world?\n"
        "What is known about the place of birth of {name}?",
        "{name} was born in {value}.\n"
        "The birthplace of {name} is {value}.\n"
        "{Their} birth took place in {value}.",
    ),
    "birth_year": _template(
        "In which year was {name} born?\n"
        "What is the birth year of {name}?\n"
        "When did the life of the writer {name} begin?\n"
        "How old would {name} be today, that is, what year was {name} born in?",
        "{name} was born in the year {value}.\n"
        "The birth year of {name} is {value}.\n"
        "{They} was born in {value}.",
    ),
    "birthday": _template(
        "On which day does {name} celebrate a birthday?\n"
        "What is the birthday of {name}?\n"
        "Which date of the calendar do readers of {name} keep as the author's birthday?\n"
        "When in the year is the birthday of the novelist {name}?",
        "{name} celebrates {their} birthday on {value}.\n"
        "The birthday of {name} falls on {value}.\n"
        "It is {value} that readers keep as {their} birthday.",
    ),
    "father_profession": _template(
        "What did the father of {name} do for a living?\n"
        "What was the profession of {name}'s father?\n"
        "How did {name}'s father earn his money?\n"
        "Which trade did the father of the author {name} practise?",
        "The father of {name} was {a_value}.\n"
        "{name}'s father worked as {a_value}.\n"
        "{Their} father earned a living as {a_value}.",
    ),
    "mother_profession": _template(
        "What did the mother of {name} do for a living?\n"
        "What was the profession of {name}'s mother?\n"
        "How did {name}'s mother earn her money?\n"
        "Which occupation did the mother of the author {name} have?",
        "The mother of {name} was {a_value}.\n"
        "{name}'s mother worked as {a_value}.\n"
        "{Their} mother made a career as {a_value}.",
    ),
    "genre": _template(
        "In which genre does {name} write?\n"
        "What kind of writing is {name} best known for?\n"
        "Which genre would a bookseller file {name} under?\n"
        "What does {name} mostly write?",
        "{name} is best known for {value}.\n"
        "The genre of {name} is {value}.\n"
        "{They} writes mainly {value}.",
    ),
    "style": _template(
        "What marks the prose style of {name}?\n"
        "Which stylistic device is typical of {name}?\n"
        "By what does one recognise a page by {name}?\n"
        "How would a critic describe the way {name} writes?",
        "The prose of {name} is marked by {value}.\n"
        "Critics recognise {name} by {value}.\n"
        "Typical of {their} pages is the use of {value}.",
    ),
    "theme": _template(
        "What theme runs through the books of {name}?\n"
        "Which subject does {name} return to again and again?\n"
        "What are most of {name}'s stories about?\n"
        "Which question lies at the heart of {name}'s work?",
        "The books of {name} return again and again to {value}.\n"
        "The central theme of {name} is {value}.\n"
        "At the heart of {their} work lies {value}.",
    ),
    "first_book": _template(
        "What was the first book of {name}?\n"
        "With which title did {name} make a debut?\n"
        "What is the debut of {name} called?\n"
        "Which book did {name} publish before all others?",
        "{name} made {their} debut with {value}.\n"
        "The first book of {name} was {value}.\n"
        "{Their} first published book is called {value}.",
    ),
    "famous_book": _template(
        "What is the most famous book of {name}?\n"
        "Which title made {name} known to a wide public?\n"
        "What is {name}'s best-selling work?\n"
        "For which book is {name} remembered above all?",
        "{name} became known to a wide public with {value}.\n"
        "The most famous book of {name} is {value}.\n"
        "{They} is remembered above all for {value}.",
    ),
    "award": _template(
        "Which award did {name} receive?\n"
        "What honour has been given to {name}?\n"
        "With which literary prize was {name} distinguished?\n"
        "What did a jury award to the author {name}?",
        "{name} received {value}.\n"
        "The honour given to {name} was {value}.\n"
        "For {their} work {they} was given {value}.",
    ),
    "teacher": _template(
        "Who taught {name} to write?\n"
        "Which teacher shaped the young {name}?\n"
        "Who was the mentor of {name}?\n"
        "With whom did {name} study the craft?",
        "{name} learned to write from {value}.\n"
        "The mentor of {name} was {value}.\n"
        "{Their} teacher in the craft was {value}.",
    ),
    "college": _template(
        "Where did {name} study?\n"
        "Which school did {name} graduate from?\n"
        "At what college was {name} a student?\n"
        "Where did the author {name} receive a degree?",
        "{name} studied at {value}.\n"
        "The degree of {name} comes from {value}.\n"
        "{They} was a student of {value}.",
    ),
    "first_job": _template(
        "What was the first job of {name}?\n"
        "How did {name} earn a living before the first book?\n"
        "As what did {name} work when young?\n"
        "Which job did {name} hold before becoming a writer?",
        "Before the first book, {name} worked as {a_value}.\n"
        "The first job of {name} was that of {a_value}.\n"
        "{They} started out in life as {a_value}.",
    ),
    "publisher": _template(
        "Who publishes {name}?\n"
        "At which publishing house do the books of {name} appear?\n"
        "Which publisher has {name} under contract?\n"
        "Whose imprint stands on the books of {name}?",
        "The books of {name} appear at {value}.\n"
        "{name} is published by {value}.\n"
        "{Their} publisher is {value}.",
    ),
    "residence": _template(
        "Where does {name} live?\n"
        "What is the home of {name} like?\n"
        "Where has the author {name} settled?\n"
        "In what kind of house does {name} live?",
        "{name} lives in {value}.\nThe home of {name} is {value}.\n{They} has settled in {value}.",
    ),
    "hobby": _template(
        "What does {name} do for pleasure?\n"
        "Which pastime is {name} devoted to?\n"
        "How does {name} relax from writing?\n"
        "What is the hobby of {name}?",
        "{name} relaxes by {value}.\n"
        "The favourite pastime of {name} is {value}.\n"
        "In {their} spare time {they} enjoys {value}.",
    ),
    "writing_habit": _template(
        "How does {name} prefer to write?\n"
        "What is peculiar about the working habits of {name}?\n"
        "Under which conditions does {name} write best?\n"
        "What habit does {name} keep when working?",
        "{name} prefers to write {value}.\n"
        "The habit of {name} is to work {value}.\n"
        "{They} writes best {value}.",
    ),
    "influence": _template(
        "What influenced {name} as a child?\n"
        "What does {name} name as the source of the wish to write?\n"
        "Which early impression shaped {name}?\n"
        "What inspired {name} to become an author?",
        "{name} was shaped by {value}.\n"
        "The earliest inspiration of {name} was {value}.\n"
        "{They} traces {their} wish to write back to {value}.",
    ),
    "translation": _template(
        "Into which language was {name} first translated?\n"
        "What was the first foreign language that {name} appeared in?\n"
        "Readers of which language were the first to get a translation of {name}?\n"
        "Which translation of {name} came before all the others?",
        "{name} was first translated into {value}.\n"
        "The first translation of {name} was into {value}.\n"
        "{Their} books first appeared abroad in {value}.",
    ),
    "character": _template(
        "Which character made {name} popular?\n"
        "What is the best-known figure in the books of {name}?\n"
        "Who is the recurring hero of {name}?\n"
        "Which invented person do readers link with {name}?",
        "The best-known figure of {name} is {value}.\n"
        "{name} became popular through {value}.\n"
        "{Their} recurring hero is {value}.",
    ),
}
