"""A covering array: few combinations in which any two values of any two axes meet, where the rules let them."""

import itertools
import random


def pairs_of(combination):
    """Every two choices of a combination."""
    return {frozenset(pair) for pair in itertools.combinations(combination.items(), 2)}


def coverable_pairs(axes, is_admitted, *, seed=0, tries=200):
    """The pairs that stand in some admitted combination, each with one in which it does."""
    draw, found = random.Random(seed), {}
    for (one, values), (other, others) in itertools.combinations(axes.items(), 2):
        for pair in itertools.product(values, others):
            for _ in range(tries):
                candidate = {axis: draw.choice(choices) for axis, choices in axes.items()}
                candidate |= {one: pair[0], other: pair[1]}
                if is_admitted(candidate):
                    found[frozenset(zip((one, other), pair, strict=True))] = candidate
                    break
    return found


def covering_array(axes, is_admitted, *, seed=0, tries=60):
    """Admitted combinations that hold every coverable pair: each time the best of some random ones with a missing pair."""
    missing, chosen, draw = coverable_pairs(axes, is_admitted, seed=seed), [], random.Random(seed)
    while missing:
        fixed, known = next(iter(missing.items()))
        candidates = [known]
        for _ in range(tries):
            candidate = {axis: draw.choice(choices) for axis, choices in axes.items()} | dict(fixed)
            if is_admitted(candidate):
                candidates.append(candidate)
        best = max(candidates, key=lambda candidate: len(pairs_of(candidate) & missing.keys()))
        chosen.append(best)
        for pair in pairs_of(best):
            missing.pop(pair, None)
    return chosen
