"""Settings of a featurize run: frozen dataclasses that check themselves, with flags, YAML and manifest as views."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from carv_attrib.errors import ArgumentError
from carv_attrib.sampling import Scheme, num_halves, pair_size

ProposalKind = Literal["uniform", "weight", "pilot", "scores"]
Weighting = Literal["balanced", "uniform"]
NoiseSharing = Literal["shared", "independent"]
Objective = Literal["loss", "squared-norm", "mean"]
Encoding = Literal["mode", "sample"]
Augmentation = Literal["none", "flip", "crop"]
ProjectionKind = Literal["kronecker", "rademacher", "normal", "trak-basic", "trak-cuda"]
FeatureDtype = Literal["int8", "float16", "float32"]
Engine = Literal["local", "ray"]
TeacherDtype = Literal["float32", "bfloat16", "float16", "float64"]


def check_choice(name: str, value: str, allowed: object) -> None:
    """Check that `value` is one of the values of the Literal type `allowed`.

    Raises:
        ArgumentError: if it is not; the message lists them.
    """
    if value not in get_args(allowed):
        raise ArgumentError(f"`{name}` must be one of {', '.join(get_args(allowed))}, got {value!r}.")


def check_at_least(name: str, value: int, least: int, reason: str = "") -> None:
    """Check that `value` is a whole number of at least `least`, for a reason that the message gives.

    Raises:
        ArgumentError: if it is not.
    """
    if not hasattr(value, "__index__") or isinstance(value, bool) or value < least:
        because = f" ({reason})" if reason else ""
        raise ArgumentError(f"`{name}` must be a whole number of at least {least}{because}, got {value!r}.")


def _check_micro_batch(value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArgumentError(f"`micro_batch` must be a whole number of at least 1, or auto, got {value!r}.")


@dataclass(frozen=True)
class EstimatorConfig:
    """Which gradient is estimated, and with which draws (`docs/method.md`, eq. (1) to (5)).

    Attributes:
        num_draws: K, (timestep, noise) draws for each encoding of an example.
        num_bands: B, bands of timesteps whose means are kept apart; divides `num_draws`.
        scheme: how the K draws depend on one another.
        proposal: q(t), the distribution that timesteps are drawn from.
        noise: the same draws for every example and query, or their own for each.
        weighting: omega(t), part of what is attributed; balanced = 1 / rms gradient norm at t.
        objective: what is differentiated.
        num_encodings: R, random encodings of each example that its features average over.
        encoding: the posterior mode, or a sample of the posterior.
        augmentation: a random flip or crop before each encoding.
        seed: of draws, projection and pilot.
    """

    num_draws: int = 8
    num_bands: int = 4
    scheme: Scheme = "stratified"
    proposal: ProposalKind = "uniform"
    noise: NoiseSharing = "shared"
    weighting: Weighting = "balanced"
    objective: Objective = "loss"
    num_encodings: int = 1
    encoding: Encoding = "mode"
    augmentation: Augmentation = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least("num_draws", self.num_draws, 1)
        check_at_least("num_bands", self.num_bands, 1)
        check_at_least("num_encodings", self.num_encodings, 1)
        check_at_least("seed", self.seed, 0)
        check_choice("scheme", self.scheme, Scheme)
        check_choice("proposal", self.proposal, ProposalKind)
        check_choice("weighting", self.weighting, Weighting)
        check_choice("noise", self.noise, NoiseSharing)
        check_choice("objective", self.objective, Objective)
        check_choice("encoding", self.encoding, Encoding)
        check_choice("augmentation", self.augmentation, Augmentation)
        if self.num_encodings > 1 and not self.random_encoding:
            raise ArgumentError(
                f"`num_encodings` must be 1 where all encodings are the same, got {self.num_encodings}; "
                "use `encoding` sample or an `augmentation`."
            )
        if self.num_draws % self.num_bands:
            raise ArgumentError(
                f"`num_bands` must divide `num_draws` (={self.num_draws}), got {self.num_bands}; "
                f"use {max(b for b in range(1, self.num_bands) if self.num_draws % b == 0)}."
            )
        if self.num_draws // self.num_bands % pair_size(self.scheme):
            raise ArgumentError(
                f"`num_bands` must leave an even number of draws in each band for `scheme` {self.scheme}, got "
                f"{self.num_bands} bands of {self.num_draws // self.num_bands}; use fewer bands or more draws."
            )

    @property
    def num_replicates(self) -> int:
        """Halves of a band that are kept apart for standard errors: 2 where its draws (pairs) split evenly, else 1."""
        return num_halves(self.num_draws, self.num_bands, self.scheme)

    @property
    def draws_per_example(self) -> int:
        """R K, the network evaluations that an example costs."""
        return self.num_encodings * self.num_draws

    def examples_per_call(self, micro_batch: int) -> int:
        """Return how many examples have their draws in a network call of so many rows; at least one."""
        return max(1, micro_batch // self.draws_per_example)

    @property
    def every_draw_a_band(self) -> bool:
        """Whether products of gradients are taken draw by draw (B = K, shared) and not between means over bands."""
        return self.num_bands == self.num_draws and self.noise == "shared"

    @property
    def random_encoding(self) -> bool:
        """Whether two encodings of an example differ."""
        return self.encoding == "sample" or self.augmentation != "none"


@dataclass(frozen=True)
class ProjectionConfig:
    """How gradients become features (`docs/method.md`, eq. (7) and (8)).

    Attributes:
        projection: kind of random projection.
        proj_dim: dimensions of one feature.
        block_dim: dimensions of a block, all of them if there are fewer. With the Kronecker projection, layers are
            dealt out to the blocks, each of which is preconditioned alone.
        rank: Kronecker rank on each side of a layer.
        layers: name patterns (`fnmatch`) of the attributed layers; empty means every Linear and Conv2d.
    """

    projection: ProjectionKind = "kronecker"
    proj_dim: int = 4096
    block_dim: int = 1024
    rank: int = 16
    layers: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_choice("projection", self.projection, ProjectionKind)
        check_at_least("proj_dim", self.proj_dim, 1)
        check_at_least("block_dim", self.block_dim, 1)
        if self.proj_dim % self.block_size(self.proj_dim):
            raise ArgumentError(
                f"`proj_dim` must be a multiple of `block_dim` (={self.block_dim}), or less, got {self.proj_dim}; "
                f"use {self.proj_dim - self.proj_dim % self.block_dim}, or another `block_dim`."
            )
        check_at_least("rank", self.rank, 1)
        if isinstance(self.layers, str) or not all(isinstance(pattern, str) for pattern in self.layers):
            raise ArgumentError(f"`layers` must be a list of name patterns, got {self.layers!r}; write ['*attn*'].")
        object.__setattr__(self, "layers", tuple(self.layers))

    def block_size(self, proj_dim: int) -> int:
        """Return the dimensions of each block of features that have so many; dense projections have one block."""
        return min(self.block_dim, proj_dim) if self.projection == "kronecker" else proj_dim


@dataclass(frozen=True)
class DataConfig:
    """Where examples are in a dataset.

    Attributes:
        split: of a dataset that has several.
        image_column: column of pictures; by default found by type and name.
        label_column: column of class labels; by default found by type and name.
        caption_column: column of texts; by default found by type and name.
        id_column: column of whole numbers that name the examples; by default they are the row numbers.
    """

    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None
    id_column: str | None = None


@dataclass(frozen=True)
class StorageConfig:
    """How features are kept.

    Attributes:
        part_size: examples in one part, the unit that is committed at once; a kill loses two at most.
        feature_dtype: of stored features; float16 has a float32 scale for each vector, int8 for every 64 numbers of it.
        dtype: of the teacher's weights and activations.
        autocast: matrix products of the denoiser in bfloat16, all else in `dtype`, which must be float32.
    """

    part_size: int = 128
    feature_dtype: FeatureDtype = "int8"
    dtype: TeacherDtype = "float32"
    autocast: bool = False

    def __post_init__(self) -> None:
        check_at_least("part_size", self.part_size, 1)
        check_choice("feature_dtype", self.feature_dtype, FeatureDtype)
        check_choice("dtype", self.dtype, TeacherDtype)
        if self.autocast and self.dtype != "float32":
            raise ArgumentError(f"`autocast` needs `dtype` float32, got {self.dtype}; leave one of them out.")


@dataclass(frozen=True)
class ExecutionConfig:
    """What changes speed and memory but not what is estimated, and may change between resumes.

    Attributes:
        batch_size: examples that are read and held at once, rounded up to fill network calls.
        micro_batch: rows of every network call, always full; by default chosen from the size of the latents; auto: as
            many as fit, measured when the index is begun.
        device: auto, cpu, cuda, cuda:1, mps.
        skip_bad: record unreadable images and go on, instead of stopping.
        num_workers: threads that read and decode images ahead of the network; 0: none.
        latent_cache: folder that keeps latents and conditions for other runs with the same encoder.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        channels_last: weights of convolutions with channels innermost: for some GPUs faster.
        engine: where parts are made: in this process, or by Ray actors on this machine or the cluster of RAY_ADDRESS.
        ray_workers: actors; by default one for each GPU of the cluster, or for each CPU.
        shard: I/N, I from 0 to N - 1: only every Nth part, the first of them part I; then `merge` the shards.
    """

    batch_size: int = 32
    micro_batch: int | Literal["auto"] | None = None
    device: str = "auto"
    skip_bad: bool = False
    num_workers: int = 2
    latent_cache: str | None = None
    gradient_checkpointing: bool = False
    channels_last: bool = False
    engine: Engine = "local"
    ray_workers: int | None = None
    shard: str | None = None

    def __post_init__(self) -> None:
        check_choice("engine", self.engine, Engine)
        if self.ray_workers is not None:
            check_at_least("ray_workers", self.ray_workers, 1)
        if self.shard is not None:
            found = re.fullmatch(r"(\d+)/(\d+)", str(self.shard))
            if not found or int(found[1]) >= int(found[2]):
                raise ArgumentError(f"`shard` must be I/N with I from 0 to N - 1, got {self.shard!r}; such as 0/8.")
        check_at_least("batch_size", self.batch_size, 1)
        check_at_least("num_workers", self.num_workers, 0)
        if self.latent_cache == "":
            raise ArgumentError("`latent_cache` must name a folder, got ''; leave it out to keep no latents.")
        if self.micro_batch is not None and self.micro_batch != "auto":
            _check_micro_batch(self.micro_batch)

    @property
    def memory_savers(self) -> dict[str, bool]:
        """The settings that `memory.less_memory` takes."""
        return {"gradient_checkpointing": self.gradient_checkpointing, "channels_last": self.channels_last}

    def shard_of(self, parts: range) -> range:
        """Return the parts that this run makes."""
        first, step = map(int, (self.shard or "0/1").split("/"))
        return parts[first::step]

    def examples_per_batch(self, examples_per_call: int) -> int:
        """Return `batch_size`, rounded up to fill network calls."""
        return examples_per_call * math.ceil(self.batch_size / examples_per_call)


@dataclass(frozen=True)
class FeaturizeConfig:
    """Every setting of `featurize`, by component."""

    estimator: EstimatorConfig
    projection: ProjectionConfig
    data: DataConfig
    storage: StorageConfig
    execution: ExecutionConfig

    @staticmethod
    def from_flat(settings: Mapping[str, Any]) -> FeaturizeConfig:
        """Return the config with the given settings, named as the flags are, in place of the defaults.

        Raises:
            ArgumentError: for an unknown key, with the known ones, or a bad value.
        """
        known = setting_names()
        if unknown := sorted(set(settings) - set(known)):
            raise ArgumentError(
                f"unknown setting {', '.join(map(repr, unknown))}; known are {', '.join(sorted(known))}."
            )
        parts = {
            name: kind(**{key: settings[key] for key in kind.__dataclass_fields__ if key in settings})
            for name, kind in COMPONENTS.items()
        }
        return FeaturizeConfig(**parts)

    def identity(self) -> dict[str, Any]:
        """Return, flat and JSON-ready, the settings that decide what an index holds: all but the execution."""
        flat = {
            k: v for part in (self.estimator, self.projection, self.data, self.storage) for k, v in asdict(part).items()
        }
        return {key: list(value) if isinstance(value, tuple) else value for key, value in flat.items()}


COMPONENTS: dict[str, Any] = {
    "estimator": EstimatorConfig,
    "projection": ProjectionConfig,
    "data": DataConfig,
    "storage": StorageConfig,
    "execution": ExecutionConfig,
}
"""The dataclasses behind the attributes of `FeaturizeConfig`."""


def setting_names() -> list[str]:
    """Return the names of all settings: the keyword names of `featurize` and the keys of a config file."""
    return [field.name for kind in COMPONENTS.values() for field in fields(kind)]


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Return the settings in a YAML file, dashes in keys taken as underscores, keys without a value left out.

    Raises:
        ArgumentError: if the file is missing, is not YAML, or does not hold a mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as err:
        raise ArgumentError(f"`config` cannot be read: {path}: {err.strerror}.") from err
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise ArgumentError(f"`config` is not YAML: {path}: {' '.join(str(err).split())}") from err
    if not isinstance(content, dict):
        raise ArgumentError(f"`config` must hold `key: value` lines, got {type(content).__name__} in {path}.")
    return {str(key).replace("-", "_"): value for key, value in content.items() if value is not None}
