"""What each command may be told, as dataclasses that tyro reads."""

import dataclasses
from pathlib import Path
from typing import Literal

# As `jedit.kfac` takes it; see `jedit.cli.rows.factorize_of`.
Factors = Literal["eigh", "cholesky", "inverse", "auto"]
DEMO_OUT, COMPARE_OUT, TOFU_OUT = Path("out/demo"), Path("out/compare"), Path("out/tofu")


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train, forget, compare and report on scenes that need nothing from outside."""

    scene: Literal["digits", "authors", "recommendation", "stream", "all"] = "all"
    """Which scene: handwritten digits and a CNN, invented authors and a GPT, or both; or a small
    recommender that forgets some users, or a stream of tasks learnt one after the other and what
    stays of them; these two are run when they are asked for."""
    methods: Literal["main", "all"] = "main"
    """The main methods, in minutes, or all that fit the scene (stream: learners and streams)."""
    interactions: Path | None = None
    """For the recommendation scene: CSV with the columns user, item and time (MovieLens's names
    will do), in the place of seeded choices."""
    forgotten: Literal["users", "choices"] = "users"
    """For the recommendation scene: all that some users chose, or the half of it they withdraw."""
    num_seeds: int = 3
    """For the stream scene: how many seeds, counted from --seed."""
    out: Path = DEMO_OUT
    """Folder of the report; an earlier report there is replaced."""
    seed: int = 0
    """Of everything random."""


@dataclasses.dataclass(frozen=True)
class Compare:
    """Train a small GPT on your questions and answers (JSON lines), and compare methods on it."""

    data: Path
    """All rows that the model learns. Optional fields: paraphrased_answer, perturbed_answer (a list
    of wrong answers), paraphrased_question, alternate_answer (what AltPO prefers), and others to
    choose rows by."""
    forget: str
    """Rows to forget: a file, FIELD=VALUE[,VALUE] (author=Jane Doe), or rows=START:STOP counted
    from 0."""
    retain: str = "rest"
    """Rows to keep, in the same ways; rest: all that are not forgotten."""
    out: Path = COMPARE_OUT
    """Folder of the report; an earlier report there is replaced."""
    width: int = 128
    """Width of the GPT."""
    layers: int = 4
    """Blocks of the GPT."""
    heads: int = 4
    """Heads of its attention; they divide the width."""
    epochs: tuple[int, ...] = (20,)
    """Passes over the rows; with several numbers the comparison is made after each."""
    vocab: int = 2048
    """Tokens of the vocabulary, at most."""
    max_len: int = 128
    """Tokens of a row, at most; longer rows are cut off."""
    batch_size: int = 16
    """Rows of a training step."""
    learning_rate: float = 1e-3
    """Of Adam, in training."""
    methods: tuple[str, ...] = ()
    """Some of the methods alone, by name, or others of the catalogue. None given: the main ones."""
    factorize: Factors | None = None
    """How factors of curvatures are kept: eigh, with all eigenvectors; cholesky or inverse, with
    none, for methods that take damped solves or matrices alone; auto: by size, with none beyond
    8192 columns where no method takes them. None: auto, or with --rank eigh."""
    rank: int | None = None
    """Leading eigenvectors that are kept of a factor, the rest by their mean; of long ones alone
    with --factorize auto."""
    seed: int = 0
    """Of everything random."""


@dataclasses.dataclass(frozen=True)
class Tofu:
    """Run the TOFU benchmark end to end."""

    data: str = "locuslab/TOFU"
    """TOFU's folder (full.json, forget10_perturbed.json, ...), or its name on the hub."""
    preset: Literal["cpu", "gpu", "checkpoint"] = "cpu"
    """cpu: 60 authors and a GPT of 2 million parameters; gpu: all 200 and 100 million; checkpoint:
    all 200 and a model of your own."""
    model: Path | None = None
    """With --preset checkpoint: folder of a pretrained model (Hugging Face, safetensors). With
    --retrained it has learned all of TOFU's authors; else it learns them here, and a second time
    without those to forget."""
    retrained: Path | None = None
    """Folder of the same model trained without the authors to forget (TOFU's retain90 for 20 of
    them, retain95 for 10, retain99 for 2)."""
    tokenizer: Path | None = None
    """Folder of the model's tokenizer; None: the model's."""
    protocol: Literal["strict", "field"] = "strict"
    """strict: six retain authors, which judge, are held out of the methods' sight; field: methods
    see all retain rows, as the field's do, which goes with --seeds or --grid published."""
    grid: Literal["preset", "published"] = "preset"
    """With --preset checkpoint: the preset's points of each method, or the grids that the field has
    tuned its baselines on (54 runs of NPO), trained as the field does."""
    seeds: tuple[int, ...] = ()
    """With --preset checkpoint: every point by each of these seeds, run by run: a sweep that was
    killed goes on at the next. None given: one comparison by --seed; or, on the published grids,
    a sweep by it."""
    save: str | None = None
    """With --model: a method whose best model is written to OUT-edited, a folder like --model."""
    forgotten: int | None = None
    """Authors to forget, at most 20; None: the preset's."""
    methods: tuple[str, ...] = ()
    """Some of the methods alone, by name. None given: all."""
    factorize: Factors | None = None
    """How factors of curvatures are kept: eigh, with all eigenvectors; cholesky or inverse, with
    none, for methods that take damped solves or matrices alone; auto: by size, with none beyond
    8192 columns where no method takes them. None: auto, or with --rank eigh."""
    rank: int | None = None
    """Leading eigenvectors that are kept of a factor, the rest by their mean; of long ones alone
    with --factorize auto."""
    attacks: bool = True
    """Attack the best models: relearning, quantisation, other words, probes. A sweep (--seeds,
    --grid published) makes none of these attacks."""
    out: Path = TOFU_OUT
    """Folder of the report; an earlier report there is replaced."""
    seed: int = 0
    """Of everything random; beside --seeds, which take its place, it has no part."""
