"""What `plan` measures on a few dozen examples: replicates of features and scores, variance shares, unit costs."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from carv_attrib.batches import Batch, encode_batch, read_batch
from carv_attrib.config import FeaturizeConfig, ProposalKind
from carv_attrib.data import ExampleDataset
from carv_attrib.errors import DataError
from carv_attrib.estimator import (
    PILOT_EXAMPLES,
    Encoded,
    Estimator,
    GradientProfile,
    average_bands,
    build_estimator,
    check_finite,
    measure_profile,
)
from carv_attrib.gradient import row_objective
from carv_attrib.kernel import DEFAULT_DAMPING, Kernel, decompose, outer_sums
from carv_attrib.manifest import choose_micro_batch, pilot_rows, read_pilot
from carv_attrib.parts import PartFeatures
from carv_attrib.planning.costs import Stopwatch, UnitCosts, peak_memory
from carv_attrib.planning.forecast import (
    Candidate,
    Replicates,
    build_candidate,
    jackknife_error,
    upstream_variance,
)
from carv_attrib.sampling import Draws, Scheme, pair_size
from carv_attrib.scores import score_bands
from carv_attrib.seeding import stream_key
from carv_attrib.store import FeatureStore
from carv_attrib.teacher import Teacher, placement
from carv_attrib.variance import Measured

Choice = tuple[Scheme, ProposalKind]

REPLICATES = 8
UPSTREAM_REPLICATES = 4
UPSTREAM_ENCODINGS = 4
MANY_DRAWS = 16
SHARE_DRAWS = 32
TIMED_READS = 32
LEAST_EXAMPLES = 4


@dataclass(frozen=True)
class VarianceShares:
    """Parts of the variance of one encoding with one independent draw, over their sum (law of total variance).

    Attributes:
        upstream: random encodings; only more of them lessen it.
        between_timesteps: gradients differ with t; strata take it away.
        odd_noise: changes sign with the noise; antithetic pairs take it away.
        even_noise: the rest; only more draws lessen it.
    """

    upstream: Measured
    between_timesteps: Measured
    odd_noise: Measured
    even_noise: Measured


@dataclass(frozen=True)
class Study:
    """What a pilot found.

    Attributes:
        profile: rms gradient norm over timesteps.
        shares: of the variance.
        candidates: the ways to draw, with their moments.
        units: what work costs.
        proj_dim: of features.
        num_examples: in the pilot.
        num_evaluations: rows of network calls that it took.
        seconds: that it took.
    """

    profile: GradientProfile
    shares: VarianceShares
    candidates: Sequence[Candidate]
    units: UnitCosts
    proj_dim: int
    num_examples: int
    num_evaluations: int
    seconds: float


def pilot_draws(num_bands: int, scheme: Scheme) -> tuple[int, int]:
    """Return the two K of the replicates: the least that fits, and one of at least 16 and twice that.

    >>> pilot_draws(4, "stratified"), pilot_draws(4, "antithetic"), pilot_draws(1, "stratified")
    ((4, 16), (8, 16), (1, 16))
    """
    least = num_bands * pair_size(scheme)
    return least, least * max(2, 2 * math.ceil(MANY_DRAWS / (2 * least)))


def num_evaluations(config: FeaturizeConfig, choices: Sequence[Choice]) -> int:
    """Return about how many network evaluations a study takes."""
    per_example = sum(REPLICATES * sum(pilot_draws(config.estimator.num_bands, scheme)) for scheme, _ in choices)
    if config.estimator.random_encoding:
        many = pilot_draws(config.estimator.num_bands, choices[0][0])[1]
        per_example += UPSTREAM_REPLICATES * UPSTREAM_ENCODINGS * many
    return PILOT_EXAMPLES * (per_example + 2 * SHARE_DRAWS)


def study(
    teacher: Teacher,
    examples: ExampleDataset,
    config: FeaturizeConfig,
    choices: Sequence[Choice],
    advance: Callable[[int], None],
) -> Study:
    """Measure all that a plan rests on, for some schemes and proposals, with one encoding of each example.

    Args:
        teacher: the frozen model.
        examples: the whole dataset.
        config: the settings that are not to be chosen.
        choices: the schemes and proposals to compare.
        advance: takes the number of network evaluations that were made.

    Raises:
        DataError: if too few pilot examples can be read.
        NonFiniteGradientError: for a gradient with NaN or infinity.
    """
    started = time.perf_counter()
    batch = read_pilot(teacher, examples, config)
    if len(batch.ids) < LEAST_EXAMPLES:
        raise DataError(f"a plan needs at least {LEAST_EXAMPLES} readable examples; {examples.source} has fewer.")
    bench = _Bench(teacher, config, batch, advance)
    shares, kernel = bench.shares_and_kernel()
    replicates = [bench.replicates(choice, kernel) for choice in choices]
    upstream = bench.upstream(choices[0], kernel) if config.estimator.random_encoding else (0.0, 0.0)
    candidates = [
        build_candidate(*choice, pilot_draws(config.estimator.num_bands, choice[0]), *pair, *upstream)
        for choice, pair in zip(choices, replicates, strict=True)
    ]
    units = bench.unit_costs(examples, choices[0])
    return Study(
        profile=bench.profile,
        shares=variance_shares(upstream[0], shares),
        candidates=candidates,
        units=units,
        proj_dim=kernel.proj_dim,
        num_examples=len(batch.ids),
        num_evaluations=bench.num_evaluations,
        seconds=time.perf_counter() - started,
    )


class _Bench:
    """The encoded pilot with its profile, and the stopwatch that runs along."""

    def __init__(self, teacher: Teacher, config: FeaturizeConfig, batch: Batch, advance: Callable[[int], None]) -> None:
        self.teacher, self.config, self.batch, self._advance = teacher, config, batch, advance
        self.device, _ = placement(teacher)
        self.watch = Stopwatch(self.device)
        self.num_evaluations = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        unweighted = build_estimator(teacher, config, choose_micro_batch(teacher, config), None)
        unweighted = replace(unweighted, config=replace(unweighted.config, num_encodings=1))
        self.encoded = encode_batch(unweighted, batch)
        self.profile = measure_profile(unweighted, self.encoded, batch.keys)

    def estimator(self, choice: Choice, num_draws: int, **changes: Any) -> Estimator:
        """Return the estimator of one encoding that featurize would use, but for some changes."""
        changes |= {"scheme": choice[0], "proposal": choice[1], "num_draws": num_draws, "num_encodings": 1}
        config = replace(self.config, estimator=replace(self.config.estimator, **changes))
        return build_estimator(self.teacher, config, choose_micro_batch(self.teacher, config), self.profile)

    def replicate(
        self, estimator: Estimator, encoded: Encoded, *names: str | int
    ) -> tuple[Float[Tensor, "batch draws d"], Draws]:
        """Return the features of draws of a seed of their own, with the projection that all seeds share."""
        seed = stream_key(estimator.config.seed, "plan", estimator.config.num_draws, *names)
        reseeded = replace(estimator, config=replace(estimator.config, seed=seed))
        rows = len(encoded.latents) * estimator.config.num_draws
        rows = math.ceil(rows / estimator.micro_batch) * estimator.micro_batch
        with self.watch.time("draw", rows):
            draws = reseeded.draws(self.batch.ids.tolist())
            features = reseeded.features(encoded, draws)
        check_finite(features, self.batch.keys)
        self.num_evaluations += rows
        self._advance(len(features) * estimator.config.num_draws)
        return features, draws

    def shares_and_kernel(self) -> tuple[Float[Tensor, "parts batch"], Kernel]:
        """Return for each example what `variance_shares` takes, and the kernel of the same draws.

        Of two independent sets of stratified antithetic pairs, with x the features in a stratum: `E|x|^2` is
        everything; the mean of a pair has lost what is odd in the noise; products of the two sets hold what is the
        same throughout a stratum; those of their means over strata, what is the same at all timesteps.
        """
        estimator = self.estimator(("antithetic", "uniform"), SHARE_DRAWS, num_bands=1, noise="independent")
        sets = [self.replicate(estimator, self.encoded, "shares", j)[0].double() for j in range(2)]
        first, second = (x.view(len(x), -1, 2, x.shape[-1]) for x in sets)  # each (batch, strata, 2, d)
        pairs = (first.mean(2), second.mean(2))
        whole = torch.stack([x.square().sum(-1).mean((1, 2)) for x in (first, second)]).mean(0)
        even = torch.stack([x.square().sum(-1).mean(1) for x in pairs]).mean(0)
        strata = (pairs[0] * pairs[1]).sum(-1).mean(1)
        mean = (pairs[0].mean(1) * pairs[1].mean(1)).sum(-1)
        vectors = torch.cat(sets).flatten(0, 1)[:, None, None]
        size = self.config.projection.block_size(vectors.shape[-1])
        sums = torch.zeros(())
        for rows in vectors.tensor_split(4):
            with self.watch.time("matrix_row", len(rows)):
                sums = sums + outer_sums(rows.float().double(), size)
        with self.watch.time("eigh", sums.shape[1]):
            kernel = decompose(sums, len(vectors))
        return torch.stack([strata - mean, whole - even, even - strata]), kernel

    def replicates(self, choice: Choice, kernel: Kernel) -> tuple[Replicates, Replicates]:
        """Return features and scores of every replicate, at the two K; time passes without projection in between."""
        features, scores = [], []
        for num_draws in pilot_draws(self.config.estimator.num_bands, choice[0]):
            estimator = self.estimator(choice, num_draws)
            found = [self.replicate(estimator, self.encoded, m) for m in range(REPLICATES)]
            features.append(torch.stack([draw_features.mean(1) for draw_features, _ in found]))
            scores.append(torch.stack([pilot_scores(kernel, average_bands(*x, estimator.config)) for x in found]))
            for _ in range(2):
                with self.watch.time("bare_draw", estimator.micro_batch):
                    self._bare_pass(estimator, found[0][1])
        return (features[0], features[1]), (scores[0], scores[1])

    def _bare_pass(self, estimator: Estimator, draws: Draws) -> None:
        """Run one full network call forwards, and backwards with respect to its input."""
        example = torch.arange(estimator.micro_batch) % len(self.encoded.latents)
        draw = torch.arange(estimator.micro_batch) % draws.timesteps.shape[1]
        latents = self.encoded.latents[example.to(self.encoded.latents.device), 0]
        noise, timesteps = draws.noise[0, draw].to(latents), draws.timesteps[0, draw].to(latents.device)
        condition = {name: values[example.to(values.device)] for name, values in self.encoded.condition.items()}
        noisy_latents = self.teacher.noise_schedule.add_noise(latents, noise, timesteps).requires_grad_()
        output = self.teacher.predict(noisy_latents, timesteps, condition)
        target = self.teacher.noise_schedule.target(latents, noise, timesteps)
        row_objective(self.config.estimator.objective, output, target).sum().backward()  # type: ignore[no-untyped-call]

    def upstream(self, choice: Choice, kernel: Kernel) -> tuple[float, float]:
        """Return what random encodings add to the variance of features and of scores."""
        estimator = self.estimator(choice, pilot_draws(self.config.estimator.num_bands, choice[0])[1])
        several = replace(estimator, config=replace(estimator.config, num_encodings=UPSTREAM_ENCODINGS))
        encoded = encode_batch(several, self.batch)
        features, scores = [], []
        for j in range(UPSTREAM_REPLICATES):
            for r in range(UPSTREAM_ENCODINGS):
                one = Encoded(encoded.latents[:, r : r + 1], encoded.condition)
                found = self.replicate(estimator, one, "upstream", j)
                features.append(found[0].mean(1))
                scores.append(pilot_scores(kernel, average_bands(*found, estimator.config)).flatten()[:, None])
        shape = (UPSTREAM_REPLICATES, UPSTREAM_ENCODINGS)
        both = (torch.stack(values).view(*shape, *values[0].shape) for values in (features, scores))
        of_features, of_scores = (upstream_variance(values) for values in both)
        return of_features, of_scores

    def unit_costs(self, examples: ExampleDataset, choice: Choice) -> UnitCosts:
        """Return the times taken so far, and those of reading, encoding and writing."""
        estimator = self.estimator(choice, pilot_draws(self.config.estimator.num_bands, choice[0])[0])
        skip_bad = self.config.execution.skip_bad
        rows = pilot_rows(examples, self.config, PILOT_EXAMPLES + TIMED_READS)[-TIMED_READS:]
        for start in range(0, len(rows), 4):
            with self.watch.time("read", len(rows[start : start + 4])):
                read_batch(examples, rows[start : start + 4], self.teacher, skip_bad=skip_bad)
        per_call = min(estimator.examples_per_call, len(self.batch.ids))
        draws = estimator.config.num_draws
        for _ in range(4):
            for size in (1, per_call):
                with self.watch.time(f"encode {size}", len(self.batch.ids) / size):
                    encode_batch(replace(estimator, micro_batch=size * draws), self.batch)
        one, many = self.watch["encode 1"], self.watch[f"encode {per_call}"]
        row = max(0.0, (many.value - one.value) / (per_call - 1)) if per_call > 1 else one.value
        features, found = self.replicate(estimator, self.encoded, "disk")
        part = PartFeatures(self.batch.ids, average_bands(features, found, estimator.config))
        return UnitCosts(
            read=self.watch["read"],
            encode_call=Measured(max(0.0, one.value - row), one.standard_error),
            encode_row=Measured(row, many.standard_error / per_call),
            draw=self.watch["draw"],
            bare_draw=self.watch["bare_draw"],
            matrix_row=self.watch["matrix_row"],
            eigh=self.watch["eigh"],
            record_bytes=self._time_files(part, estimator),
            byte=self.watch["byte"],
            memory_bytes=peak_memory(),
            device_memory_bytes=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0,
        )

    def _time_files(self, part: PartFeatures, estimator: Estimator) -> float:
        """Time writing the pilot and reading it twice; return the bytes of one record."""
        manifest = {
            "config": self.config.identity() | {"part_size": len(self.batch.records)},
            "dataset": {"num_examples": len(self.batch.records)},
            "proj_dim": part.features.shape[-1],
            "num_replicates": part.features.shape[2],
            "draws_per_example": estimator.config.num_draws,
        }
        with tempfile.TemporaryDirectory() as folder:
            store = FeatureStore.create(Path(folder), manifest)
            for repeat in range(3):
                started = time.perf_counter()
                store.write_part(0, part, self.batch.records)
                for _ in range(2):
                    store.read_part(0)
                seconds = time.perf_counter() - started
                sizes = [path.stat().st_size for path in (store.features_path(0), store.examples_path(0))]
                if repeat:
                    self.watch.add("byte", seconds / sum(sizes))
        return sizes[1] / len(self.batch.records)


def pilot_scores(kernel: Kernel, bands: Float[Tensor, "batch bands halves d"]) -> Float[Tensor, "batch others"]:
    """Return the scores of every example for every other one, as `Attributor.scores` makes them."""
    rotated = kernel.banded(bands)
    scores = score_bands(rotated, rotated, kernel.inverse("preconditioned", DEFAULT_DAMPING), independent=False).scores
    return scores[~torch.eye(len(scores), dtype=torch.bool)].view(len(scores), -1)


def variance_shares(upstream: float, parts: Float[Tensor, "parts batch"]) -> VarianceShares:
    """Return each part of the variance over the sum of all, with jackknife errors over examples.

    Args:
        upstream: variance that random encodings cause, a mean over examples.
        parts: of each example: between timesteps, odd noise, even noise.
    """
    parts = torch.cat([torch.full_like(parts[:1], upstream), parts])
    total = parts.sum(1)
    left_out = total[:, None] - parts  # (parts, batch), one example left out in each column
    errors = [jackknife_error(row) for row in (left_out / left_out.sum(0)).tolist()]
    shares = [Measured(*pair) for pair in zip((total / total.sum()).tolist(), errors, strict=True)]
    return VarianceShares(*shares)
