"""The main path, from a dataset to a searchable index: read it top to bottom.

image -> encode once -> many cheap (timestep, noise) draws -> per-example gradient -> project -> store -> index
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor

from carv_attrib.actors import on_actors
from carv_attrib.batches import check_columns
from carv_attrib.config import ExecutionConfig, FeaturizeConfig, check_choice
from carv_attrib.data import ExampleDataset, open_dataset
from carv_attrib.errors import StoreError
from carv_attrib.estimator import Estimator, average_bands, check_finite
from carv_attrib.index import FeatureIndex, SearchSettings, read_index_choice, read_index_settings
from carv_attrib.kernel import Damping, KernelKind, ScoreKind, fit_kernel, warn_of_large_kernel
from carv_attrib.latents import EncodedBatch, LatentCache, encoded_parts
from carv_attrib.manifest import open_or_create, restore_estimator
from carv_attrib.memory import less_memory
from carv_attrib.parts import PartFeatures, concatenate
from carv_attrib.planning import PlanKind, check_plan, follow_plan, starting_config
from carv_attrib.progress import progress
from carv_attrib.recall import check_target, choose_search
from carv_attrib.records import Record
from carv_attrib.store import FORMAT_VERSION, FeatureStore, Segment
from carv_attrib.teacher import Teacher, loaded_placement
from carv_attrib.teachers import load_teacher
from carv_attrib.threads import in_background

if TYPE_CHECKING:
    import datasets

PartContent = tuple[PartFeatures | None, list[Record]]


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
            if store.is_complete:  # as a shard leaves, and an append that was stopped
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
    first, wanted, missing = segment.first_part, execution.shard_of(segment.parts), set(store.missing_parts())
    parts = {part - first: segment.rows(part) for part in wanted if part in missing}
    total = sum(len(segment.rows(part)) for part in wanted)
    make = make_parts_on_ray if execution.engine == "ray" else make_parts
    with (
        progress("featurize", total, total - sum(map(len, parts.values()))) as advance,
        in_background(store.write_part) as write_part,
        closing(make(estimator, examples, parts, execution, store.manifest, advance)) as made,
    ):
        for part, content in made:
            write_part(first + part, *content)


def make_parts(
    estimator: Estimator,
    examples: ExampleDataset,
    parts: Mapping[int, range],
    execution: ExecutionConfig,
    manifest: Mapping[str, Any],
    advance: Callable[[int], None],
) -> Generator[tuple[int, PartContent], None, None]:
    """Yield every part, given by its rows of the data set, with its content."""
    folder, part_size = execution.latent_cache, manifest["config"]["part_size"]
    cache = LatentCache.open(folder, estimator, examples, part_size) if folder else None
    with closing(encoded_parts(estimator, examples, parts, execution, cache)) as encoded:
        for part, batches in encoded:
            yield part, featurize_part(estimator, batches, advance)


def make_parts_on_ray(
    estimator: Estimator,
    examples: ExampleDataset,
    parts: Mapping[int, range],
    execution: ExecutionConfig,
    manifest: Mapping[str, Any],
    advance: Callable[[int], None],
) -> Generator[tuple[int, PartContent], None, None]:
    """Yield every part with its content, the same as `make_parts` does, from Ray actors and in any order."""
    make_work = partial(PartWork, estimator.teacher.source, examples, execution, manifest)
    made = on_actors(make_work, parts.items(), execution.ray_workers, gpu=execution.device != "cpu")
    with closing(made):
        for (part, rows), content in made:
            yield part, content
            advance(len(rows))


class PartWork:
    """What a Ray actor does; it loads the teacher for itself."""

    def __init__(
        self, teacher: str, examples: ExampleDataset, execution: ExecutionConfig, manifest: Mapping[str, Any]
    ) -> None:
        loaded = load_teacher(teacher, device=execution.device, dtype=manifest["config"]["dtype"])
        self._estimator = restore_estimator(loaded, manifest)
        self._examples, self._execution, self._manifest = examples, execution, manifest

    def __call__(self, item: tuple[int, range]) -> PartContent:
        """Return the content of one part."""
        execution, parts = self._execution, dict([item])
        with less_memory(self._estimator.teacher.denoiser, **execution.memory_savers):
            made = make_parts(self._estimator, self._examples, parts, execution, self._manifest, lambda _: None)
            ((_, content),) = made
        return content


def featurize_part(
    estimator: Estimator, batches: Iterable[EncodedBatch], advance: Callable[[int], None]
) -> PartContent:
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
    """Build the index, for what an earlier one was built for, unless there is a whole one of these features."""
    try:
        read_index_settings(store, read_all=True)
    except StoreError:
        build_index(store, **read_index_choice(store))


def build_index(
    store: FeatureStore,
    *,
    score: ScoreKind = "preconditioned",
    kernel: KernelKind = "bands",
    damping: Damping = "auto",
    factory: str | None = None,
    target_recall: float | None = None,
    queries: Tensor | None = None,
    search: SearchSettings | None = None,
) -> FeatureIndex:
    """Fit the kernel of a store, build its FAISS index for one score, and write both.

    Args:
        store: of the features, which are read part by part.
        score: that the inner products are to be.
        kernel: over bands, or means.
        damping: lambda_0, relative to the mean eigenvalue, or auto.
        factory: FAISS factory string, or auto, which depends on the number of examples; None: Flat, and auto with
            `target_recall`.
        target_recall: choose how it is searched so that it finds this share of the ten largest scores, in the mean.
        queries: to measure recall on, from `recall.query_features`; None: examples of the index.
        search: how it is searched, in place of choosing.

    Raises:
        ArgumentError: for an unknown score, kernel or factory, damping that is not positive, or a recall that is not
            in (0, 1].
        StoreError: if the store holds no features, or the index cannot be written.
    """
    check_choice("score", score, ScoreKind)
    if target_recall is not None:
        check_target(target_recall, store, queries)
    if kernel == "bands" and store.manifest["format_version"] < FORMAT_VERSION:  # others were warned of when begun
        num_dims = int(store.manifest["proj_dim"])
        warn_of_large_kernel(store.manifest["config"]["num_bands"], num_dims, num_dims)
    fitted = fit_kernel(store, kernel)
    factory = factory or (search.factory if search else "auto" if target_recall else "Flat")
    try:
        index = FeatureIndex.write(store, fitted, score=score, damping=damping, factory=factory)
        if target_recall:
            search = choose_search(index, store, fitted, target_recall, queries)
        return index.finish(store.path, search)
    except (OSError, RuntimeError, SafetensorError) as err:
        raise StoreError(f"the index cannot be written to {store.path}: {err}; mend that, and run it again.") from err
