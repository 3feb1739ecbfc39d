"""Direct preference optimisation towards refusals: DPO, and IdkDPO (Rafailov et al. 2023; TOFU).

    loss = -(2/β) E log σ( β [ NLL(y) - NLL_ref(y) - NLL(r) + NLL_ref(r) ] )

y is the answer to be forgotten, r what is to be said in its place ("I do not know"), NLL the sum
over the tokens that count; E the mean over the pairs of which both have one. β = 0.1 is
open-unlearning's [code].

AltPO, alternate preference optimisation (Mekala et al., arXiv 2409.13474), is the same loss with
`with_retain` at a weight of 1, sums over tokens and no normalisation by length [code]; r is an
alternate answer, plausible and wrong. Its β is unset in the released configuration; 0.1 stands
beside it, and is the middle of the grid that open-unlearning's page states. A pair whose r is y has
a gradient of zero: a question without an alternate falls out.

Differences. AltPO's code samples alternates at temperature 1 from the model, prompted with the
question, the answer, and an instruction to change its facts, five to a question in the files it
comes with. `CATALOGUE["AltPO"]` takes those it is given, one to each forget row or several; the
comparisons sample one, by the question alone, as their small models follow no instruction, and at
higher temperatures what at 1 is the answer.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.checks import POSITIVE, check_numbers
from jedit.core.outputs import by_example
from jedit.objectives.objective import Value, needed
from jedit.objectives.token_nll import counted_nll, masked_mean, sequence_nll


@dataclasses.dataclass(frozen=True)
class DPO:
    """Preference of refusals, or of alternate answers, to answers, against the reference.

    Attributes:
        beta: β, the factor of the preference inside the sigmoid, an inverse temperature.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        check_numbers(POSITIVE, beta=self.beta)

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: tuple[Batch, Batch],
        retain: Batch | None = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the DPO loss; `forget` is (answers, refusals or alternates), pair by pair.

        It costs four forward passes, two of them of the reference.
        """
        reference = needed(reference, self)
        growth, is_whole = [], []
        for batch in forget:
            nll, counted = counted_nll(apply, params, batch)
            before = jax.lax.stop_gradient(sequence_nll(apply, reference, batch))
            growth.append(jnp.sum(by_example(batch, nll), axis=-1) - before)
            is_whole.append(jnp.any(by_example(batch, counted), axis=-1))
        is_pair = is_whole[0] & is_whole[1]
        terms = -(2 / self.beta) * jax.nn.log_sigmoid(self.beta * (growth[0] - growth[1]))
        return masked_mean(terms, is_pair), {
            "answer_nll_growth": masked_mean(growth[0], is_pair),
            "refusal_nll_growth": masked_mean(growth[1], is_pair),
        }
