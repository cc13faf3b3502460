"""Does the reader's rule skip the steps that a cache would?"""

from .verdict import attempted, exercise, expect, first_hint, shape_of


def by_rule(changes, threshold, reset=True, first=True, last=True, late=False, over=False):
    """The rule, right as it stands; each argument makes one usual mistake."""
    found, total = [], 0.0
    for i, change in enumerate(changes):
        before, total = total, total + change
        asked = before if late else total
        skips = asked > threshold if over else asked < threshold
        skips = skips and (i > 0 or not first) and (i < len(changes) - 1 or not last)
        if reset and not skips:
            total = 0.0
        found.append(skips)
    return found


def one_by_one(changes, threshold):
    return [0 < i < len(changes) - 1 and change < threshold for i, change in enumerate(changes)]


@exercise("what a skipped step owes is added up, and a computed one begins a new account.")
def skipped_steps(answer):
    """The exercise of 18_cache.

    answer(changes, threshold) -> [bool], was each step skipped.  changes  [number], the first one's is 0
    """
    cases = (
        ([0.0, 0.04, 0.05, 0.06, 0.03, 0.03, 0.09, 0.2, 0.01], 0.1),
        ([0.0, 0.01, 0.01, 0.01, 0.01, 0.01], 0.5),
        ([0.0, 0.3, 0.05, 0.05, 0.05, 0.05, 0.3, 0.02, 0.02], 0.16),
    )
    for changes, threshold in cases:
        result, right = attempted(answer, list(changes), threshold), by_rule(changes, threshold)
        fits = isinstance(result, list | tuple) and len(result) == len(changes)
        expect(fits, f"got {shape_of(result)}; expected a list of {len(changes)}, one for each step")
        result = [bool(skips) for skips in result]
        mistakes = {
            "that says which steps are computed; asked was which are skipped": [not skips for skips in right],
            "the first step has nothing to reuse": by_rule(changes, threshold, first=False),
            "the last step is computed always": by_rule(changes, threshold, last=False),
            "the sum never begins anew: a computed step sets it to zero": by_rule(
                changes, threshold, reset=False
            ),
            "nothing is added up: small changes in a row are a large one": one_by_one(changes, threshold),
            "add first, then ask: this step's own change counts": by_rule(changes, threshold, late=True),
            "below the threshold a step is skipped, not above": by_rule(changes, threshold, over=True),
        }
        expect(
            result == right,
            first_hint(
                {hint: result == wrong for hint, wrong in mistakes.items()}, f"for {changes} at {threshold}"
            ),
        )
