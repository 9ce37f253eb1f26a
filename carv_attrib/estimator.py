"""The estimator that a manifest describes, ready to be applied to training examples and queries alike."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from carv_attrib.config import EstimatorConfig, FeaturizeConfig
from carv_attrib.errors import NonFiniteGradientError, TeacherError
from carv_attrib.gradient import full_calls, project_gradient, select_layers
from carv_attrib.projection import Layer, Projector, build_projector
from carv_attrib.sampling import Draws, Proposal, importance_proposal, sample_draws, uniform_proposal
from carv_attrib.teacher import Condition, Teacher, build_condition, placement

PILOT_EXAMPLES = 32
PILOT_DRAWS = 16
PILOT_BINS = 32


@dataclass(frozen=True)
class GradientProfile:
    """Root mean square gradient norm at some timesteps, measured once on a pilot; log-linear in between.

    Attributes:
        timesteps: increasing, means of bins of pilot draws.
        rms_norms: of the unweighted gradient.
    """

    timesteps: tuple[float, ...]
    rms_norms: tuple[float, ...]

    def at_every_timestep(self, num_timesteps: int) -> Float[Tensor, " timesteps"]:
        """Return the profile at each timestep, constant beyond its ends, in float64."""
        import numpy as np

        log_norms = np.interp(np.arange(num_timesteps), self.timesteps, np.log(self.rms_norms))
        return torch.from_numpy(np.exp(log_norms))


@dataclass(frozen=True)
class Encoded:
    """Examples after the expensive upstream work, which is done once."""

    latents: Float[Tensor, "batch c h w"]
    condition: Condition


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

    @property
    def examples_per_call(self) -> int:
        """Number of examples whose draws fill one network call."""
        return max(1, self.micro_batch // self.config.num_draws)

    def encode(
        self,
        pixels: Float[Tensor, "batch channels height width"],
        labels: Sequence[int | None] | None,
        prompts: Sequence[str | None] | None,
    ) -> Encoded:
        """Return latents and conditions, in calls of as many examples as have their draws in one network call.

        Raises:
            ArgumentError: for a label or prompt that the teacher does not take, or a missing one.
        """
        latents, conditions = [], []
        for rows in full_calls(len(pixels), self.examples_per_call):
            latents.append(self.teacher.encode(pixels[rows]))
            conditions.append(
                build_condition(
                    self.teacher,
                    None if labels is None else [labels[row] for row in rows],
                    None if prompts is None else [prompts[row] for row in rows],
                )
            )
        condition = {name: torch.cat([c[name] for c in conditions])[: len(pixels)] for name in conditions[0]}
        return Encoded(torch.cat(latents)[: len(pixels)], condition)

    def draws(self, ids: Sequence[int] | Tensor) -> Draws:
        """Return the draws of the examples with these ids; one row for all when noise is shared."""
        return sample_draws(
            self.proposal,
            self.teacher.latent_shape,
            num_draws=self.config.num_draws,
            scheme=self.config.scheme,
            seed=self.config.seed,
            ids=[int(i) for i in ids] if self.config.noise == "independent" else None,
        )

    def features(self, encoded: Encoded, draws: Draws) -> Float[Tensor, "batch draws proj_dim"]:
        """Return the weighted, projected gradient of every draw, in float32 on the CPU."""
        features = project_gradient(
            self.teacher,
            encoded.latents,
            encoded.condition,
            draws,
            self.projector,
            layers=self.layers,
            micro_batch=self.micro_batch,
            objective=self.config.objective,
            weighting=self.weighting,
        )
        return features.float().cpu()

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
    return Estimator(teacher, config.estimator, layers, projector, proposal, weighting, micro_batch)


def measure_profile(estimator: Estimator, encoded: Encoded, keys: Sequence[str]) -> GradientProfile:
    """Return the gradient norms at many timesteps, averaged over examples (eq. (1), (3)).

    A projection preserves squared norms in expectation, so projected norms estimate true ones.

    Args:
        estimator: one without a profile.
        encoded: a few dozen examples.
        keys: their names, for messages.

    Raises:
        NonFiniteGradientError: for a gradient with NaN or infinity.
        TeacherError: if all gradients are zero.
    """
    draws = sample_draws(
        uniform_proposal(estimator.teacher.noise_schedule.num_timesteps),
        estimator.teacher.latent_shape,
        num_draws=PILOT_DRAWS,
        seed=estimator.config.seed,
        purpose="pilot",
        ids=range(len(encoded.latents)),
    )
    features = project_gradient(
        estimator.teacher,
        encoded.latents,
        encoded.condition,
        draws,
        estimator.projector,
        layers=estimator.layers,
        micro_batch=estimator.micro_batch,
        objective=estimator.config.objective,
    )
    check_finite(features, keys)
    squares = features.double().cpu().square().sum(-1).flatten()
    if not squares.any():
        raise TeacherError("the teacher's gradient is zero for every pilot example; choose other `layers`.")
    order = draws.timesteps.flatten().argsort(stable=True)
    bins = order.tensor_split(min(PILOT_BINS, len(order)))
    return GradientProfile(
        timesteps=tuple(float(draws.timesteps.flatten()[chosen].double().mean()) for chosen in bins),
        rms_norms=tuple(float(squares[chosen].mean().sqrt()) for chosen in bins),
    )


def average_bands(
    draw_features: Float[Tensor, "batch draws proj_dim"], config: EstimatorConfig
) -> Float[Tensor, "batch bands replicates proj_dim"]:
    """Return means over each half of each band of adjacent draws; alternate draws (antithetic pairs) share a half."""
    batch, _, proj_dim = draw_features.shape
    unit = 2 if config.scheme == "antithetic" else 1
    halves = draw_features.view(batch, config.num_bands, -1, config.num_replicates, unit, proj_dim)
    return halves.mean((2, 4))


def kernel_vectors(
    draw_features: Float[Tensor, "batch draws proj_dim"], draws: Draws
) -> Float[Tensor, "batch draws proj_dim"]:
    """Return vectors whose mean outer product is that of eq. (9) under p, whatever the proposal.

    A feature holds p/q once and its outer product twice; dividing by its root leaves p/q, which is what makes a mean
    over draws from q one under p.
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
