"""`jedit audit`: what an edited folder has forgotten, what is left, and what it cost."""

import importlib.util
import itertools
import shlex
from dataclasses import dataclass
from pathlib import Path

from jedit.cli.checks import UsageError
from jedit.cli.stages import Stages
from jedit.core.checks import COUNT, POSITIVE, Range, check_numbers

AUDIT_OUT = Path("out/audit")
ROWS = ("--forget", "--retain")


@dataclass(frozen=True)
class AuditOptions:
    """Audit an edited model's folder beside the original one, however the edit was made."""

    base: Path
    """Folder of the original model (Hugging Face, safetensors)."""
    edited: Path
    """Folder of the edited one: of the same family, shape and vocabulary."""
    data: Path
    """Rows of the original model (JSON lines: question, answer). Optional fields are those of
    `jedit forget`: paraphrased_question, paraphrased_answer, perturbed_answer, forget_span."""
    forget: str
    """Rows that were to be forgotten: a file, FIELD=VALUE[,VALUE], or rows=START:STOP."""
    retain: str = "rest"
    """Rows that were to be kept, in the same ways; best those that the edit did not see."""
    unseen: Path | None = None
    """Rows of the same kind that no model was trained on, a file like --data: what never having
    seen rows looks like. Without them or --retrained, not much can be said of forgetting."""
    retrained: Path | None = None
    """Folder of the same model trained without the rows to forget."""
    tokenizer: Path | None = None
    """Folder of the tokenizer; None: the base's."""
    out: Path = AUDIT_OUT
    """Folder of the report; an earlier audit there is replaced."""
    max_len: int = 256
    """Tokens of a row, at most; longer rows are cut off."""
    batch_size: int = 8
    """Rows evaluated at a time."""
    rows: int = 400
    """Rows of each set that are asked about, at most, spread evenly over it."""
    budget: float = 0.05
    """KL that the rows to keep may pay, nats per token."""
    attacks: bool = True
    """Attack the edited model: teach rows again, round, ask otherwise. This takes most of the
    time."""
    rates: tuple[float, ...] = (1e-5, 1e-4)
    """Adam's learning rates of the attacker who trains; at each point the best for him counts."""
    group: str | None = None
    """Field of the rows to keep by which the cost is told apart (author, topic, ...), beside how
    near each group is to the rows to forget."""
    salt: Path | None = None
    """Salt of an earlier audit (its salt.txt), so that rows have the same hashes; None: that of
    the audit in --out, or a new one."""
    seed: int = 0
    """Of the drawn answers and the attacks' order of rows."""


def audit_command(options: AuditOptions, command: str) -> int:
    """Audit what the options name, and write the report; return the exit code.

    Raises:
        UsageError: a mistake that the user can mend.
    """
    from rich.console import Console

    from jedit.data import DataError, read_rows, select_rows
    from jedit.report.audit_page import check_audit_destination, write_audit

    _check_numbers(options)
    _check_packages()
    folders = {"base": options.base, "edited": options.edited}
    if options.retrained is not None:
        folders["retrained"] = options.retrained
    _check_folders(options, folders)
    try:
        check_audit_destination(options.out)
        rows = read_rows(options.data)
        forget, retain = select_rows(rows, options.forget, options.retain)
        unseen = [] if options.unseen is None else read_rows(options.unseen)
    except (DataError, ValueError) as error:
        raise UsageError(str(error)) from None

    from jedit.recipes.audit import Settings, audit
    from jedit.recipes.audit.comeback import Spending
    from jedit.recipes.audit.rows import SALT_FILE, RowSets, new_salt, read_salt

    settings = Settings(
        max_len=options.max_len,
        batch_size=options.batch_size,
        most=options.rows,
        budget=options.budget,
        attacks=options.attacks,
        spending=Spending(tuple(sorted(set(options.rates)))),
        group=options.group,
        seed=options.seed,
    )
    stages = Stages()
    try:
        earlier = options.out / SALT_FILE
        source = earlier if options.salt is None and earlier.exists() else options.salt
        salt = new_salt() if source is None else read_salt(source)
        with stages:
            found = audit(
                folders,
                RowSets(forget, retain, unseen),
                settings,
                tokenizer=options.tokenizer,
                salt=salt,
                command=_without_values(command),
                say=stages,
            )
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from None
    page = write_audit(found, options.out, salt=salt)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print()
    for section in found.sections:
        console.print(section.title, style="bold")
        for finding in section.findings:
            console.print(f"  {finding.question} {finding.outcome.value}. {finding.sentence}")
    console.print()
    console.print(found.overall.headline, style="bold")
    console.print(found.overall.sentence)
    console.print(
        f"{stages.seconds:.0f} s. Report: {page} (numbers: {options.out / 'audit.json'}; keep "
        f"{options.out / 'salt.txt'} to yourself)"
    )
    return 0


def _check_folders(options: AuditOptions, folders: dict[str, Path]) -> None:
    """Refuse folders that are not there, or that the report would replace.

    Raises:
        UsageError: such a folder, by its name.
    """
    named = {f"--{role}": folder for role, folder in folders.items()}
    if options.tokenizer is not None:
        named["--tokenizer"] = options.tokenizer
    for name, folder in named.items():
        if not folder.is_dir():
            raise UsageError(f"{name} {folder}: there is no such folder.")
        if folder.resolve().is_relative_to(options.out.resolve()):
            raise UsageError(f"{folder}: lies within --out, which is replaced; give another --out.")
    for name in ("base", "retrained"):
        if name in folders and folders[name].resolve() == options.edited.resolve():
            raise UsageError(f"--{name} and --edited are one folder, {folders[name]}.")


def _without_values(command: str) -> str:
    """Return the command line without the values of fields that choose rows: they may be names."""
    words, hidden = shlex.split(command), []
    for before, word in itertools.pairwise(["", *words]):
        option, sign, given = word.partition("=")
        if option in ROWS and sign:
            hidden.append(f"{option}={_without_value(given)}")
        else:
            hidden.append(_without_value(word) if before in ROWS else word)
    return shlex.join(hidden)


def _without_value(chosen: str) -> str:
    field, sign, _ = chosen.partition("=")
    is_open = not sign or field.strip() == "rows" or Path(chosen).is_file()
    return chosen if is_open else f"{field}=..."


def _check_packages() -> None:
    """Refuse to begin what would end hours later for want of a package.

    Raises:
        UsageError: one is not installed.
    """
    for name in ("jinja2", "matplotlib", "qwix", "rouge_score", "scipy", "sklearn"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"jedit audit needs {name}: pip install 'jedit[demo]'")


def _check_numbers(options: AuditOptions) -> None:
    try:
        check_numbers(POSITIVE, **{"--budget": options.budget, "--rates": options.rates})
        check_numbers(COUNT, **{"--batch-size": options.batch_size, "--rows": options.rows})
        check_numbers(Range(8, is_whole=True), **{"--max-len": options.max_len})
    except ValueError as error:
        raise UsageError(f"{error}.") from None
    if not options.rates:
        raise UsageError("--rates must be at least one number.")
