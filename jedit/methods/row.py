"""What a row of the catalogue is: a method's name, what it needs, and how it is made of that.

Methods come in four kinds, by what makes them stronger: training goes on for more steps
(`BySteps`), or over more draws of the model's own answers (`ByDraws`), an edit, or the share of the
weights that it takes, is multiplied by a scale (`ByScale`), or a price in retain KL is spent
(`ByBudget`).
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping
from typing import Any

import optax
from jaxtyping import Array, PyTree

from jedit.core.batch import Batch
from jedit.curvature import Curvature, Factorize
from jedit.edits import Edit
from jedit.objectives import Dialogue, GradedRows
from jedit.objectives.attention_shift import AttentionReader
from jedit.objectives.sae_guided import LatentMeans
from jedit.training import TrainingMethod

# The learning rate stands in the optimizer's state, so that a grid of them compiles once; 1e-5 is
# open-unlearning's.
ADAM = optax.inject_hyperparams(optax.adam, static_args=("b1", "b2", "eps", "eps_root"))(
    learning_rate=1e-5
)
SHARE = "share"  # the setting that a scale of `Reach.SHARE` multiplies
# What methods are run on as the forget set: rows, with others beside them, or graded.
ForgetRows = Batch | tuple[Batch, Batch] | GradedRows
# `(apply, params, *, forget, retain) -> (Edit, Info)`, which `jedit.run_method` runs.
ClosedForm = Callable[..., tuple[Edit, Any]]
# `(apply, params, *, steps, key, ...) -> (Edit, Info)`, which is called by itself.
Drawing = Callable[..., tuple[Edit, Any]]


class Need(enum.Enum):
    """What a method needs beside a model, a forget set and a retain set; a field of `Material`."""

    CURVATURE = "retain curvature"
    CORRECTED = "EK-FAC of the retain rows"
    TARGET_MOMENTS = "moments of the forget answers"
    REST_MOMENTS = "moments of the retain answers"
    HIDDEN_SITE = "a hidden site"
    LAYERS = "layers to write into"
    SUBJECTS = "a position in each forget row"
    REFUSALS = "refusals"
    ALTERNATES = "alternate answers"
    DIALOGUE = "answers that are drawn and judged"
    NUM_CLASSES = "the number of classes"
    RETAIN = "retain rows beforehand"
    STEPS = "the number of steps"
    ATTENTION = "attention weights"
    LATENTS = "latents of known and of unknown rows"

    @property
    def field(self) -> str:
        """The field of `Material` that holds it."""
        return self.name.lower()


class Spectrum(enum.Enum):
    """What a method takes of its curvatures' factors: which does without eigenvectors."""

    SOLVES = "damped solves"
    MATRICES = "the matrices of the factors"
    LEADING = "leading eigenvectors"
    ALL = "all eigenvectors"

    def allows(self, how: Factorize) -> bool:
        """Whether factors that are kept so, whatever their size, have what is taken of them.

        By "auto" long ones have no eigenvectors, or the leading ones where it has a rank.
        """
        if how.rank is not None:
            return self in (Spectrum.SOLVES, Spectrum.LEADING)
        return how.by == "eigh" or self in (Spectrum.SOLVES, Spectrum.MATRICES)


class Pace(enum.Enum):
    """Which learning rates suit a method that trains: a grid has some for each pace."""

    PLAIN_ASCENT = "nothing bounds or opposes the objective"
    UNBOUNDED = "nothing bounds the objective from below; a retain term opposes it"
    BOUNDED = "the objective is bounded from below"
    ADAM_METRIC = "the step stands in Adam's metric, its length is the gradient's"
    PREDICTED_KL = "the rate is the predicted retain KL of one step, nats per output"
    STEP_LENGTH = "the rate is the Euclidean length of one step, all parameters together"
    DESCENT = "the retain loss alone is lowered"


class Reach(enum.Enum):
    """Which scales suit an edit that is multiplied by one."""

    WHOLE = "1 is the whole edit"
    FACTS = "1 fits the target values, more goes beyond them"
    SHARE = "it multiplies the share of the weights that are set to zero; no part of one is"


@dataclasses.dataclass(frozen=True)
class Material:
    """What a scene can give to a method; what it cannot give is None.

    Attributes:
        apply: `apply(params, inputs) -> outputs`.
        params: the trained parameters.
        forget: rows to be forgotten.
        optimizer: what methods that train step by; by default `ADAM`, at a learning rate of 1e-5,
            in whose state the rate can be set. GU, RepSelect and NPO by natural steps bring their
            own.
        curvature: of the retain outputs, best at the temperature of `choose_temperature`.
        corrected: EK-FAC of the retain outputs.
        target_moments: curvature of the forget rows, of a text at its answers' tokens alone.
        rest_moments: of the retain rows, likewise.
        hidden_site: name of a site; what enters it is the hidden state that some methods turn.
        layers: paths of the matrices that facts are written into, by depth.
        subjects: (n,) position in each forget row where a fact is met; None where outputs have no
            positions, which `has_positions` says.
        refusals: rows with refusals in place of the forget rows' answers.
        alternates: rows with plausible wrong answers in their place: one for each forget row, or
            several, all first ones before all second ones.
        dialogue: what RULE is taught by and asks.
        num_classes: of the outputs.
        retain: rows to be kept, for what is measured on them before a method is run.
        steps: how many a method that trains will take, at most.
        attention: how the model's attention is read, `tracing.AttentionMaps()` where it has some.
        latents: a sparse autoencoder of the hidden site with the means of known and of unknown
            rows, as `methods.fit_latents` makes it.
        has_positions: whether the outputs of a row are several.
    """

    apply: Callable[[PyTree, PyTree], Array]
    params: PyTree
    forget: Batch
    optimizer: optax.GradientTransformation = ADAM
    curvature: Curvature | None = None
    corrected: Curvature | None = None
    target_moments: Curvature | None = None
    rest_moments: Curvature | None = None
    hidden_site: str | None = None
    layers: tuple[str, ...] | None = None
    subjects: Array | None = None
    refusals: Batch | None = None
    alternates: Batch | None = None
    dialogue: Dialogue | None = None
    num_classes: int | None = None
    retain: Batch | None = None
    steps: int | None = None
    attention: AttentionReader | None = None
    latents: LatentMeans | None = None
    has_positions: bool = True

    def gives(self, need: Need) -> bool:
        """Whether it holds what is needed."""
        if need is Need.SUBJECTS and not self.has_positions:
            return True
        return getattr(self, need.field) is not None

    def take(self, need: Need) -> Any:
        """Return what is needed, of which `Row.of` has seen that it is there."""
        return getattr(self, need.field)


@dataclasses.dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        name: as it is shown and asked for.
        description: what it does, one sentence.
        when: when to use it, a clause for the table of all methods.
        papers: arXiv numbers.
        make: of `Material` and settings, the method.
        needs: what the material must hold.
        settings: keyword arguments of `make` with the values it is run at: the published ones.
        is_ours: whether it, or what it adds to the papers', is this project's.
        variant_of: name of the row beside which the table of all methods shows this one; None:
            it has a line.
        spectrum: what it takes of the factors of its curvatures, if it needs any.
    """

    name: str
    description: str
    when: str
    papers: tuple[str, ...]
    make: Callable[..., Any]
    needs: frozenset[Need] = frozenset()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_ours: bool = False
    variant_of: str | None = None
    spectrum: Spectrum = Spectrum.ALL

    def missing(self, material: Material) -> tuple[Need, ...]:
        """What the method needs and the material does not hold."""
        return tuple(need for need in Need if need in self.needs and not material.gives(need))

    def of(self, material: Material, **settings: Any) -> Any:
        """Return the method, made of the material at its own settings or those given.

            rows = row.forget_rows(material)  # wrong labels, refusals, or the rows themselves
            edit, info = run_method(row.of(material), apply, params, rows, retain, ...)

        A row of the kind `ByBudget` takes `budget=` here too, and its method wants one.

        Raises:
            ValueError: the material lacks something, or there is no such setting.
        """
        if lacking := self.missing(material):
            fields = ", ".join(f"{need.field}= ({need.value})" for need in lacking)
            raise ValueError(f"{self.name} needs {fields} of the material")
        if unknown := sorted(set(settings) - set(self.settings)):
            known = ", ".join(self.settings) or "none"
            raise ValueError(f"{self.name} has no setting {', '.join(unknown)}; it has {known}")
        return self.make(material, **{**self.settings, **settings})

    def forget_rows(self, material: Material) -> ForgetRows:
        """Return the rows that the method is to be run on as the forget set."""
        return material.forget


@dataclasses.dataclass(frozen=True, kw_only=True)
class BySteps(Row):
    """A method that trains; its strength is the number of steps.

    Attributes:
        pace: which learning rates suit it.
        prepare: of the material, the forget set that it trains on; None: the forget rows.
    """

    make: Callable[..., TrainingMethod]
    pace: Pace
    prepare: Callable[[Material], ForgetRows] | None = None

    def forget_rows(self, material: Material) -> ForgetRows:
        """Return the forget set that the method trains on: with other labels, say, or refusals."""
        return material.forget if self.prepare is None else self.prepare(material)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByDraws(Row):
    """A method that learns from answers that the model draws; its strength is how often it draws.

    What `of` makes is called by itself, as `run_method` knows nothing of draws:

        edit, info = row.of(material)(apply, params, steps=20, key=key)

    It takes `trainable=`, `batch_size=` and `look=` too.
    """

    make: Callable[..., Drawing]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByScale(Row):
    """A method that makes one edit, which is multiplied by a scale: its strength.

    Attributes:
        reach: which scales suit it, and what they multiply: of `Reach.SHARE` the setting `share`.
    """

    make: Callable[..., ClosedForm]
    reach: Reach = Reach.WHOLE

    def scaled(self, material: Material, scale: float, **settings: Any) -> tuple[ClosedForm, float]:
        """Return the method at a scale, and what its edit is still to be multiplied by.

        Raises:
            ValueError: what `of` refuses.
        """
        if self.reach is not Reach.SHARE:
            return self.of(material, **settings), scale
        share = scale * {**self.settings, **settings}[SHARE]
        return self.of(material, **{**settings, SHARE: share}), 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByBudget(Row):
    """A closed form that takes `budget=`, the true retain KL it may cost: its strength."""

    make: Callable[..., ClosedForm]

    def of(self, material: Material, *, budget: float | None = None, **settings: Any) -> ClosedForm:
        """Return the method, as `Row.of`; without a budget it is the caller who gives one."""
        method = super().of(material, **settings)
        return method if budget is None else functools.partial(method, budget=budget)
