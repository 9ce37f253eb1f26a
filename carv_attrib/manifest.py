"""From settings to a store with a manifest, and from a manifest back to the estimator it was made with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from carv_attrib.batches import Batch, encode_batch, read_batch
from carv_attrib.config import FeaturizeConfig
from carv_attrib.data import RESIZE_RULE, ExampleDataset
from carv_attrib.errors import DataError, StoreMismatchError
from carv_attrib.estimator import (
    PILOT_EXAMPLES,
    Encoded,
    Estimator,
    GradientProfile,
    build_estimator,
    measure_profile,
)
from carv_attrib.kernel import warn_of_large_kernel
from carv_attrib.memory import call_budget, largest_that_fits, measure_call
from carv_attrib.seeding import choose_positions, stream_key
from carv_attrib.store import FeatureStore
from carv_attrib.teacher import Teacher, placement


def open_or_create(
    teacher: Teacher,
    examples: ExampleDataset,
    output: str | Path,
    config: FeaturizeConfig,
    plan: Mapping[str, Any] | None = None,
) -> tuple[FeatureStore, Estimator]:
    """Return the store at `output` and its estimator: as begun earlier with the same settings, or new.

    A new manifest keeps the `plan` that the settings came from, if any.

    Raises:
        StoreMismatchError: if it was begun with other settings, a teacher or a dataset other than these.
        StoreError: if the folder cannot be written, or holds something else.
    """
    identity = {
        "config": config.identity(),
        "teacher": {"fingerprint": teacher.fingerprint},
        "dataset": {"fingerprint": examples.fingerprint, "num_examples": len(examples)},
    }
    if (Path(output) / "manifest.json").is_file():
        store = FeatureStore.open(output)
        store.check_matches(identity)
        return store, restore_estimator(teacher, store.manifest, _given_rows(config))
    micro_batch = choose_micro_batch(teacher, config)
    profile = run_pilot(teacher, examples, config, micro_batch) if needs_pilot(config) else None
    estimator = build_estimator(teacher, config, micro_batch, profile)
    warn_of_large_kernel(config.estimator.num_bands, estimator.projector.proj_dim, estimator.projector.block_dim)
    manifest = {
        **identity,
        "teacher": {**identity["teacher"], "source": teacher.source, "condition": teacher.condition_kind},
        "dataset": {
            **describe_dataset(examples),
            "resize_rule": RESIZE_RULE,
            "pixels": asdict(teacher.pixel_spec),
        },
        "pilot": asdict(profile) if profile else None,
        "micro_batch": micro_batch,
        "layers": [layer.name for layer in estimator.layers],
        "proj_dim": estimator.projector.proj_dim,
        "num_replicates": config.estimator.num_replicates,
        "draws_per_example": config.estimator.draws_per_example,
        "draws_sha256": estimator.draws_fingerprint(),
        "versions": {name: version(name) for name in ("carv-attrib", "torch", "diffusers", "numpy")},
        **({"plan": plan} if plan else {}),
    }
    return FeatureStore.create(output, manifest), estimator


def describe_dataset(examples: ExampleDataset) -> dict[str, Any]:
    """Return what a manifest says of a data set."""
    return {
        "fingerprint": examples.fingerprint,
        "num_examples": len(examples),
        "source": examples.source,
        "columns": examples.columns,
        "label_names": examples.label_names,
    }


def restore_estimator(teacher: Teacher, manifest: Mapping[str, Any], micro_batch: int | None = None) -> Estimator:
    """Return the estimator that a store was made with.

    Raises:
        StoreMismatchError: for another teacher, or where the random streams have changed.
    """
    if manifest["teacher"]["fingerprint"] != teacher.fingerprint:
        raise StoreMismatchError(
            f"the index was made by another teacher ({manifest['teacher']['source']}), not by {teacher.source}; "
            "their fingerprints differ. Use the first, or featurize again."
        )
    stored = manifest["pilot"]
    profile = GradientProfile(**{name: tuple(values) for name, values in stored.items()}) if stored else None
    config = FeaturizeConfig.from_flat(manifest["config"])
    estimator = build_estimator(teacher, config, micro_batch or manifest["micro_batch"], profile)
    if estimator.draws_fingerprint() != manifest["draws_sha256"]:
        raise StoreMismatchError(
            f"random draws differ from those of the index: it was made with numpy {manifest['versions']['numpy']}, "
            f"this is {version('numpy')}; install that version, or featurize again."
        )
    return estimator


def needs_pilot(config: FeaturizeConfig) -> bool:
    """Return whether the weighting or the proposal rests on measured gradients."""
    return config.estimator.weighting == "balanced" or config.estimator.proposal in ("pilot", "scores")


def run_pilot(teacher: Teacher, examples: ExampleDataset, config: FeaturizeConfig, micro_batch: int) -> GradientProfile:
    """Measure gradient norms over timesteps on a few dozen examples, chosen by a hash of their ids.

    Raises:
        DataError: if none of them can be read.
    """
    batch = read_pilot(teacher, examples, config)
    estimator = build_estimator(teacher, config, micro_batch, profile=None)
    return measure_profile(estimator, encode_batch(estimator, batch), batch.keys)


def read_pilot(teacher: Teacher, examples: ExampleDataset, config: FeaturizeConfig) -> Batch:
    """Read the examples of the pilot.

    Raises:
        DataError: if none of them can be read.
    """
    rows = pilot_rows(examples, config, PILOT_EXAMPLES)
    batch = read_batch(examples, rows, teacher, skip_bad=config.execution.skip_bad)
    if not len(batch.ids):
        raise DataError(
            f"none of {len(rows)} pilot examples of {examples.source} could be read: {batch.records[0].error}"
        )
    return batch


def pilot_rows(examples: ExampleDataset, config: FeaturizeConfig, count: int) -> list[int]:
    """Return the first so many rows of the dataset in an order by a hash of their ids under the seed."""
    key = stream_key(config.estimator.seed, "pilot")
    return choose_positions(key, torch.from_numpy(examples.ids), count).tolist()


def choose_micro_batch(teacher: Teacher, config: FeaturizeConfig) -> int:
    """Return the given rows of a network call, those that fit, or 64 for 16 x 16 latents, in inverse ratio to area.

    The last from 1 to 256, and no more than a part of the dataset has draws.

    Raises:
        ArgumentError: if those that fit are asked for on a device whose memory cannot be measured.
    """
    if config.execution.micro_batch == "auto":
        return measure_micro_batch(teacher, config)
    if given := _given_rows(config):
        return given
    _, height, width = teacher.latent_shape
    rows_of_a_part = config.storage.part_size * config.estimator.draws_per_example
    return max(1, min(256, 64 * 256 // (height * width), rows_of_a_part))


def settle_micro_batch(teacher: Teacher, config: FeaturizeConfig) -> FeaturizeConfig:
    """Return the config with `micro_batch` auto measured, once, and put in its place.

    Raises:
        ArgumentError: for a device whose memory cannot be measured.
    """
    if config.execution.micro_batch != "auto":
        return config
    return replace(config, execution=replace(config.execution, micro_batch=measure_micro_batch(teacher, config)))


def measure_micro_batch(teacher: Teacher, config: FeaturizeConfig) -> int:
    """Return the most rows of a network call that fit in memory, with the encoding of as many examples; see `memory`.

    Raises:
        ArgumentError: for a device whose memory cannot be measured.
    """
    device, _ = placement(teacher)
    estimator = build_estimator(teacher, config, 1, profile=None)
    most = min(config.execution.batch_size, config.storage.part_size) * config.estimator.draws_per_example
    return largest_that_fits(
        lambda rows: measure_call(lambda: _one_call(replace(estimator, micro_batch=rows)), rows, device),
        most,
        call_budget(device),
    )


def _one_call(estimator: Estimator) -> None:
    """Encode the blank examples of one full network call, and project their gradients at one draw."""
    teacher, count = estimator.teacher, estimator.examples_per_call
    spec = teacher.pixel_spec
    encoded = estimator.encode(
        torch.zeros(count, spec.channels, spec.height, spec.width),
        [0] * count if teacher.condition_kind == "label" else None,
        [""] * count if teacher.condition_kind == "prompt" else None,
        range(count),
    )
    example = torch.arange(estimator.micro_batch) % count
    draws = estimator.draws([0])
    draw = replace(draws, timesteps=draws.timesteps[:, :1], noise=draws.noise[:, :1], weights=draws.weights[:, :1])
    condition = {name: values[example.to(values.device)] for name, values in encoded.condition.items()}
    latents = encoded.latents[example.to(encoded.latents.device), :1]
    estimator.project(Encoded(latents, condition), draw, estimator.micro_batch)


def _given_rows(config: FeaturizeConfig) -> int | None:
    """Return `micro_batch` where it is a number."""
    return None if config.execution.micro_batch == "auto" else config.execution.micro_batch
