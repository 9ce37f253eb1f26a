"""Forward-process algebra: every teacher's convention is converted to these few lines once, at the edge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor

from carv_attrib.errors import ArgumentError

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class NoiseSchedule:
    """A variance-preserving forward process on `len(alphas_cumprod)` timesteps.

    Attributes:
        alphas_cumprod: squared signal level at each timestep, in (0, 1].
        prediction_type: what the denoiser outputs, in diffusers' words: one of `PredictionType`.

    Raises:
        ArgumentError: for a prediction type that is not known.
    """

    alphas_cumprod: Float[Tensor, " timesteps"]
    prediction_type: str

    def __post_init__(self) -> None:
        if self.prediction_type not in get_args(PredictionType):
            raise ArgumentError(
                f"`prediction_type` must be one of {', '.join(get_args(PredictionType))}, got "
                f"{self.prediction_type!r}; other parametrisations are not supported."
            )

    @property
    def num_timesteps(self) -> int:
        """Number of discrete noise levels."""
        return len(self.alphas_cumprod)

    def add_noise(
        self,
        latents: Float[Tensor, "batch *dims"],
        noise: Float[Tensor, "batch *dims"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch *dims"]:
        """Return `z_t = alpha_t z + sigma_t eps`."""
        alpha, sigma = self._levels(timesteps, latents)
        return alpha * latents + sigma * noise

    def target(
        self,
        latents: Float[Tensor, "batch *dims"],
        noise: Float[Tensor, "batch *dims"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch *dims"]:
        """Return what a perfect denoiser would output: eps, `alpha_t eps - sigma_t z`, or z."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        alpha, sigma = self._levels(timesteps, latents)
        return alpha * noise - sigma * latents

    def _levels(self, timesteps: Int[Tensor, " batch"], like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t and sigma_t, shaped to broadcast over `like`."""
        signal, shape = self.alphas_cumprod.double(), (-1, *[1] * (like.dim() - 1))
        alpha, sigma = signal.sqrt().to(like), (1 - signal).sqrt().to(like)
        return alpha[timesteps].view(shape), sigma[timesteps].view(shape)
