"""Votes and lost radius of `certify.py --tolerance` and of other rules, against 100 + 100,000 votes for each image.

    python benchmarks/tolerance.py --published=../shared/published

No network casts a vote: the counts are drawn, with a seed, for the p_A of real files. These are the shares of the
100,000 votes in results/mnist/, the shares that the published radii of ImageNet follow from (if their folder is
there), and two CIFAR-10 models. Of these the published certified accuracies are known (Jeong and Shin, NeurIPS 2020,
ResNet-110, sigma 0.5), so the p_A of right images follow from the radii on that curve. Of wrong images p_A is drawn
uniformly from 0.3 to 0.85, which is an assumption.

A row is a rule. "votes" is the ratio of all votes of the full protocol to all votes of the rule, the pilot included;
"lost" is the loss of ACR. "worst" is the largest mean loss of radius of an image with p_A from 0.5 to 1.

| rule | |
|---|---|
| pilot of n0 | `allocation.votes_for_tolerance` |
| pilot in two parts | a second pilot, a share of the votes that the first asks for; then as above from both |
| posterior mean | the smallest n whose mean loss over the pilot's Jeffreys posterior is within the tolerance |
| equal gain | the n that minimizes this loss plus tolerance * n / 100,000 |
| looks | bounds after n / 32, n / 16, ..., n votes share alpha; stop once the loss is estimated to be within it |
| confidence sequence | a bound that holds at all times, from the evidence of `statistics.sequential`; stop likewise |
| bets from a pilot | likewise, with the bet against each p that is best after the n of the pilot |
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from scipy import special

from rs_consistency.certificates.proof import load
from rs_consistency.certificates.read import read_rows
from rs_consistency.statistics import allocation
from rs_consistency.statistics.allocation import votes_for_tolerance
from rs_consistency.statistics.bounds import ALPHA, N0, N, lower_confidence_bound

_REPEATS = 10  # draws of each image
_WORST = special.ndtr(np.linspace(0, 5, 51))
_LIKE_CIFAR10 = {
    "gaussian": (0.657, 0.549, 0.428, 0.325, 0.220, 0.141, 0.083, 0.039, 0),
    "consistency": (0.643, 0.575, 0.506, 0.432, 0.362, 0.295, 0.228, 0.161, 0),
}
_CIFAR10_RADII = (*np.arange(0, 2, 0.25), 1.91)

Rule = Callable[[np.ndarray, float, np.random.Generator], tuple[np.ndarray, np.ndarray]]


def _radius(count: np.ndarray, votes: np.ndarray, alpha: float = ALPHA) -> np.ndarray:
    """Return the radii at sigma 1."""
    votes = np.broadcast_to(votes, count.shape)
    distinct, position = np.unique(np.stack([count, votes]), axis=1, return_inverse=True)
    return special.ndtri(np.maximum(lower_confidence_bound(*distinct, alpha), 0.5))[position.ravel()]


def _full_radius(p: np.ndarray) -> np.ndarray:
    """Return the expected radii of N votes at sigma 1."""
    radii = allocation._expected_radii(N, ALPHA, 0.0)[1][:, -1]
    distances = np.append(allocation._DISTANCES[:-1], 7)
    return np.interp(special.ndtri(np.minimum(p, 1 - 1e-12)), distances, radii)


def _measured(p: np.ndarray, votes: np.ndarray, pilot: np.ndarray, rng: np.random.Generator) -> tuple:
    return pilot + votes, _radius(rng.binomial(votes, p), votes)


def _full(p: np.ndarray, tolerance: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return _measured(p, np.full(p.shape, N), N0, rng)


def _asked(count0: np.ndarray, n0: int, tolerance: float) -> np.ndarray:
    return votes_for_tolerance(count0, n0=n0, n=N, tolerance=tolerance, alpha=ALPHA, sigma=1.0)


def _pilot(n0: int) -> Rule:
    return lambda p, tolerance, rng: _measured(p, _asked(rng.binomial(n0, p), n0, tolerance), n0, rng)


def _two_parts(n0: int, share: float) -> Rule:
    def rule(p: np.ndarray, tolerance: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        count0 = rng.binomial(n0, p)
        more = (share * _asked(count0, n0, tolerance)).astype(int)
        count, pilot = count0 + rng.binomial(more, p), n0 + more
        votes = np.empty_like(count)
        for size in np.unique(pilot):
            votes[pilot == size] = _asked(count[pilot == size], int(size), tolerance)
        return _measured(p, votes, pilot, rng)

    return rule


def _posterior(n0: int, choose: Callable[[np.ndarray, float, np.ndarray], np.ndarray]) -> Rule:
    """Return a rule that chooses from the losses `[D, L]` averaged over the posterior, the tolerance and the ladder."""

    def rule(p: np.ndarray, tolerance: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        numbers, radii = allocation._expected_radii(N, ALPHA, 0.0)
        count0, position = np.unique(rng.binomial(n0, p), return_inverse=True)
        misses = special.ndtr(-allocation._DISTANCES)
        above = special.betainc(n0 - count0[:, None] + 0.5, count0[:, None] + 0.5, misses)
        expected = (above[:, :-1] - above[:, 1:]) @ (radii[:-1] + radii[1:]) / 2
        return _measured(p, numbers[choose(expected[:, -1:] - expected, tolerance, numbers)][position], n0, rng)

    return rule


def _within(loss: np.ndarray, tolerance: float, numbers: np.ndarray) -> np.ndarray:
    return (loss <= tolerance).argmax(axis=1)


def _equal_gain(loss: np.ndarray, tolerance: float, numbers: np.ndarray) -> np.ndarray:
    return (loss + tolerance * numbers / N).argmin(axis=1)


def _stopped(
    p: np.ndarray, tolerance: float, rng: np.random.Generator, looks: np.ndarray, radius: Callable[..., np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return votes, without a pilot, and radii at the first look within the tolerance of the radius estimated for N.

    `radius` takes the number of the look, the counts, the votes, and the images that are still running.
    """
    count, votes, radii, last = np.zeros_like(p, int), np.zeros_like(p, int), np.zeros_like(p), 0
    running = np.arange(len(p))
    for look, m in enumerate(looks):
        count[running] += rng.binomial(m - last, p[running])
        votes[running], last = m, m
        radii[running] = np.maximum(radii[running], radius(look, count[running], m, running))
        estimate = _full_radius((count[running] + 0.5) / (m + 1))
        running = running[estimate - radii[running] > tolerance]
    return votes, radii


def _looks(last: float) -> Rule:
    looks = N // 2 ** np.arange(5, -1, -1)
    alphas = [ALPHA * (1 - last) / 5] * 5 + [ALPHA * last]

    def rule(p: np.ndarray, tolerance: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        votes, radii = _stopped(p, tolerance, rng, looks, lambda look, count, m, _: _radius(count, m, alphas[look]))
        return N0 + votes, radii

    return rule


def _at_all_times(count: np.ndarray, evidence: Callable[[np.ndarray], np.ndarray], m: int) -> np.ndarray:
    """Return the radii of the smallest p whose evidence is below 1 / alpha, by bisection from 1/2 to the share."""
    low, high = np.full(count.shape, 0.5), np.maximum(count / m, 0.5)
    for _ in range(40):
        middle = (low + high) / 2
        rejected = evidence(middle) >= -np.log(ALPHA)
        low, high = np.where(rejected, middle, low), np.where(rejected, high, middle)
    return special.ndtri(np.minimum(low, 1 - 1e-12))


_MANY_LOOKS = np.unique(np.geomspace(16, N, 50).astype(int))


def _sequence(p: np.ndarray, tolerance: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    def radius(look: int, count: np.ndarray, m: int, running: np.ndarray) -> np.ndarray:
        mixture = special.betaln(count + 0.5, m - count + 0.5) - special.betaln(0.5, 0.5)
        return _at_all_times(count, lambda q: mixture - special.xlogy(count, q) - special.xlog1py(m - count, -q), m)

    votes, radii = _stopped(p, tolerance, rng, _MANY_LOOKS, radius)
    return N0 + votes, radii


def _bets(n0: int) -> Rule:
    def rule(p: np.ndarray, tolerance: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        asked = _asked(rng.binomial(n0, p), n0, tolerance)

        def radius(look: int, count: np.ndarray, m: int, running: np.ndarray) -> np.ndarray:
            def evidence(q: np.ndarray) -> np.ndarray:
                bet = np.minimum(q + np.sqrt(-2 * np.log(ALPHA) * q * (1 - q) / asked[running]), 1 - 1e-9)
                return special.xlogy(count, bet / q) + special.xlogy(m - count, (1 - bet) / (1 - q))

            return _at_all_times(count, evidence, m)

        votes, radii = _stopped(p, tolerance, rng, _MANY_LOOKS, radius)
        return n0 + votes, radii

    return rule


_RULES: dict[str, Rule] = {
    "pilot of 100": _pilot(100),
    "pilot of 300": _pilot(300),
    "pilot of 1000": _pilot(1000),
    "pilot of 3000": _pilot(3000),
    "pilot in two parts, 100 and 1 %": _two_parts(100, 0.01),
    "pilot in two parts, 100 and 2 %": _two_parts(100, 0.02),
    "pilot in two parts, 100 and 5 %": _two_parts(100, 0.05),
    "posterior mean, pilot of 1000": _posterior(1000, _within),
    "equal gain, pilot of 1000": _posterior(1000, _equal_gain),
    "looks, 0.8 of alpha on the last": _looks(0.8),
    "looks, 0.5 of alpha on the last": _looks(0.5),
    "confidence sequence": _sequence,
    "bets from a pilot of 1000": _bets(1000),
}


def _share_of(radius: np.ndarray) -> np.ndarray:
    """Return the shares of N votes that certify radii at sigma 1, at least 1/2."""
    others = np.unique(np.geomspace(1, N / 2, 2000).astype(int)) - 1
    radii = special.ndtri(lower_confidence_bound(N - others, N, ALPHA))
    return 1 - (np.interp(-radius, -radii, others) + 0.5) / (N + 1)


def _populations(published: Path) -> Iterator[tuple[str, float, np.ndarray, np.ndarray]]:
    """Yield name, sigma, p_A of each image, and whether it is classified correctly."""
    for path in sorted(Path("results/mnist").glob("*/certificates.tsv.gz")):
        if path.parent.name.startswith(("gaussian", "consistency")):
            rows = read_rows(path)[1].values()
            count, correct = (np.array([row[name] for row in rows]) for name in ("count", "correct"))
            name = path.parent.name.removesuffix("_seed0").replace("_sigma", " ")
            yield f"MNIST {name}", float(name.split()[-1]), (count + 0.5) / (N + 1), correct == 1
    rng = np.random.default_rng(0)
    imagenet = published / "imagenet_resnet50_consistency_sigma0.50.tsv"
    if imagenet.is_file():
        rows = load(imagenet)[0]
        p = np.where(rows.predict >= 0, _share_of(rows.radius / 0.5), rng.uniform(0.2, 0.5, len(rows.radius)))
        yield "ImageNet consistency 0.50", 0.5, p, rows.correct == 1
    for method, accuracy in _LIKE_CIFAR10.items():
        quantile = (np.arange(1000) + 0.5) / 1000
        radius = np.interp(quantile, accuracy[::-1], _CIFAR10_RADII[::-1])
        correct = quantile < accuracy[0]
        yield (
            f"like CIFAR-10 {method} 0.50",
            0.5,
            np.where(correct, _share_of(radius / 0.5), rng.uniform(0.3, 0.85, 1000)),
            correct,
        )


def _repeated(rule: Rule, p: np.ndarray, tolerance: float, repeats: int) -> np.ndarray:
    """Return mean votes and mean radius at sigma 1 of each image, `[2, images]`."""
    result = np.stack(rule(np.repeat(p, repeats), tolerance, np.random.default_rng(0)))
    return result.reshape(2, len(p), repeats).mean(axis=2)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, default=Path("shared/published"), help="folder of published files")
    parser.add_argument("--tolerances", nargs="+", type=float, default=[0.02, 0.05])
    args = parser.parse_args()
    populations = list(_populations(args.published))
    for tolerance in args.tolerances:
        worst_full = _full_radius(_WORST)
        worst = {
            name: (worst_full - _repeated(rule, _WORST, tolerance / 0.5, 500)[1]).max() * 0.5
            for name, rule in _RULES.items()
        }
        for name, sigma, p, correct in populations:
            votes, radius = _repeated(_full, p, tolerance / sigma, _REPEATS)
            acr = (radius * correct).mean() * sigma
            print(f"{name}: {len(p)} images, ACR {acr:.4f}, tolerance {tolerance:g}")
            print(f"  {'':32} votes    lost   worst (sigma 0.5)")
            for rule_name, rule in _RULES.items():
                fewer, smaller = _repeated(rule, p, tolerance / sigma, _REPEATS)
                lost = acr - (smaller * correct).mean() * sigma
                ratio = votes.sum() / fewer.sum()
                print(f"  {rule_name:32} {ratio:5.2f}  {lost:6.4f}  {worst[rule_name]:6.3f}", flush=True)


if __name__ == "__main__":
    main()
