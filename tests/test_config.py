from __future__ import annotations

from pathlib import Path

import pytest

from carv_attrib.config import (
    EstimatorConfig,
    ExecutionConfig,
    FeaturizeConfig,
    ProjectionConfig,
    StorageConfig,
    read_config_file,
    setting_names,
)
from carv_attrib.errors import ArgumentError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_draws": 0}, r"`num_draws` must be a whole number of at least 1, got 0"),
        ({"num_draws": 2.5}, r"`num_draws` must be a whole number of at least 1, got 2.5"),
        ({"num_draws": True}, r"`num_draws` must be a whole number of at least 1, got True"),
        ({"num_draws": 10}, r"`num_bands` must divide `num_draws` \(=10\), got 4; use 2"),
        ({"num_draws": 4, "scheme": "antithetic"}, r"even number of draws in each band .* 4 bands of 1"),
        ({"num_draws": 4, "scheme": "orthogonal"}, r"even number of draws in each band for `scheme` orthogonal, got 4"),
        ({"scheme": "sobol"}, r"`scheme` must be one of stratified, antithetic, orthogonal, iid, grid, got 'sobol'"),
        ({"num_encodings": 0}, r"`num_encodings` must be a whole number of at least 1, got 0"),
        (
            {"num_encodings": 2},
            r"`num_encodings` must be 1 where all encodings are the same, got 2; use `encoding` sample or an `augment",
        ),
        ({"encoding": "mean"}, r"`encoding` must be one of mode, sample, got 'mean'"),
        ({"augmentation": "rotate"}, r"`augmentation` must be one of none, flip, crop, got 'rotate'"),
        ({"proposal": "best"}, r"`proposal` must be one of uniform, weight, pilot, scores, got 'best'"),
        ({"weighting": "x"}, r"`weighting` must be one of balanced, uniform, got 'x'"),
        ({"noise": "x"}, r"`noise` must be one of shared, independent, got 'x'"),
        ({"objective": "x"}, r"`objective` must be one of loss, squared-norm, mean, got 'x'"),
        ({"projection": "x"}, r"`projection` must be one of kronecker, .*, got 'x'"),
        ({"proj_dim": -1}, r"`proj_dim` must be a whole number of at least 1, got -1"),
        ({"layers": "attn"}, r"`layers` must be a list of name patterns, got 'attn'"),
        ({"part_size": 0}, r"`part_size` must be a whole number of at least 1, got 0"),
        ({"feature_dtype": "int4"}, r"`feature_dtype` must be one of int8, float16, float32, got 'int4'"),
        ({"proj_dim": 3000}, r"`proj_dim` must be a multiple of `block_dim` \(=1024\), or less, got 3000; use 2048"),
        ({"block_dim": 0}, r"`block_dim` must be a whole number of at least 1, got 0"),
        ({"micro_batch": 0}, r"`micro_batch` must be a whole number of at least 1, or auto, got 0"),
        ({"micro_batch": "64"}, r"`micro_batch` must be a whole number of at least 1, or auto, got '64'"),
        ({"micro_batch": "most"}, r"`micro_batch` must be a whole number of at least 1, or auto, got 'most'"),
        ({"micro_batch": True}, r"`micro_batch` must be a whole number of at least 1, or auto, got True"),
        ({"num_draw": 4}, r"unknown setting 'num_draw'; known are augmentation, autocast, batch_size, .*num_draws"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_a_bad_setting_is_one_line_that_names_it(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        FeaturizeConfig.from_flat(settings)
    assert "\n" not in str(caught.value)


def test_flat_settings_reach_their_component_and_the_rest_keep_defaults() -> None:
    config = FeaturizeConfig.from_flat({"num_draws": 16, "proj_dim": 64, "skip_bad": True, "layers": ["*attn*"]})
    assert config.estimator == EstimatorConfig(num_draws=16)
    assert config.projection == ProjectionConfig(proj_dim=64, layers=("*attn*",))
    assert config.execution == ExecutionConfig(skip_bad=True)
    assert config.storage == StorageConfig()


def test_identity_leaves_out_what_only_changes_speed_and_survives_json() -> None:
    identity = FeaturizeConfig.from_flat({"batch_size": 3, "micro_batch": 7, "layers": ["a"]}).identity()
    assert identity == FeaturizeConfig.from_flat({"layers": ["a"]}).identity()
    assert identity["layers"] == ["a"]
    assert set(setting_names()) - set(identity) == {
        "batch_size",
        "micro_batch",
        "device",
        "skip_bad",
        "num_workers",
        "latent_cache",
        "gradient_checkpointing",
        "channels_last",
        "engine",
        "ray_workers",
        "shard",
    }
    assert FeaturizeConfig.from_flat(identity).identity() == identity


@pytest.mark.parametrize(
    ("num_draws", "num_bands", "scheme", "replicates"),
    [
        (8, 4, "stratified", 2),
        (8, 8, "stratified", 1),
        (6, 2, "stratified", 1),
        (1, 1, "iid", 1),
        (8, 4, "antithetic", 1),
        (8, 2, "antithetic", 2),
        (8, 2, "orthogonal", 2),
    ],
)
def test_a_band_has_two_halves_where_its_draws_or_pairs_split_evenly(
    num_draws: int, num_bands: int, scheme: str, replicates: int
) -> None:
    config = FeaturizeConfig.from_flat({"num_draws": num_draws, "num_bands": num_bands, "scheme": scheme})
    assert config.estimator.num_replicates == replicates


@pytest.mark.parametrize("random", [{"encoding": "sample"}, {"augmentation": "flip"}, {"augmentation": "crop"}])
def test_several_encodings_multiply_the_draws_where_they_are_random(random: dict[str, str]) -> None:
    config = FeaturizeConfig.from_flat({"num_draws": 8, "num_encodings": 3} | random).estimator
    assert config.random_encoding
    assert config.draws_per_example == 24
    assert not EstimatorConfig().random_encoding


def test_a_config_file_has_the_keys_of_the_flags(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("teacher: demo\nnum-draws: 4\nnum_bands: 2\n")
    assert read_config_file(file) == {"teacher": "demo", "num_draws": 4, "num_bands": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "`config` cannot be read: .*: No such file or directory"),
        ("a: [", "`config` is not YAML: "),
        ("- a\n- b\n", "`config` must hold `key: value` lines, got list"),
    ],
)
def test_a_bad_config_file_is_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ArgumentError, match=message) as caught:
        read_config_file(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_config_is_valid(file: Path) -> None:
    settings = read_config_file(file)
    assert {settings.pop("teacher"), settings.pop("dataset"), settings.pop("output")}
    FeaturizeConfig.from_flat(settings)


def test_autocast_is_for_float32_weights() -> None:
    message = "`autocast` needs `dtype` float32, got bfloat16; leave one of them out"
    with pytest.raises(ArgumentError, match=message):
        FeaturizeConfig.from_flat({"autocast": True, "dtype": "bfloat16"})
    assert FeaturizeConfig.from_flat({"autocast": True}).identity()["autocast"] is True
