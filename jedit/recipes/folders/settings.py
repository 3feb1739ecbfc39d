"""Settings of the edit of a model folder."""

from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jedit.curvature import Factorize
from jedit.recipes.factorizing import written
from jedit.recipes.folders.choice import NATURAL

KFADE_BUDGET = 0.05
ATTACK_RATE = 1e-5  # of Adam: what open-unlearning trains TOFU's models with
REWIND_RATE = 2 * ATTACK_RATE
STEPS = 48  # natural ones as in `Forgetting`, others as in TOFU's checkpoint preset


class Settings(NamedTuple):
    """Settings of the edit of a model folder.

    Attributes:
        method: "natural", steps that stop by themselves (`jedit.forget`), or the name of a row of
            the catalogue, as `method_named` takes it.
        budget: retain KL that the edit may cost, nats per answer token, on retain rows that it does
            not see; None: 0.05 for K-FADE and pruning by curvature, for other methods
            whatever it takes.
        temperature: of the likelihood in whose curvature it steps; None: the one of
            `choose_temperature`.
        steps: number of steps at most, of natural ones and of a method that trains.
        factorize: how the factors of its curvature are kept; "auto" looks at their size, and at
            what the method takes of them.
        learning_rate: of a method that trains, in its own unit; None: that of `RATES`.
        recovery: number of steps after natural ones that bring back what they cost; 0: none.
        base: folder of the model before it learned the rows, towards which the weights are drawn
            back first; None: natural steps begin at the model.
        rewind: number of steps that train on from there, best two fifths of retraining's.
        rewind_rate: Adam's learning rate in them; 2e-5 is twice what TOFU's models are trained by.
        attack: whether the rows are taught again after the edit, to see what comes back.
        select: regular expression of the paths of the parameters to edit; None: the matrices of the
            blocks, or for a method that trains all that it trains.
        layers: numbers of the blocks whose matrices are edited; empty: as `select` says.
        mesh: devices over which the model is split, and the rows where these divide them.
        ledger: folder of the ledger in which the edit is recorded; None: it is not.
        is_resumable: whether the job is saved on the way, so that the same call goes on with it.
        max_len: number of tokens of a row, at most; longer rows are cut off.
        batch_size: number of rows of a step, and evaluated at a time.
        seed: seed of the split of the retain rows, of the steps and of the curvature's labels.
    """

    method: str = NATURAL
    budget: float | None = None
    temperature: float | None = None
    steps: int = STEPS
    factorize: Factorize = Factorize("auto")
    learning_rate: float | None = None
    recovery: int = 48
    base: Path | None = None
    rewind: int = 100
    rewind_rate: float = REWIND_RATE
    attack: bool = True
    select: str | None = None
    layers: tuple[int, ...] = ()
    mesh: Mesh | None = None
    ledger: Path | None = None
    is_resumable: bool = True
    max_len: int = 256
    batch_size: int = 8
    seed: int = 0

    def given(self) -> list[str]:
        """Return the names of the settings that are not at their defaults."""
        return [name for name, x in self._field_defaults.items() if getattr(self, name) != x]

    def to_json(self) -> dict[str, Any]:
        """Return what results and ledgers say of them."""
        found = self._asdict()
        for name in ("base", "ledger"):
            found[name] = None if found[name] is None else str(found[name])
        found["factorize"] = written(self.factorize)
        found["layers"] = list(self.layers)
        found["mesh"] = None if self.mesh is None else dict(self.mesh.shape)
        return found
