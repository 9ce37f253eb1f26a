"""The main path, from a dataset to a searchable index: read it top to bottom.

image -> encode once -> many cheap (timestep, noise) draws -> per-example gradient -> project -> store -> index
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from carv_attrib.batches import check_columns
from carv_attrib.config import ExecutionConfig, FeaturizeConfig, check_choice
from carv_attrib.data import ExampleDataset, open_dataset
from carv_attrib.errors import StoreError
from carv_attrib.estimator import Estimator, average_bands, check_finite
from carv_attrib.index import FeatureIndex, read_index_settings
from carv_attrib.kernel import Damping, KernelKind, ScoreKind, fit_kernel
from carv_attrib.latents import EncodedBatch, LatentCache, encoded_parts
from carv_attrib.manifest import open_or_create
from carv_attrib.memory import less_memory
from carv_attrib.planning import PlanKind, check_plan, follow_plan, starting_config
from carv_attrib.progress import progress
from carv_attrib.store import FeatureStore, PartFeatures, Record, Segment, concatenate
from carv_attrib.teacher import Teacher, loaded_placement
from carv_attrib.teachers import load_teacher
from carv_attrib.threads import in_background

if TYPE_CHECKING:
    import datasets


def featurize(
    teacher: Teacher | str | Path,
    dataset: str | Path | datasets.Dataset,
    output: str | Path,
    *,
    plan: PlanKind | None = None,
    budget: str | float | None = None,
    target_snr: float | None = None,
    **settings: Any,
) -> FeatureStore:
    """Compute the features of every example, and index them; goes on where an earlier run was stopped.

    Args:
        teacher: a loaded teacher, a folder or a hub id.
        dataset: a folder, parquet file, hub id, `digits`, or a `datasets.Dataset`.
        output: folder of the index.
        plan: auto: first run a pilot, and use what `planning.plan` recommends for the settings that are not given.
        budget: for the plan: time to spend: 90s, 30m, 2h, 1h30m, or seconds.
        target_snr: for the plan: score SNR to reach, in place of a budget.
        **settings: named as the flags are; `FeaturizeConfig` has all of them and their defaults.

    Raises:
        ArgumentError: for an unknown setting or a bad value.
        DataError: if the dataset cannot be read, or lacks what the teacher needs.
        BadImageError: for an unreadable image, unless `skip_bad`.
        StoreMismatchError: if `output` was made with other settings.
        StoreError: if `output` or `latent_cache` cannot be written.
        NonFiniteGradientError: for a gradient with NaN or infinity, naming the example.
    """
    if not isinstance(teacher, str | Path):
        settings = settings | loaded_placement(teacher, settings)
    check_plan(plan, budget, target_snr)
    config = starting_config(settings) if plan else FeaturizeConfig.from_flat(settings)
    if isinstance(teacher, str | Path):
        teacher = load_teacher(teacher, device=config.execution.device, dtype=config.storage.dtype)
    examples = open_dataset(dataset, **asdict(config.data))
    check_columns(teacher, examples)
    with less_memory(teacher.denoiser, **config.execution.memory_savers):
        planned = follow_plan(teacher, examples, output, settings, budget, target_snr) if plan else None
        if planned:
            config = FeaturizeConfig.from_flat({**planned["settings"], **settings})
        store, estimator = open_or_create(teacher, examples, output, config, planned)
        with store.writing():
            write_parts(store, estimator, examples, config.execution, store.segments[0])
            if not store.missing_parts():  # as a shard leaves, and an append that was stopped
                ensure_index(store)
    return store


def write_parts(
    store: FeatureStore,
    estimator: Estimator,
    examples: ExampleDataset,
    execution: ExecutionConfig,
    segment: Segment,
) -> None:
    """Compute and write every part of a segment, or of a shard of it, that is missing."""
    folder, first = execution.latent_cache, segment.first_part
    cache = LatentCache.open(folder, estimator, examples, segment.part_size) if folder else None
    wanted = execution.shard_of(segment.parts)
    missing = set(store.missing_parts())
    parts = {part - first: segment.rows(part) for part in wanted if part in missing}
    total = sum(len(segment.rows(part)) for part in wanted)
    with (
        progress("featurize", total, total - sum(map(len, parts.values()))) as advance,
        in_background(store.write_part) as write_part,
        closing(encoded_parts(estimator, examples, parts, execution, cache)) as encoded,
    ):
        for part, batches in encoded:
            write_part(first + part, *featurize_part(estimator, batches, advance))


def featurize_part(
    estimator: Estimator,
    batches: Iterable[EncodedBatch],
    advance: Callable[[int], None],
) -> tuple[PartFeatures | None, list[Record]]:
    """Return the features and the records of the batches of one part."""
    pieces, records = [], []
    for batch in batches:  # read ahead by threads, and encoded once, or found in the cache
        if batch.encoded is not None:
            draws = estimator.draws(batch.ids.tolist())
            features = estimator.features(batch.encoded, draws)  # cheap, many: (batch, draws, proj_dim)
            check_finite(features, batch.keys)
            bands = average_bands(features, draws, estimator.config)  # (batch, bands, replicates, proj_dim)
            pieces.append(PartFeatures(batch.ids, bands))
        records += batch.records
        advance(len(batch.records))
    return concatenate(pieces), records


def ensure_index(store: FeatureStore) -> None:
    """Build the index unless there is a whole one of these features, whatever the score it was built for."""
    try:
        read_index_settings(store, read_all=True)
    except StoreError:
        build_index(store)


def build_index(
    store: FeatureStore,
    *,
    score: ScoreKind = "preconditioned",
    kernel: KernelKind = "bands",
    damping: Damping = "auto",
) -> FeatureIndex:
    """Fit the kernel of a store, build its FAISS index for one score, and write both.

    Raises:
        ArgumentError: for an unknown score or kernel, or damping that is not positive.
        StoreError: if the store holds no features, or the index cannot be written.
    """
    check_choice("score", score, ScoreKind)
    index = FeatureIndex.build(store, fit_kernel(store, kernel), score=score, damping=damping)
    try:
        index.save(store.path)
    except (OSError, RuntimeError, SafetensorError) as err:
        raise StoreError(f"the index cannot be written to {store.path}: {err}; mend that, and run it again.") from err
    return index
