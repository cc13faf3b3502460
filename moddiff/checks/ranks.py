"""Does the reader merge attention to two parts of the keys as a ring does?"""

import torch

from .verdict import attempted, exercise, expect, expect_close, shape_of


@exercise("three parts of unlike sizes give what one softmax gives, however large the scores.")
def merged_parts(answer):
    """The exercise of 22_parallel.

    answer(found, total, part, weight) -> (found, total) of all the keys that both have seen.

    found, part    [b, heads, n, d] means of values;  total, weight: [b, heads, n] log of the sum of weights
    """
    source = torch.Generator().manual_seed(22)
    for size in (1, 300):  # at 300 no score's exponential fits into float32
        scores = torch.randn(2, 3, 5, 11, generator=source) * size
        v = torch.randn(2, 3, 11, 4, generator=source)
        parts = [part(scores[..., keys], v[:, :, keys]) for keys in (slice(0, 2), slice(2, 5), slice(5, 11))]
        found, total = parts[0]
        for count, (more, weight) in zip((5, 11), parts[1:]):
            result = attempted(answer, found.clone(), total.clone(), more.clone(), weight.clone())
            said = "expected the pair (found, total)"
            expect(isinstance(result, tuple) and len(result) == 2, f"got {shape_of(result)}; {said}")
            shapes = [shape_of(x) for x in result]
            fits = shapes == [[2, 3, 5, 4], [2, 3, 5]]
            expect(fits, f"got {shapes}; expected [2, 3, 5, 4] and [2, 3, 5]: weight[..., None] meets d")
            expect(
                all(bool(x.isfinite().all()) for x in result),
                "an exponential of a whole score overflows; only differences of logs may go through exp",
            )
            right, sums = part(scores[..., :count], v[:, :, :count])
            share = (total - sums).exp()[..., None]
            mistakes = {
                "that is the plain mean of both; a part counts by the weights that it stands for": (
                    (found + more) / 2
                ),
                "the weights have changed places": found * (1 - share) + more * share,
                "both are added as they are; each counts by its share of the weights": found + more,
                "the logs were taken for weights; exp(log - log of the whole) is a part's share": (
                    found * (total / (total + weight))[..., None]
                    + more * (weight / (total + weight))[..., None]
                ),
            }
            expect_close(
                result[0], right, mistakes, "found: each part times exp(its log - the log of both)", 1e-4
            )
            mistakes = {
                "total: logs were added, which multiplies the weights; logaddexp adds them": total + weight,
                "total is as it was; the next part would count against the first alone": total,
                "total is that of the part alone": weight,
            }
            expect_close(result[1], sums, mistakes, "total: the log of the sum of both weights", 1e-3)
            found, total = right, sums


def part(scores, v):
    """Attention to some of the keys: the mean of their values, and the log of the sum of their weights."""
    return scores.softmax(-1) @ v, scores.logsumexp(-1)
