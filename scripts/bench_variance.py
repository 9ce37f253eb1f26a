"""How much less do the draws vary than independent uniform ones, at equal network evaluations?

Command:  python scripts/bench_variance.py
Hardware: 2 CPU cores, about an hour and a half; `--teacher demo --part features` runs one part
Writes:   docs/benchmarks/variance.json after every cell (run it again to go on), docs/images/variance.png

*Features*: total variance (tr Cov) of one example's projected gradient, mean over 64 digits, over replicates of K
draws of its own. Gradients: raw loss, `balanced` weighting, and unit norm per draw (the paper's). ECM is the variance
of K iid uniform draws, a K-th of that of one, over the variance of the scheme at K.

*Control*: the same with draws that all 1,797 digits share, whose common error is taken from independent draws.

*Scores*: Monte-Carlo variance of the scores of 64 digits for 12 generated ones, over replicates of K shared draws, and
their agreement with 256 draws. *Projection*: how much the random projection adds to that.

Standard errors are over examples (features), replicates (control) or queries (scores).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from benchmark import Results
from rich.console import Console
from rich.table import Table
from scipy.stats import norm, qmc, spearmanr
from torch import Tensor

from carv_attrib import load_teacher
from carv_attrib.config import EstimatorConfig, FeaturizeConfig
from carv_attrib.control_variates import replace_common_part, smoother_factor
from carv_attrib.data import open_dataset, to_pixels
from carv_attrib.demo import generate
from carv_attrib.estimator import (
    Encoded,
    Estimator,
    GradientProfile,
    average_bands,
    binned_rms,
    build_estimator,
    mean_square_products,
    measure_profile,
    root_weighted,
)
from carv_attrib.kernel import DEFAULT_DAMPING, kernel_of
from carv_attrib.sampling import Draws, Proposal, importance_proposal, pair_size, sample_draws, uniform_proposal
from carv_attrib.seeding import stream, stream_key
from carv_attrib.variance import Measured, RunningVariance, mean_and_error, relative_efficiency

NUM_TIMESTEPS = 1000
KINDS = ("raw loss", "unit norm", "balanced")
NUM_EXAMPLES, NUM_DIGITS, NUM_TRAIN, NUM_QUERIES = 64, 1797, 64, 12
BASELINE_DRAWS = 256
FEATURE_REPLICATES = {4: 8, 8: 6, 64: 3}
SHARED_REPLICATES = {2: 5, 6: 4, 56: 2}
INDEPENDENT_REPLICATES = {2: 3, 8: 2}
SPLITS = {4: (2, 2), 8: (6, 2), 64: (56, 8)}  # shared and independent draws of a total
SCORE_REPLICATES = {4: 6, 8: 6, 16: 4, 64: 3}


class Bench:
    """A teacher with its digits, and the gradients of any draws."""

    def __init__(self, name: str) -> None:
        self.teacher = load_teacher(name)
        self.estimator = self.with_projection_seed(0)
        digits = open_dataset("digits")
        order = np.random.default_rng(0).permutation(len(digits))[:NUM_DIGITS]
        examples = [digits.load(int(row)) for row in order]
        self.labels = torch.tensor([x.label for x in examples])
        self.encoded = self.encode([x.image for x in examples], self.labels.tolist())
        pilot = self.rows(slice(NUM_EXAMPLES, NUM_EXAMPLES + 64))  # not the examples that are reported
        self.rms = measure_profile(self.estimator, pilot, ["pilot"] * 64).at_every_timestep(NUM_TIMESTEPS)

    def with_projection_seed(self, seed: int) -> Estimator:
        """Return the estimator without weighting, with the projection of a seed."""
        config = FeaturizeConfig.from_flat({"weighting": "uniform", "seed": seed, "num_bands": 1})
        return build_estimator(self.teacher, config, 512, profile=None)

    def encode(self, images: list[Any], labels: list[int]) -> Encoded:
        """Return the latents of pictures, with their labels if the teacher wants them."""
        pixels = torch.stack([to_pixels(image, self.teacher.pixel_spec) for image in images])
        wanted = labels if self.teacher.condition_kind == "label" else None
        return self.estimator.encode(pixels, wanted, None, range(len(pixels)))

    def rows(self, rows: slice) -> Encoded:
        """Return some of the encoded digits."""
        return Encoded(self.encoded.latents[rows], {k: v[rows] for k, v in self.encoded.condition.items()})

    def gradients(self, encoded: Encoded, draws: Draws, estimator: Estimator | None = None) -> Tensor:
        """Return projected gradients without importance weights, (examples, draws, proj_dim)."""
        unweighted = replace(draws, weights=torch.ones_like(draws.weights))
        return (estimator or self.estimator).features(encoded, unweighted)

    def of_kind(self, kind: str, gradients: Tensor, draws: Draws) -> Tensor:
        """Return the vectors whose mean over draws is estimated, with their importance weights."""
        if kind == "unit norm":
            gradients = torch.nn.functional.normalize(gradients, dim=-1)
        if kind == "balanced":
            gradients = gradients / self.rms[draws.timesteps].unsqueeze(-1).float()
        return gradients * draws.weights.unsqueeze(-1).float()

    @cache  # noqa: B019
    def proposal(self, name: str, kind: str) -> Proposal:
        """Return q(t) for gradients of a kind; `pilot` is least variance where draws are independent."""
        if name == "uniform":
            return uniform_proposal(NUM_TIMESTEPS)
        if name == "pilot":
            return importance_proposal(self.rms)
        if name == "scores":
            return importance_proposal(self.score_magnitude(kind))
        return importance_proposal(self.pair_deviation())

    def pilot_pairs(self) -> tuple[Tensor, Tensor]:
        """Return timesteps (pilot,) and gradients (pilot, pairs, signs, proj_dim) at two antithetic pairs each."""
        pilot = self.rows(slice(NUM_EXAMPLES, NUM_EXAMPLES + 64))
        shape, ids = self.teacher.latent_shape, range(64)
        draws = [
            sample_draws(uniform_proposal(NUM_TIMESTEPS), shape, num_draws=8, scheme="stratified", purpose=p, ids=ids)
            for p in ("first pair", "second pair")
        ]
        timesteps = draws[0].timesteps
        noise = torch.stack([s * d.noise for d in draws for s in (1, -1)], dim=2).flatten(1, 2)
        repeated = timesteps.repeat_interleave(4, dim=1)
        gradients = self.gradients(pilot, Draws(repeated, noise, torch.ones(repeated.shape).double(), (32,)))
        return timesteps.flatten(), gradients.view(64 * 8, 2, 2, -1).double()

    def pair_deviation(self) -> Tensor:
        """Return the standard deviation of an antithetic pair's mean at each timestep: Neyman's allocation of pairs."""
        timesteps, gradients = self.pilot_pairs()
        profile = GradientProfile(*binned_rms(timesteps, gradients.mean(2).var(1).sum(-1)))
        return profile.at_every_timestep(NUM_TIMESTEPS)

    def score_magnitude(self, kind: str) -> Tensor:
        """Return the rms over pairs of pilot examples of the preconditioned product of gradients at each timestep."""
        pilot = self.rows(slice(NUM_EXAMPLES, NUM_EXAMPLES + 32))
        draws = sample_draws(uniform_proposal(NUM_TIMESTEPS), self.teacher.latent_shape, num_draws=64, purpose="score")
        vectors = self.of_kind(kind, self.gradients(pilot, draws), draws.expand(32)).double()
        profile = GradientProfile(*binned_rms(draws.timesteps[0], mean_square_products(vectors, vectors.shape[-1])))
        return profile.at_every_timestep(NUM_TIMESTEPS)


def whitener(vectors: Tensor) -> Tensor:
    """Return W with `W W^T = (H + lambda I)^{-1}`, H the mean outer product of vectors (examples, draws, dims)."""
    kernel = kernel_of(vectors[:, None], vectors.shape[-1])
    return kernel.eigenvectors[0, 0] * kernel.inverse("preconditioned", DEFAULT_DAMPING).sqrt()


def draws_of(scheme: str, proposal: Proposal, shape: tuple[int, ...], num_draws: int, seed: int, ids: Any) -> Draws:
    """Return draws of the package's schemes, or of one that was tried."""
    if scheme == "one noise":  # the same noise in every stratum
        draws = sample_draws(proposal, shape, num_draws=num_draws, seed=seed, ids=ids)
        return replace(draws, noise=draws.noise[:, :1].expand_as(draws.noise))
    if scheme == "sobol":
        return sobol_draws(proposal, shape, num_draws, seed, ids)
    return sample_draws(proposal, shape, num_draws=num_draws, scheme=scheme, seed=seed, ids=ids)  # type: ignore[arg-type]


def sobol_draws(proposal: Proposal, shape: tuple[int, ...], num_draws: int, seed: int, ids: Any) -> Draws:
    """Return antithetic pairs with scrambled Sobol points over t and the three lowest frequencies of the noise."""
    plain = sample_draws(proposal, shape, num_draws=num_draws, scheme="antithetic", seed=seed, ids=ids)
    directions = low_frequencies(shape)
    timesteps, noise = [], []
    for row, id_ in enumerate(ids):
        points = qmc.Sobol(4, rng=stream_key(seed, "sobol", int(id_)) % 2**63).random(num_draws // 2)
        points = points[points[:, 0].argsort()]
        half = plain.noise[row, ::2].flatten(1)
        wanted = torch.from_numpy(norm.ppf(points[:, 1:].clip(1e-9, 1 - 1e-9))).float()
        half = half + (wanted - half @ directions.T) @ directions
        noise.append(torch.stack([half, -half], dim=1).view(num_draws, *shape))
        timesteps.append(proposal.inverse_cdf(torch.from_numpy(points[:, 0])).repeat_interleave(2))
    stacked = torch.stack(timesteps)
    return Draws(stacked, torch.stack(noise), proposal.importance_weights(stacked), (num_draws,))


def low_frequencies(shape: tuple[int, ...]) -> Tensor:
    """Return three orthonormal directions of noise: constant, left to right, top to bottom, alike in all channels."""
    _, height, width = shape
    down, right = (torch.cos(torch.pi * (torch.arange(n) + 0.5) / n) for n in (height, width))
    planes = [torch.ones(height, width), down[:, None].expand(height, width), right.expand(height, width)]
    return torch.stack([torch.nn.functional.normalize(p.expand(shape).flatten(), dim=0) for p in planes])


# --- features -------------------------------------------------------------------------------------------------------

FEATURE_SCHEMES = [
    ("stratified", "uniform"),
    ("antithetic", "uniform"),
    ("orthogonal", "uniform"),
    ("iid", "pilot"),
    ("stratified", "pilot"),
    ("antithetic", "pilot"),
    ("orthogonal", "pilot"),
    ("antithetic", "pairs"),  # tried and left out, as the two below
    ("one noise", "pilot"),
    ("sobol", "pilot"),
]


def kinds_of(proposal: str) -> tuple[str, ...]:
    """Return the kinds of gradients that a proposal is for: only raw loss gradients have norms that vary much."""
    return KINDS if proposal == "uniform" else KINDS[:1]


def baseline(bench: Bench) -> dict[str, Any]:
    """Return the variance of one iid uniform draw for each example, and the mean, for each kind of gradient."""
    digits = bench.rows(slice(0, NUM_EXAMPLES))
    draws = draws_of(
        "iid", uniform_proposal(NUM_TIMESTEPS), bench.teacher.latent_shape, BASELINE_DRAWS, 1000, range(NUM_EXAMPLES)
    )
    gradients = bench.gradients(digits, draws)
    vectors = {kind: bench.of_kind(kind, gradients, draws).double() for kind in KINDS}
    return {
        kind: {"variance": v.var(1).sum(-1).tolist(), "probes": probes(v.mean(1)).tolist()}
        for kind, v in vectors.items()
    }


def probes(vectors: Tensor) -> Tensor:
    """Return the components of vectors (examples, dims) along eight random directions, summed over examples."""
    directions = torch.from_numpy(stream(0, "probes").standard_normal((8, *vectors.shape)))
    return (directions * vectors.double()).sum((1, 2))


def measure_features(bench: Bench, scheme: str, proposal: str, num_draws: int, base: dict[str, Any]) -> dict[str, Any]:
    """Return the ECM of a scheme for each kind of gradient, and how far its mean is from the baseline's."""
    digits, ids = bench.rows(slice(0, NUM_EXAMPLES)), range(NUM_EXAMPLES)
    running = {kind: RunningVariance() for kind in kinds_of(proposal)}
    probed: dict[str, list[Tensor]] = {kind: [] for kind in running}
    for seed in range(FEATURE_REPLICATES[num_draws]):
        q = bench.proposal(proposal, "raw loss")
        draws = draws_of(scheme, q, bench.teacher.latent_shape, num_draws, seed, ids)
        gradients = bench.gradients(digits, draws)
        for kind in running:
            estimate = bench.of_kind(kind, gradients, draws).mean(1)
            running[kind].add(estimate)
            probed[kind].append(probes(estimate))
    cell = {}
    for kind, replicates in running.items():
        iid = torch.tensor(base[kind]["variance"]) / num_draws
        efficiency = relative_efficiency(iid, replicates.total_variance())
        cell[kind] = {
            "ecm": asdict(efficiency),
            "bias_z": bias_z(torch.stack(probed[kind]), replicates.total_variance(), base[kind]),
        }
    return cell


def bias_z(probed: Tensor, variance: Tensor, base: dict[str, Any]) -> list[float]:
    """Return, for each random direction, the difference of mean and baseline over its standard error."""
    error = (variance.sum() / len(probed) + sum(base["variance"]) / BASELINE_DRAWS).sqrt()
    return ((probed.mean(0) - torch.tensor(base["probes"]).double()) / error).tolist()


def bench_features(bench: Bench, name: str, results: Results) -> None:
    """Measure all schemes at all numbers of draws."""
    base = results.cell(f"{name}/baseline", lambda: baseline(bench))
    for scheme, proposal in FEATURE_SCHEMES:
        for num_draws in FEATURE_REPLICATES:
            key = f"{name}/features/{scheme}/{proposal}/{num_draws}"
            results.cell(key, lambda s=scheme, p=proposal, k=num_draws: measure_features(bench, s, p, k, base))


# --- control variates -----------------------------------------------------------------------------------------------


def control_part(bench: Bench, proposal: str, split: tuple[int, int], *, shared: bool) -> dict[str, Any]:
    """Return the variance of one part of the corrected estimate for each kind of gradient, and its relative error."""
    num_draws = split[0 if shared else 1]
    labels = bench.labels if bench.teacher.condition_kind == "label" else None
    factor = smoother_factor(bench.encoded.latents[:, 0], labels, ridge=split[0] / split[1])
    replicates: dict[str, list[Tensor]] = {kind: [] for kind in kinds_of(proposal)}
    for seed in range((SHARED_REPLICATES if shared else INDEPENDENT_REPLICATES)[num_draws]):
        q = bench.proposal(proposal, "raw loss")
        ids = None if shared else range(NUM_DIGITS)
        draws = sample_draws(
            q,
            bench.teacher.latent_shape,
            num_draws=num_draws,
            scheme="antithetic",
            seed=seed,
            purpose="control",
            ids=ids,
        )
        gradients = bench.gradients(bench.encoded, draws)
        for kind, made in replicates.items():
            estimate = bench.of_kind(kind, gradients, draws.expand(NUM_DIGITS)).mean(1).double()
            nothing = torch.zeros_like(estimate)
            parts = (estimate, nothing) if shared else (nothing, estimate)
            made.append(replace_common_part(*parts, factor)[:NUM_EXAMPLES])
    return {kind: variance_over_replicates(torch.stack(made)) for kind, made in replicates.items()}


def variance_over_replicates(estimates: Tensor) -> dict[str, Any]:
    """Return tr Cov of estimates (replicates, examples, dims), and the relative error that few replicates leave."""
    num = len(estimates)
    squares = (estimates - estimates.mean(0)).square().sum(-1) * num / (num - 1)
    means = squares.mean(1)
    return {"variance": squares.mean(0).tolist(), "relative_error": float(means.std() / means.mean() / num**0.5)}


def bench_control(bench: Bench, name: str, results: Results) -> None:
    """Measure both parts of the corrected estimate, and the ECM of their sums."""
    base = results.cell(f"{name}/baseline", lambda: baseline(bench))
    for proposal in ("uniform", "pilot"):
        for total, split in SPLITS.items():
            if proposal == "pilot" and total == 64:
                continue  # that many gradients of every digit take too long
            parts = [
                results.cell(
                    f"{name}/control part/{proposal}/{'shared' if shared else 'independent'} of {split[0]}+{split[1]}",
                    lambda p=proposal, k=split, s=shared: control_part(bench, p, k, shared=s),
                )
                for shared in (True, False)
            ]
            for kind in kinds_of(proposal):
                both = parts[0][kind], parts[1][kind]
                iid = torch.tensor(base[kind]["variance"]) / total
                key = f"{name}/control/{proposal}/{kind}/{total}"
                results.cell(key, lambda b=both, i=iid: control_efficiency(i, *b))


def control_efficiency(iid: Tensor, shared: dict[str, Any], independent: dict[str, Any]) -> dict[str, float]:
    """Return the ECM of the sum of both parts; its error is over examples and over replicates."""
    variances = [torch.tensor(part["variance"]) for part in (shared, independent)]
    efficiency = relative_efficiency(iid, variances[0] + variances[1])
    absolute = [
        float(v.mean()) * part["relative_error"] for v, part in zip(variances, (shared, independent), strict=True)
    ]
    over_replicates = float(np.hypot(*absolute) / (variances[0] + variances[1]).mean())
    return asdict(
        Measured(efficiency.value, float(np.hypot(efficiency.standard_error, efficiency.value * over_replicates)))
    )


# --- scores ---------------------------------------------------------------------------------------------------------

SCORE_SCHEMES = [
    ("iid", "uniform"),
    ("stratified", "uniform"),
    ("antithetic", "uniform"),
    ("stratified", "pilot"),
    ("antithetic", "pilot"),
    ("stratified", "scores"),
]


class Scores:
    """Preconditioned scores of digits for generated ones, with a kernel that is the same for all schemes."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        labels = [i % 10 for i in range(NUM_QUERIES)]
        queries, train = bench.encode(generate(labels, seed=1), labels), bench.rows(slice(0, NUM_TRAIN))
        condition = {k: torch.cat([queries.condition[k], train.condition[k]]) for k in train.condition}
        self.encoded = Encoded(torch.cat([queries.latents, train.latents]), condition)
        self.whiteners: dict[str, Tensor] = {}
        self.references = {
            (kind, bands): scores
            for proposal, kinds in (("uniform", KINDS[2:]), ("pilot", KINDS[:1]))
            for one_band in (True, False)
            for (kind, bands), scores in self.measure(
                "stratified", proposal, kinds, 256, 5000, one_band=one_band
            ).items()
        }

    def measure(
        self, scheme: str, proposal: str, kinds: tuple[str, ...], num_draws: int, seed: int, *, one_band: bool
    ) -> dict[tuple[str, str], Tensor]:
        """Return scores (queries, train) by kind of gradient and bands, from draws for one band or for four."""
        q = self.bench.proposal(proposal, kinds[0])
        draws = sample_draws(
            q,
            self.bench.teacher.latent_shape,
            num_draws=num_draws,
            num_bands=1 if one_band else 4,
            scheme=scheme,
            seed=seed,
        )
        gradients = self.bench.gradients(self.encoded, draws)
        found = {}
        for kind in kinds:
            vectors = self.bench.of_kind(kind, gradients, draws.expand(len(gradients)))
            if kind not in self.whiteners:  # from the first reference
                self.whiteners[kind] = whitener(root_weighted(vectors, draws)[NUM_QUERIES:].double())
            for bands in bands_of(scheme, num_draws, one_band=one_band, uniform=proposal == "uniform"):
                count = num_draws if bands == "K" else int(bands)
                config = EstimatorConfig(num_draws=num_draws, num_bands=count, scheme=scheme)
                means = average_bands(vectors, draws, config).mean(2).double() @ self.whiteners[kind]
                found[kind, bands] = torch.einsum("qbd,nbd->qn", means[:NUM_QUERIES], means[NUM_QUERIES:]) / count
        return found


def bands_of(scheme: str, num_draws: int, *, one_band: bool, uniform: bool) -> list[str]:
    """Return which numbers of bands (K: one for each draw) can be scored from draws for one band, or for four."""
    pairs = pair_size(scheme) == 2
    four = ["4"] if num_draws >= (8 if pairs else 4) else []
    return (["1"] + ["K"] * (not pairs) if one_band else []) + (four if uniform or not one_band else [])


def bench_scores(bench: Bench, name: str, results: Results) -> None:
    """Measure the variance of scores over replicates, and their agreement with 256 draws."""
    scores: list[Scores] = []

    def measure(
        scheme: str, proposal: str, kinds: tuple[str, ...], num_draws: int, *, one_band: bool
    ) -> dict[str, Any]:
        if not scores:
            scores.append(Scores(bench))
        replicates = [
            scores[0].measure(scheme, proposal, kinds, num_draws, seed, one_band=one_band)
            for seed in range(SCORE_REPLICATES[num_draws])
        ]
        return {
            f"{kind}, {bands} bands": describe_scores(
                torch.stack([r[kind, bands] for r in replicates]), scores[0].references[kind, bands]
            )
            for kind, bands in replicates[0]
        }

    for scheme, proposal in SCORE_SCHEMES:
        kinds = {"uniform": [("balanced", "raw loss")], "pilot": [("raw loss",)]}.get(
            proposal, [(k,) for k in KINDS[::2]]
        )
        for num_draws in SCORE_REPLICATES:
            for together in kinds:
                for one_band in (True, False) if proposal != "uniform" else (True,):
                    if not one_band and scheme == "antithetic" and num_draws < 8:
                        continue
                    key = (
                        f"{name}/scores/{scheme}/{proposal}/{num_draws}/{together[0]}{'' if one_band else ', 4 bands'}"
                    )
                    args = (scheme, proposal, together, num_draws)
                    results.cell(key, lambda a=args, o=one_band: measure(*a, one_band=o))


def describe_scores(replicates: Tensor, reference: Tensor) -> dict[str, Any]:
    """Return the variance of scores over replicates for each query, over the spread of the reference over examples."""
    spread = reference.var(1)
    centred = replicates - replicates.mean(2, keepdim=True)  # what is common to all examples changes no ranking
    top = reference.argsort(dim=1, descending=True)[:, :10]
    ranks, overlaps = [], []
    for scores in replicates:
        ranks.append([spearmanr(a, b).statistic for a, b in zip(scores, reference, strict=True)])
        mine = scores.argsort(dim=1, descending=True)[:, :10]
        overlaps.append((mine[:, :, None] == top[:, None]).any(2).double().mean(1).tolist())
    return {
        "variance": (replicates.var(0).mean(1) / spread).tolist(),
        "ranking_variance": (centred.var(0).mean(1) / spread).tolist(),
        "rank_correlation": asdict(mean_and_error(np.mean(ranks, axis=0))),
        "top_10_overlap": asdict(mean_and_error(np.mean(overlaps, axis=0))),
    }


# --- projection -----------------------------------------------------------------------------------------------------


def bench_projection(bench: Bench, name: str, results: Results) -> None:
    """Measure what the random projection adds to variances."""
    results.cell(f"{name}/projection", lambda: measure_projection(bench))


def measure_projection(bench: Bench) -> dict[str, Any]:
    """Return tr Cov after projection over that before, and variances of unit-band scores over draws and projections."""
    digits, shape = bench.rows(slice(0, 4)), bench.teacher.latent_shape
    exact = build_estimator(
        bench.teacher,
        FeaturizeConfig.from_flat({"weighting": "uniform", "rank": 10**6, "proj_dim": 10**8, "block_dim": 10**8}),
        16,
        None,
    )
    draws = draws_of("iid", uniform_proposal(NUM_TIMESTEPS), shape, 32, 0, range(4))
    whole = RunningVariance()
    for k in range(32):
        one = Draws(draws.timesteps[:, k : k + 1], draws.noise[:, k : k + 1], draws.weights[:, k : k + 1], (1,))
        whole.add(bench.gradients(digits, one, exact)[:, 0])
    ratios = torch.stack(
        [
            bench.gradients(digits, draws, bench.with_projection_seed(seed)).double().var(1).sum(-1)
            / whole.total_variance()
            for seed in range(8)
        ]
    )
    scored = bench.rows(slice(0, 32))
    products = torch.stack(
        [torch.stack([dots(bench, scored, projection, seed) for seed in range(6)]) for projection in range(6)]
    )
    of_draws, of_projection = products.var(1).mean(), (products.mean(1).var(0) - products.var(1).mean(0) / 6).mean()
    return {
        "trace_ratio": asdict(mean_and_error(ratios.flatten().numpy())),
        "score_variance_of_draws": float(of_draws),
        "score_variance_of_projection": float(of_projection),
        "spread_of_scores": float(products.mean((0, 1)).var()),
    }


def dots(bench: Bench, digits: Encoded, projection: int, seed: int) -> Tensor:
    """Return inner products of different digits' mean balanced gradients under 8 shared draws."""
    draws = sample_draws(uniform_proposal(NUM_TIMESTEPS), bench.teacher.latent_shape, num_draws=8, seed=seed)
    gradients = bench.gradients(digits, draws, bench.with_projection_seed(projection))
    means = bench.of_kind("balanced", gradients, draws.expand(len(gradients))).mean(1).double()
    rows, columns = torch.triu_indices(len(means), len(means), offset=1)
    return (means[rows] * means[columns]).sum(1)


PARTS: dict[str, Callable[[Bench, str, Results], None]] = {
    "features": bench_features,
    "control": bench_control,
    "scores": bench_scores,
    "projection": bench_projection,
}


# --- tables and figure ----------------------------------------------------------------------------------------------


def feature_table(cells: dict[str, Any], name: str) -> Table:
    """Return the ECM of every scheme and kind of gradient at equal network evaluations."""
    table = Table("gradients", "scheme", "proposal", *(f"{k} draws" for k in FEATURE_REPLICATES), title=f"ECM, {name}")
    for kind in KINDS:
        for scheme, proposal in FEATURE_SCHEMES:
            found = [cells.get(f"{name}/features/{scheme}/{proposal}/{k}", {}).get(kind) for k in FEATURE_REPLICATES]
            if any(found):
                table.add_row(kind, scheme, proposal, *(with_error(cell and cell["ecm"]) for cell in found))
        for proposal in ("uniform", "pilot"):
            found = [cells.get(f"{name}/control/{proposal}/{kind}/{k}") for k in FEATURE_REPLICATES]
            if any(found):
                table.add_row(kind, "antithetic, control", proposal, *map(with_error, found))
    return table


def with_error(cell: dict[str, float] | None) -> str:
    """Return `value ± error`."""
    return f"{cell['value']:.2f} ± {cell['standard_error']:.2f}" if cell else ""


def score_table(cells: dict[str, Any], name: str) -> Table:
    """Return variances of scores relative to their spread, agreement with 256 draws, and draws to match iid at 64."""
    columns = [f"{what} {k}" for what in ("variance", "rank corr.", "top 10") for k in SCORE_REPLICATES]
    table = Table("gradients", "bands", "scheme", "proposal", *columns, "as iid at 64", title=f"scores, {name}")
    rows = score_rows(cells, name)
    for (kind, bands, scheme, proposal), found in sorted(rows.items()):
        target = rows[kind, bands, "iid", "uniform"].get(64)
        matching = f"{draws_to_match(found, target):.1f}" if target and 64 in found else ""
        table.add_row(
            kind,
            bands,
            scheme,
            proposal,
            *(describe(found, k) for describe in SHOWN for k in SCORE_REPLICATES),
            matching,
        )
    return table


SHOWN: list[Callable[[dict[int, Any], int], str]] = [
    lambda found, k: f"{np.mean(found[k]['ranking_variance']):.3g}" if k in found else "",
    lambda found, k: with_error(found[k]["rank_correlation"]) if k in found else "",
    lambda found, k: with_error(found[k]["top_10_overlap"]) if k in found else "",
]


def score_rows(cells: dict[str, Any], name: str) -> dict[tuple[str, ...], dict[int, Any]]:
    """Return, by kind, bands, scheme and proposal, what was measured at each number of draws."""
    rows: dict[tuple[str, ...], dict[int, Any]] = {}
    for key, cell in cells.items():
        if key.startswith(f"{name}/scores/"):
            scheme, proposal, num_draws = key.split("/")[2:5]
            for what, found in cell.items():
                kind, bands = what.removesuffix(" bands").split(", ")
                rows.setdefault((kind, bands, scheme, proposal), {})[int(num_draws)] = found
    return rows


def draws_to_match(found: dict[int, Any], target: dict[str, Any]) -> float:
    """Return at how many draws a scheme's variance is the target's: log-linear between and beyond what was measured."""
    draws = np.log(sorted(found))
    variances = np.log([np.mean(found[k]["ranking_variance"]) for k in sorted(found)])
    slope, at = np.polyfit(draws, variances, 1)
    wanted = np.log(np.mean(target["ranking_variance"]))
    inside = np.interp(-wanted, -variances, draws, left=np.nan, right=np.nan)
    return float(np.exp(inside if np.isfinite(inside) else (wanted - at) / slope))


def draw_figure(cells: dict[str, Any], picture: Path) -> None:
    """Draw variance against network evaluations, for each teacher and kind of gradient."""
    import matplotlib.pyplot as plt

    names = [name for name in ("demo", "demo-pixels") if f"{name}/baseline" in cells]
    figure, axes = plt.subplots(len(names), len(KINDS), figsize=(11, 3.3 * len(names)), squeeze=False, sharex=True)
    draws = np.array(list(FEATURE_REPLICATES))
    for row, name in zip(axes, names, strict=True):
        for axis, kind in zip(row, KINDS, strict=True):
            axis.loglog(draws, 1 / draws, "k--", label="iid, uniform")
            for label, prefix in curves(kind):
                found = [cells.get(f"{name}/{prefix}/{k}") for k in draws]
                if all(found):
                    measured = [(cell[kind]["ecm"] if kind in cell else cell) for cell in found]
                    axis.loglog(
                        draws, [1 / k / m["value"] for k, m in zip(draws, measured, strict=True)], "o-", label=label
                    )
            axis.set_title(f"{name}: {kind}")
            axis.set_xticks(draws, labels=[str(k) for k in draws], minor=False)
            axis.set_xticks([], minor=True)
            axis.set_xlabel("network evaluations an example")
            axis.legend(fontsize=7)
        row[0].set_ylabel("variance, over that of one iid draw")
    figure.tight_layout()
    figure.savefig(picture, dpi=90)


def curves(kind: str) -> list[tuple[str, str]]:
    """Return labels and cells of the curves of a kind of gradient."""
    proposal = "pilot" if kind == "raw loss" else "uniform"
    schemes = [("iid, pilot", "features/iid/pilot")] if kind == "raw loss" else []
    return [
        *schemes,
        *(
            (f"{scheme}, {proposal}", f"features/{scheme}/{proposal}")
            for scheme in ("stratified", "antithetic", "orthogonal")
        ),
        ("antithetic, control variates", f"control/{proposal}/{kind}"),
    ]


@click.command()
@click.option(
    "--teacher", "teachers", multiple=True, type=click.Choice(["demo", "demo-pixels"]), help="[default: both]"
)
@click.option("--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="[default: all]")
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs/benchmarks/variance.json"))
@click.option("--picture", type=click.Path(path_type=Path), default=Path("docs/images/variance.png"))
@click.option("--fresh", is_flag=True, help="Measure everything again.")
def main(teachers: tuple[str, ...], parts: tuple[str, ...], output: Path, picture: Path, fresh: bool) -> None:
    """Measure what is missing in the results, and print the tables."""
    results = Results(output, "python scripts/bench_variance.py", fresh=fresh)
    for name in teachers or ("demo", "demo-pixels"):
        bench = Bench(name)
        for part in parts or PARTS:
            if part != "scores" or name == "demo":  # generated queries come from the demo teacher
                PARTS[part](bench, name, results)
        cells = results.content["cells"]
        Console(width=250).print(feature_table(cells, name), score_table(cells, name))
    draw_figure(results.content["cells"], picture)


if __name__ == "__main__":
    main()
