"""Log odds ratios with documents as the units: tests, intervals, and the false discovery rate.

Tokens of a document are not independent: a module about sockets fires a socket feature hundreds of
times. A test that counts tokens calls that a discovery; here a document is one observation.

With `k` firings among `n` tokens in a document, a density is the ratio estimator `K / N` of sums
over documents. For a log odds ratio `delta`, let `p_a` and `p_b` be the densities that have it and
together give the firings there were. The statistic is
`T(delta) = (K_a - N_a p_a) / sqrt(w_a^2 V_a + w_b^2 V_b)`, with `w_a = I_b / (I_a + I_b)`,
`I = N p (1 - p)`, and `V = c sum (k - n K/N)^2` over the documents of a side, where `c` makes up
for the fit (`m / (m - 1)` of `m` equally long documents, more of unequal ones). At `delta = 0` and
for documents of one length it is Welch's t. It is compared with Student's t, with the degrees of
freedom of Satterthwaite, fewer where documents are unequal; the interval is every `delta` that is
not rejected, so it leaves out 0 exactly when p < 0.05.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ._counts import GroupCounts

_FEW = 5
"""Documents a feature must fire in before its spread on that side is taken from that side alone."""
_FAR = 30.0
"""Log odds beyond which nothing is looked for."""


@dataclass(frozen=True, slots=True)
class LogOdds:
    """Of every feature, side a against side b; natural logarithms, positive where a has more."""

    value: Float[np.ndarray, " d_sae"]
    low: Float[np.ndarray, " d_sae"]
    high: Float[np.ndarray, " d_sae"]
    t: Float[np.ndarray, " d_sae"]
    df: Float[np.ndarray, " d_sae"]
    p: Float[np.ndarray, " d_sae"]
    """1 where the feature fires on neither side."""


def log_odds(a: GroupCounts, b: GroupCounts, *, level: float = 0.95) -> LogOdds:
    """Log odds ratios of the densities in `a` and in `b`, with intervals and p-values.

    The estimate has one firing added, shared between the sides in proportion to their tokens
    (Haldane and Anscombe's half each where they are equal), and one silent token likewise: it is
    finite, and 0 where densities are equal. Where the data bound an interval on the near side of
    it alone (a side that is silent, or fires in one document), the far end is that of a Wald
    interval about the corrected estimate.
    """
    from scipy.special import stdtr, stdtrit  # type: ignore[import-untyped]

    value = _corrected(a, b)
    dispersion = _dispersion(a, b)
    fires = (a.fired + b.fired > 0) & (a.fired + b.fired < a.tokens + b.tokens)
    t, parts = _statistic(a, b, np.zeros(len(value)), dispersion)
    with np.errstate(divide="ignore", invalid="ignore"):
        df = sum(parts) ** 2 / (parts[0] ** 2 / a.freedom + parts[1] ** 2 / b.freedom)
    df = np.where(fires & np.isfinite(df), df, min(a.freedom, b.freedom))
    t = np.where(fires, t, 0.0)
    # Student's t by functions of scipy's core: its whole statistics take half a second to import.
    p = np.where(fires, 2 * stdtr(df, -np.abs(t)), 1.0)
    limit = stdtrit(df, 0.5 + level / 2)
    spread = limit * _wald(a, b, dispersion)
    ends = []
    for sign in (-1, 1):
        end, found = _inverted(a, b, dispersion, limit, sign)
        # What is not significant must not exclude 0, whichever way an end was found.
        far = value + sign * spread
        far = np.where(p > 1 - level, sign * np.maximum(sign * far, 0), far)
        end = np.where(found & fires, end, far)
        ends.append(sign * np.maximum(sign * end, sign * value))
    return LogOdds(value, ends[0], ends[1], t, df, p)


def benjamini_hochberg(p: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The q-values of `p`: the least false discovery rate at which each is a discovery."""
    order = np.argsort(-p, kind="stable")
    ranks = len(p) - np.arange(len(p))
    q = np.empty(len(p))
    q[order] = np.minimum.accumulate(np.minimum(p[order] * len(p) / ranks, 1.0))
    return q


def _corrected(a: GroupCounts, b: GroupCounts) -> np.ndarray:
    total = a.tokens + b.tokens
    odds = [
        (side.fired + side.tokens / total) / (side.tokens - side.fired + side.tokens / total)
        for side in (a, b)
    ]
    return np.log(odds[0] / odds[1])


def _residuals(side: GroupCounts) -> np.ndarray:
    """The sum of squares of `k - n K/N` over the documents of a side, made unbiased."""
    p = side.density
    sums = side.squares - 2 * p * side.products + p**2 * side.squared_tokens
    return np.maximum(sums, 0.0) * side.inflation


def _dispersion(a: GroupCounts, b: GroupCounts) -> np.ndarray:
    """How much more firings vary between documents than independent tokens would; at least 1."""
    binomial = sum(side.tokens * side.density * (1 - side.density) for side in (a, b))
    found = _residuals(a) + _residuals(b)
    ratio = np.divide(found, binomial, out=np.ones(len(found)), where=binomial > 0)
    return np.maximum(ratio, 1.0)


def _variance(side: GroupCounts, p: np.ndarray, dispersion: np.ndarray) -> np.ndarray:
    """Variance of a side's firings: measured, and where it fires in few documents at least that
    of the dispersion that both sides show together. A side that is silent measures none.
    """
    floor = dispersion * side.tokens * p * (1 - p)
    measured = _residuals(side)
    return np.where(side.documents_fired < _FEW, np.maximum(measured, floor), measured)


def _densities(a: GroupCounts, b: GroupCounts, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Densities with this log odds ratio whose firings add up to those there were."""
    ratio, fired = np.exp(delta), (a.fired + b.fired).astype(np.float64)
    # Odds x of side b: (N - K) r x^2 + (N_a r + N_b - K (1 + r)) x - K = 0.
    square = (a.tokens + b.tokens - fired) * ratio
    linear = a.tokens * ratio + b.tokens - fired * (1 + ratio)
    root = np.sqrt(linear**2 + 4 * square * fired)
    # Of the two ways to write the root, the one that does not subtract near equals.
    with np.errstate(divide="ignore", invalid="ignore"):
        odds = np.where(linear > 0, 2 * fired / (linear + root), (root - linear) / (2 * square))
    odds = np.nan_to_num(odds, nan=0.0, posinf=1e12)
    return ratio * odds / (1 + ratio * odds), odds / (1 + odds)


def _statistic(
    a: GroupCounts, b: GroupCounts, delta: np.ndarray, dispersion: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """`T(delta)`, and what each side adds to the square of what it is divided by."""
    p_a, p_b = _densities(a, b, delta)
    i_a, i_b = a.tokens * p_a * (1 - p_a), b.tokens * p_b * (1 - p_b)
    share = np.divide(i_b, i_a + i_b, out=np.full(len(i_a), 0.5), where=i_a + i_b > 0)
    parts = (
        share**2 * _variance(a, p_a, dispersion),
        (1 - share) ** 2 * _variance(b, p_b, dispersion),
    )
    size = np.sqrt(parts[0] + parts[1])
    excess = a.fired - a.tokens * p_a
    return np.divide(excess, size, out=np.zeros(len(size)), where=size > 0), parts


def _inverted(
    a: GroupCounts, b: GroupCounts, dispersion: np.ndarray, limit: np.ndarray, sign: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where `T` passes `-sign * limit` on that side of the estimate, and whether it does."""
    with np.errstate(divide="ignore", invalid="ignore"):
        centre = np.log(a.density / (1 - a.density)) - np.log(b.density / (1 - b.density))
    centre = np.clip(np.nan_to_num(centre, nan=0.0, posinf=_FAR, neginf=-_FAR), -_FAR, _FAR)
    near, far = centre, np.full(len(centre), sign * _FAR)

    def beyond(delta: np.ndarray) -> np.ndarray:
        return -sign * _statistic(a, b, delta, dispersion)[0] > limit

    found = beyond(far) & ~beyond(near)
    for _ in range(50):
        middle = (near + far) / 2
        out = beyond(middle)
        near, far = np.where(out, near, middle), np.where(out, middle, far)
    return far, found


def _wald(a: GroupCounts, b: GroupCounts, dispersion: np.ndarray) -> np.ndarray:
    """Standard error of the corrected estimate."""
    total, out = a.tokens + b.tokens, np.zeros(len(a.fired))
    for side in (a, b):
        fired = side.fired + side.tokens / total
        p = fired / (side.tokens + 2 * side.tokens / total)
        out = out + _variance(side, p, dispersion) / (fired * (1 - p)) ** 2
    return np.sqrt(out)
