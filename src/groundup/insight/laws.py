"""Published laws of scale, as pure functions. Losses are in nats a token of the text and tokenizer that a law was fitted
on: they compare ways to spend a budget, they do not foretell the loss of another text."""

import math
from dataclasses import dataclass

FLOPS_A_PARAMETER = 6
"""Operations of training for each parameter and token, as the laws count them."""
ANSWER_FLOPS_A_PARAMETER = 2
"""The same of generating."""


@dataclass(frozen=True)
class LossLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta of N parameters and D tokens (Hoffmann et al., arXiv:2203.15556, eq. 2)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats a token."""
        return self.E + self.of_parameters(parameters) + self.of_tokens(tokens)

    def of_parameters(self, parameters: float) -> float:
        """What more parameters would take away."""
        return self.A / parameters**self.alpha

    def of_tokens(self, tokens: float) -> float:
        """What more tokens would take away."""
        return self.B / tokens**self.beta

    def best_split(self, flops: float) -> tuple[float, float]:
        """(parameters, tokens) of the least loss for 6 N D operations (Hoffmann et al., eq. 4)."""
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        products = flops / FLOPS_A_PARAMETER
        parameters = ratio * products ** (self.beta / (self.alpha + self.beta))
        return parameters, products / parameters

    def best_parameters(self, tokens: float) -> float:
        """Parameters that these tokens are best for: where both last terms fall equally fast."""
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return float((tokens * ratio ** (1 + self.alpha / self.beta)) ** (self.beta / self.alpha))

    def tokens_for(self, loss: float, parameters: float) -> float:
        """Tokens that bring a model to a loss; infinite where it is too small for it."""
        left = loss - self.E - self.of_parameters(parameters)
        return (self.B / left) ** (1 / self.beta) if left > 0 else math.inf


POWER = 0.3
"""Of the perplexity, in which what parameters and tokens leave adds up for small models (docs/scale.md)."""
FLOOR_NATS_A_BYTE = 1.6934 / 3.9
"""What no model takes away: E of Hoffmann et al. 2022 over the bytes of a token of their text, MassiveText (Rae et al.,
arXiv:2112.11446: bytes over tokens of its parts, weighted as they are sampled)."""


@dataclass(frozen=True)
class PerplexityLaw:
    """exp(s L) = exp(s E) + A / N^alpha + B / D^beta: the terms of Hoffmann et al. add up in a power s of the perplexity.

    Near its floor it is theirs, E + (A / N^alpha + B / D^beta) / (s exp(s E)), and s = 0 is theirs everywhere. Far above the
    floor, where every run of minutes is, it falls in proportion to the logarithm of the operations, and what parameters
    gain grows with the tokens; their sum of losses does neither.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    power: float = POWER

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats a token."""
        terms = self.A / parameters**self.alpha + self.B / tokens**self.beta
        if self.power == 0:
            return self.E + terms
        return math.log(math.exp(self.power * self.E) + terms) / self.power


CHINCHILLA = LossLaw(E=1.6934, A=406.4, B=410.7, alpha=0.3392, beta=0.2849)
"""Hoffmann et al. 2022, arXiv:2203.15556, eq. 10, with the digits of its source (Besiroglu et al. 2024, table 1)."""
REPLICATION = LossLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
"""Besiroglu et al. 2024, arXiv:2404.10102: the same runs, fitted to convergence; it agrees with the other two approaches
of Hoffmann et al."""
REPEATED = LossLaw(E=math.exp(0.6254804), A=math.exp(6.255414), B=math.exp(7.3049974), alpha=0.3526596, beta=0.3526596)
"""Muennighoff et al. 2023, arXiv:2305.16264, appendix A: the law that their half-lives belong to."""
TOKENS_HALF_LIFE, PARAMETERS_HALF_LIFE = 15.387756, 5.309743
"""Repetitions after which what is repeated is worth 1 - 1/e of fresh tokens on average, and the same of parameters beyond
what the unique tokens are best for (Muennighoff et al. 2023, appendix A)."""


def worth(total: float, unique: float, half_life: float) -> float:
    """What `total`, of which only `unique` is new, is worth: U + U R* (1 - exp(-R / R*)) with R = total / U - 1 (Muennighoff
    et al. 2023, eq. 5). Never more than total."""
    if total <= unique:
        return total
    return unique * (1 + half_life * (1 - math.exp(-(total / unique - 1) / half_life)))


def loss_of_repeated(law: LossLaw, parameters: float, tokens: float, unique_tokens: float) -> float:
    """A law's loss where the tokens are passes over fewer unique ones (Muennighoff et al. 2023, eq. 6).

    Parameters beyond those that the unique tokens are best for count less, too.
    """
    if tokens <= unique_tokens:
        return law.loss(parameters, tokens)
    best = law.best_parameters(unique_tokens)
    return law.loss(worth(parameters, best, PARAMETERS_HALF_LIFE), worth(tokens, unique_tokens, TOKENS_HALF_LIFE))


def best_for_use(law: LossLaw, loss: float, used_tokens: float) -> tuple[float, float]:
    """(parameters, tokens) that reach a loss with the fewest operations of training and of `used_tokens` that are generated
    later: 6 N D + 2 N D_used (Sardana et al. 2024, arXiv:2401.00448, eq. 2)."""

    def cost(parameters: float) -> float:
        tokens = law.tokens_for(loss, parameters)
        return parameters * (FLOPS_A_PARAMETER * tokens + ANSWER_FLOPS_A_PARAMETER * used_tokens)

    # the least that could ever reach the loss, and a thousand times that: the cost falls, then rises
    least = (law.A / (loss - law.E)) ** (1 / law.alpha)
    low, high = math.log(least), math.log(1000 * least)
    for _ in range(200):
        third = (high - low) / 3
        if cost(math.exp(low + third)) < cost(math.exp(high - third)):
            high -= third
        else:
            low += third
    parameters = math.exp((low + high) / 2)
    return parameters, law.tokens_for(loss, parameters)


def best_vocabulary(other_parameters: float, hidden_size: int) -> float:
    """Ids that are best for a model with so many parameters outside its vocabulary: N_v = 0.20 C^0.42 at the budget of
    N_nv = 0.08 C^0.50 (Tao et al. 2024, arXiv:2407.13623, table of approach 1; fitted on 33 M to 3 B)."""
    flops = (other_parameters / 0.08) ** (1 / 0.50)
    return float(0.20 * flops**0.42 / hidden_size)
