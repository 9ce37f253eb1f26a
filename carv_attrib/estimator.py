"""The estimator that a manifest describes, ready to be applied to training examples and queries alike."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn.functional import interpolate

from carv_attrib.augmentation import augment
from carv_attrib.config import EstimatorConfig, FeaturizeConfig
from carv_attrib.errors import DataError, NonFiniteGradientError, TeacherError
from carv_attrib.gradient import full_calls, project_gradient, select_layers
from carv_attrib.kernel import DEFAULT_DAMPING, kernel_of
from carv_attrib.memory import RowLimit
from carv_attrib.projection import Layer, Projector, build_projector
from carv_attrib.sampling import Draws, Proposal, importance_proposal, pair_size, sample_draws, uniform_proposal
from carv_attrib.seeding import stream
from carv_attrib.teacher import Condition, Teacher, build_condition, placement

PILOT_EXAMPLES = 32
PILOT_DRAWS = 16
PILOT_BINS = 32
SCORE_PILOT_DRAWS = 64


@dataclass(frozen=True)
class GradientProfile:
    """Root mean square gradient norm at some timesteps, measured once on a pilot; log-linear in between.

    Attributes:
        timesteps: increasing, means of bins of pilot draws.
        rms_norms: of the unweighted gradient.
        rms_products: of weighted gradients of different examples, preconditioned, at the same draw; empty unless the
            proposal is `scores`.
    """

    timesteps: tuple[float, ...]
    rms_norms: tuple[float, ...]
    rms_products: tuple[float, ...] = ()

    def at_every_timestep(self, num_timesteps: int) -> Float[Tensor, " timesteps"]:
        """Return the norms at each timestep, constant beyond the ends, in float64."""
        return _log_linear(self.timesteps, self.rms_norms, range(num_timesteps))

    def products_at_every_timestep(self, num_timesteps: int) -> Float[Tensor, " timesteps"]:
        """Return the products at each timestep, constant beyond the ends, in float64."""
        return _log_linear(self.timesteps, self.rms_products, range(num_timesteps))


def _log_linear(
    at: Sequence[float], values: Sequence[float], wanted: Sequence[int | float]
) -> Float[Tensor, " wanted"]:
    """Return values at `wanted`, log-linear between those at `at`."""
    return torch.from_numpy(np.exp(np.interp(wanted, at, np.log(values))))


@dataclass(frozen=True)
class Encoded:
    """Examples after the expensive upstream work, which is done once.

    Attributes:
        latents: clean ones.
        condition: one row for each example.
        mask: of queries about a part of the picture, weights of the positions of the latents, in [0, 1].
    """

    latents: Float[Tensor, "batch encodings c h w"]
    condition: Condition
    mask: Float[Tensor, "batch encodings h w"] | None = None


@dataclass(frozen=True)
class Estimator:
    """Everything that turns encoded examples into per-draw features (`docs/method.md`, eq. (2))."""

    teacher: Teacher
    config: EstimatorConfig
    layers: Sequence[Layer]
    projector: Projector
    proposal: Proposal
    weighting: Float[Tensor, " timesteps"]
    micro_batch: int
    autocast: bool = False
    row_limit: RowLimit = field(default_factory=RowLimit, compare=False)

    @property
    def examples_per_call(self) -> int:
        """Number of examples whose draws fill one network call."""
        return self.config.examples_per_call(self.micro_batch)

    def encode(
        self,
        pixels: Float[Tensor, "batch channels height width"],
        labels: Sequence[int | None] | None,
        prompts: Sequence[str | None] | None,
        ids: Sequence[int],
    ) -> Encoded:
        """Return latents and conditions, in calls of as many examples as have their draws in one network call.

        Random encodings are functions of the seed, the example's id and r.

        Raises:
            ArgumentError: for a label or prompt that the teacher does not take, or a missing one.
        """
        latents, conditions = [], []
        for rows in full_calls(len(pixels), self.examples_per_call):
            latents.append(self._encodings(pixels[rows], [ids[row] for row in rows]))
            conditions.append(
                build_condition(
                    self.teacher,
                    None if labels is None else [labels[row] for row in rows],
                    None if prompts is None else [prompts[row] for row in rows],
                )
            )
        condition = {name: torch.cat([c[name] for c in conditions])[: len(pixels)] for name in conditions[0]}
        return Encoded(torch.cat(latents)[: len(pixels)], condition)

    def _encodings(
        self, pixels: Float[Tensor, "batch channels height width"], ids: Sequence[int]
    ) -> Float[Tensor, "batch encodings c h w"]:
        """Return R latents of each example."""
        config, encodings = self.config, []
        for r in range(config.num_encodings):
            augmented, noise = self._augmented(pixels, ids, r), None
            if config.encoding == "sample":
                shape = self.teacher.latent_shape
                streams = [stream(config.seed, "encoding", i, r) for i in ids]
                noise = torch.from_numpy(np.stack([s.standard_normal(shape, np.float32) for s in streams]))
            encodings.append(self.teacher.encode(augmented, noise))
        return torch.stack(encodings, dim=1)

    def mask(
        self, pixels: Float[Tensor, "batch one height width"], ids: Sequence[int]
    ) -> Float[Tensor, "batch encodings h w"]:
        """Return masks in [0, 1], at the size of the latents: means over areas, augmented as the pictures are.

        Args:
            pixels: in [-1, 1], white for the parts that are asked about.
            ids: of the pictures.
        """
        masks = [self._augmented((pixels + 1) / 2, ids, r) for r in range(self.config.num_encodings)]
        size = self.teacher.latent_shape[1:]
        return torch.stack([interpolate(mask, size, mode="area")[:, 0] for mask in masks], dim=1)

    def _augmented(
        self, pixels: Float[Tensor, "batch channels height width"], ids: Sequence[int], r: int
    ) -> Float[Tensor, "batch channels height width"]:
        """Return the pixels of encoding r."""
        if self.config.augmentation == "none":
            return pixels
        streams = [stream(self.config.seed, "augmentation", i, r) for i in ids]
        return augment(pixels, self.config.augmentation, streams)

    def draws(self, ids: Sequence[int]) -> Draws:
        """Return the R K draws of the examples with these ids; one row for all, made once, when noise is shared."""
        return self._shared_draws if self.config.noise == "shared" else self._sample_draws(ids)

    @cached_property
    def _shared_draws(self) -> Draws:
        return self._sample_draws(None)

    def _sample_draws(self, ids: Sequence[int] | None) -> Draws:
        """Return R K draws for each id, or one row of them for all.

        Where products are taken draw by draw, all encodings have the same K draws, else each its own.
        """
        config = self.config
        per_encoding = [
            sample_draws(
                self.proposal,
                self.teacher.latent_shape,
                num_draws=config.num_draws,
                num_bands=1 if config.every_draw_a_band else config.num_bands,
                scheme=config.scheme,
                seed=config.seed,
                purpose="features" if r == 0 or config.every_draw_a_band else f"features of encoding {r}",
                ids=ids,
            )
            for r in range(config.num_encodings)
        ]
        columns = {
            name: torch.cat([getattr(draws, name) for draws in per_encoding], dim=1)
            for name in ("timesteps", "noise", "weights")
        }
        return Draws(**columns, band_sizes=per_encoding[0].band_sizes)

    def features(self, encoded: Encoded, draws: Draws) -> Float[Tensor, "batch draws proj_dim"]:
        """Return the weighted, projected gradient of every draw, in float32 on the CPU.

        Where memory runs out, network calls have fewer rows from there on, with a warning.

        Raises:
            TeacherError: if memory runs out at one row for each call.
        """
        return self.row_limit.run(lambda rows: self.project(encoded, draws, rows).float().cpu(), self.micro_batch)

    def project(self, encoded: Encoded, draws: Draws, rows: int) -> Float[Tensor, "batch draws proj_dim"]:
        """Return the weighted, projected gradient of every draw, from network calls of so many rows."""
        return project_gradient(
            self.teacher,
            encoded.latents,
            encoded.condition,
            draws,
            self.projector,
            layers=self.layers,
            micro_batch=rows,
            objective=self.config.objective,
            weighting=self.weighting,
            autocast=self.autocast,
            mask=encoded.mask,
        )

    def draws_fingerprint(self) -> str:
        """Return the hex SHA-256 of the draws of example 0: the same wherever the random streams are the same."""
        draws = self.draws([0])
        return hashlib.sha256(draws.timesteps.numpy().tobytes() + draws.noise.numpy().tobytes()).hexdigest()


def build_estimator(
    teacher: Teacher, config: FeaturizeConfig, micro_batch: int, profile: GradientProfile | None
) -> Estimator:
    """Return the estimator that `config` describes; without a profile, the unweighted uniform one of the pilot.

    Raises:
        ArgumentError: for layer patterns that match nothing, or a projection that is not available here.
    """
    device, dtype = placement(teacher)
    layers = select_layers(teacher.denoiser, config.projection.layers)
    projector = build_projector(config.projection, layers, seed=config.estimator.seed, device=device, dtype=dtype)
    num_timesteps = teacher.noise_schedule.num_timesteps
    weighting = torch.ones(num_timesteps, dtype=torch.float64)
    proposal = uniform_proposal(num_timesteps)
    if profile is not None:
        rms_norms = profile.at_every_timestep(num_timesteps)
        if config.estimator.weighting == "balanced":
            weighting = 1 / rms_norms
        if config.estimator.proposal == "weight":
            proposal = importance_proposal(weighting)
        if config.estimator.proposal == "pilot":
            proposal = importance_proposal(weighting * rms_norms)
        if config.estimator.proposal == "scores":
            proposal = importance_proposal(profile.products_at_every_timestep(num_timesteps))
    return Estimator(
        teacher,
        config.estimator,
        layers,
        projector,
        proposal,
        weighting,
        micro_batch,
        autocast=config.storage.autocast,
    )


def measure_profile(estimator: Estimator, encoded: Encoded, keys: Sequence[str]) -> GradientProfile:
    """Return the gradient norms at many timesteps, averaged over examples, and what the proposal needs (eq. (1), (3)).

    A projection preserves squared norms in expectation, so projected norms estimate true ones.

    Args:
        estimator: one without a profile.
        encoded: a few dozen examples.
        keys: their names, for messages.

    Raises:
        NonFiniteGradientError: for a gradient with NaN or infinity.
        TeacherError: if all gradients are zero.
        DataError: if the proposal compares examples, and there is only one.
    """
    draws = sample_draws(
        uniform_proposal(estimator.teacher.noise_schedule.num_timesteps),
        estimator.teacher.latent_shape,
        num_draws=PILOT_DRAWS,
        seed=estimator.config.seed,
        purpose="pilot",
        ids=range(len(encoded.latents)),
    )
    features = estimator.row_limit.run(lambda rows: estimator.project(encoded, draws, rows), estimator.micro_batch)
    check_finite(features, keys)
    squares = features.double().cpu().square().sum(-1).flatten()
    if not squares.any():
        raise TeacherError("the teacher's gradient is zero for every pilot example; choose other `layers`.")
    profile = GradientProfile(*binned_rms(draws.timesteps.flatten(), squares))
    if estimator.config.proposal != "scores":
        return profile
    if len(encoded.latents) < 2:
        raise DataError("`proposal` scores compares examples, and only one could be read for its pilot; use pilot.")
    return replace(profile, rms_products=_measure_products(estimator, encoded, profile, keys))


def binned_rms(
    timesteps: Int[Tensor, " n"], squares: Float[Tensor, " n"], num_bins: int = PILOT_BINS
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean timesteps and root mean squares of bins of as many values each."""
    order = timesteps.argsort(stable=True)
    bins = order.tensor_split(min(num_bins, len(order)))
    return (
        tuple(float(timesteps[chosen].double().mean()) for chosen in bins),
        tuple(float(squares[chosen].mean().sqrt()) for chosen in bins),
    )


def _measure_products(
    estimator: Estimator, encoded: Encoded, profile: GradientProfile, keys: Sequence[str]
) -> tuple[float, ...]:
    """Return rms products of the pilot's weighted gradients at the timesteps of its profile."""
    num_timesteps = estimator.teacher.noise_schedule.num_timesteps
    draws = sample_draws(
        uniform_proposal(num_timesteps),
        estimator.teacher.latent_shape,
        num_draws=SCORE_PILOT_DRAWS,
        seed=estimator.config.seed,
        purpose="score pilot",
    )
    vectors = estimator.features(Encoded(encoded.latents[:, :1], encoded.condition), draws).double()
    check_finite(vectors, keys)
    if estimator.config.weighting == "balanced":
        vectors = vectors / profile.at_every_timestep(num_timesteps)[draws.timesteps[0], None]
    at, products = binned_rms(draws.timesteps[0], mean_square_products(vectors, estimator.projector.block_dim))
    return tuple(_log_linear(at, products, profile.timesteps).tolist())


def mean_square_products(vectors: Float64[Tensor, "examples draws dims"], block_dim: int) -> Float[Tensor, " draws"]:
    """Return, at each draw, the mean over pairs of different examples of the square of `g_i^T (H + lambda I)^{-1} g_j`.

    H is the mean outer product of the vectors, in blocks of `block_dim` coordinates. Where scores are products draw by
    draw, the square root of this makes the proposal of least variance for them; where bands are, it allocates draws to
    the bands that vary most.
    """
    kernel = kernel_of(vectors[:, None], block_dim)
    inverse = kernel.inverse("preconditioned", DEFAULT_DAMPING)
    whitened = (kernel.banded(vectors[:, None])[:, 0] * inverse.sqrt()).transpose(0, 1)
    squares = (whitened @ whitened.transpose(1, 2)).square()
    pairs = len(vectors) * (len(vectors) - 1)
    total: Tensor = squares.sum((1, 2)) - squares.diagonal(dim1=1, dim2=2).sum(1)
    return total / pairs


def average_bands(
    draw_features: Float[Tensor, "batch draws proj_dim"], draws: Draws, config: EstimatorConfig
) -> Float[Tensor, "batch bands replicates proj_dim"]:
    """Return means under p over each half of each band; alternate draws (antithetic pairs) share a half.

    The weight of a draw is for a mean over all K, where a band of n draws has a share of n / K and not of 1 / B: times
    `B n / K`, it is for the mean over the band. Where each draw is a band, products are taken draw by draw, and the
    weight must be in them once: each side keeps its root.
    """
    batch, _, proj_dim = draw_features.shape
    if config.every_draw_a_band:
        features = root_weighted(draw_features, draws)
        return features.view(batch, config.num_encodings, config.num_draws, 1, proj_dim).mean(1)
    features = draw_features.view(batch, config.num_encodings, config.num_draws, proj_dim)
    shape = (batch, config.num_encodings, -1, config.num_replicates, pair_size(config.scheme), proj_dim)
    means, start = [], 0
    for size in draws.band_sizes:
        halves = features[:, :, start : start + size].reshape(shape).mean((1, 2, 4))
        means.append(halves * (config.num_bands * size / config.num_draws))
        start += size
    return torch.stack(means, dim=1)


def root_weighted(
    draw_features: Float[Tensor, "batch draws proj_dim"], draws: Draws
) -> Float[Tensor, "batch draws proj_dim"]:
    """Return vectors whose products, draw by draw, are those of a mean under p, whatever the proposal.

    A feature holds p/q once and a product of two features twice; dividing by its root leaves p/q, which is what makes a
    mean over draws from q one under p.
    """
    return draw_features / draws.weights.sqrt().float().unsqueeze(-1)


def check_finite(draw_features: Float[Tensor, "batch draws proj_dim"], keys: Sequence[str]) -> None:
    """Check that no gradient holds NaN or infinity.

    Raises:
        NonFiniteGradientError: naming the first example and draw that does.
    """
    bad = (~torch.isfinite(draw_features).all(-1)).nonzero()
    if len(bad):
        example, draw = bad[0].tolist()
        raise NonFiniteGradientError(
            f"the gradient of example {keys[example]!r} is not finite at draw {draw}; "
            "look at the image, or use `dtype` float32 or bfloat16."
        )
