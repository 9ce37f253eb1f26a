from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from carv_attrib import Attributor, featurize
from carv_attrib.cli import main
from carv_attrib.ensemble import featurize_ensemble
from carv_attrib.errors import ArgumentError, StoreCorruptError, StoreError, StoreMismatchError
from carv_attrib.estimator import Estimator
from carv_attrib.inspection import verify
from carv_attrib.scores import BandScores
from tests.conftest import SETTINGS


@pytest.fixture(scope="module")
def teachers(dit_folder: Path, dit_sigma_folder: Path) -> list[Path]:
    """Return two teachers of one autoencoder."""
    return [dit_folder, dit_sigma_folder]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, teachers: list[Path], digits_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("ensemble") / "index"
    featurize_ensemble(teachers, digits_folder, folder, **SETTINGS)
    return folder


@pytest.fixture(scope="module")
def picture(digits_folder: Path) -> Path:
    return digits_folder / "1" / "001.png"


def test_scores_are_means_over_the_teachers(index: Path, picture: Path) -> None:
    opened = Attributor.open(index, device="cpu")
    alone = [Attributor.open(index / f"checkpoint-{number}", device="cpu") for number in range(2)]
    scores, errors = opened.scores_with_errors([picture], labels=[1])
    each = [one.band_scores([picture], labels=[1]) for one in alone]
    np.testing.assert_allclose(scores, (each[0].scores + each[1].scores) / 2, rtol=1e-9)
    alike, projection = ((getattr(each[0], n) + getattr(each[1], n)) / 2 for n in ("crossed", "projection"))
    together = BandScores((each[0].bands + each[1].bands) / 2, alike, projection)  # of the same draws
    np.testing.assert_allclose(errors, together.standard_errors, rtol=1e-9)
    assert not np.allclose(each[0].scores, each[1].scores, rtol=0.1)

    result = opened.query(picture, label=1, top_k=20, opponents=True, group_by="label", timesteps=(0, 50))
    bands = sum(own.bands[0, 0].numpy() for own in each) / 2
    np.testing.assert_allclose(result.scores, bands[result.ids], rtol=1e-6)
    assert sum(group.score for group in result.groups) == pytest.approx(bands.sum(), rel=1e-6)
    assert result.cost["network_evaluations"] == 8
    assert len(str(result.settings["damping"]).split(", ")) == 2
    assert str(result.settings["teacher"]).count(", ") == 1
    refined = opened.query(picture, label=1, top_k=5, refine=5, max_draws=8)
    assert len(refined.ids) == 5


def test_refining_stops_where_the_mean_over_teachers_is_sure_enough(index: Path, picture: Path) -> None:
    """Each teacher alone would stop at another round."""
    opened = Attributor.open(index, device="cpu")
    question: dict[str, Any] = {"label": 1, "top_k": 3, "refine": 6}
    rounds = [opened.query(picture, **question, max_draws=draws) for draws in (8, 12, 16, 20)]
    errors = [refined.standard_errors.max() for refined in rounds]
    target = (errors[0] + min(errors)) / 2
    found = opened.query(picture, **question, max_draws=20, target_se=target)
    first = next(number for number, error in enumerate(errors) if error <= target)
    assert found.settings["draws_taken"] == (8, 12, 16, 20)[first]
    np.testing.assert_allclose(found.scores, rounds[first].scores)


def test_each_member_is_the_index_of_its_teacher_alone(
    index: Path, teachers: list[Path], digits_folder: Path, tmp_path: Path
) -> None:
    featurize(teachers[1], digits_folder, tmp_path / "alone", **SETTINGS)
    for file in ("features/part-000000.safetensors", "kernel.safetensors", "index-00000.faiss"):
        assert (tmp_path / "alone" / file).read_bytes() == (index / "checkpoint-1" / file).read_bytes()


def test_latents_are_encoded_once(
    teachers: list[Path], digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = Estimator.encode

    def counted(estimator: Estimator, pixels: object, labels: object, prompts: object, ids: object) -> object:
        encoded.extend(ids)  # type: ignore[arg-type]
        return encode(estimator, pixels, labels, prompts, ids)  # type: ignore[arg-type]

    monkeypatch.setattr(Estimator, "encode", counted)
    settings = SETTINGS | {"weighting": "uniform"}  # no pilot
    featurize_ensemble(teachers, digits_folder, tmp_path / "index", **settings)
    assert sorted(encoded) == list(range(20))
    assert sorted(file.name for file in (tmp_path / "index").iterdir()) == [
        "checkpoint-0",
        "checkpoint-1",
        "ensemble.json",
    ]


def test_a_plan_is_made_once_and_shares_the_budget(
    teachers: list[Path], digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets: list[float] = []

    def plan(teacher: object, examples: object, output: object, settings: object, budget: float, snr: object) -> object:
        budgets.append(budget)
        return {"settings": {"num_draws": 4 * len(budgets), "scheme": "antithetic"}, "budget": budget}

    monkeypatch.setattr("carv_attrib.pipeline.follow_plan", plan)
    settings = {name: value for name, value in SETTINGS.items() if name != "num_draws"}
    stores = featurize_ensemble(teachers, digits_folder, tmp_path / "index", plan="auto", budget="1m", **settings)
    assert budgets == [30.0]
    for store in stores:
        assert (store.manifest["config"]["num_draws"], store.manifest["config"]["scheme"]) == (4, "antithetic")


def test_members_of_other_settings_are_refused(
    index: Path, teachers: list[Path], digits_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(index, tmp_path / "index")
    shutil.rmtree(tmp_path / "index" / "checkpoint-1")
    featurize(teachers[1], digits_folder, tmp_path / "index" / "checkpoint-1", **SETTINGS | {"seed": 1})
    with pytest.raises(StoreMismatchError, match="config.seed: stored 1, requested 0"):
        Attributor.open(tmp_path / "index")


def test_a_stopped_run_goes_on(
    index: Path, teachers: list[Path], digits_folder: Path, tmp_path: Path, picture: Path
) -> None:
    shutil.copytree(index, tmp_path / "index")
    shutil.rmtree(tmp_path / "index" / "checkpoint-1")
    with pytest.raises(StoreError, match="checkpoint-1 does not exist"):
        Attributor.open(tmp_path / "index")
    featurize_ensemble(teachers, digits_folder, tmp_path / "index", **SETTINGS)
    again, whole = (
        Attributor.open(path, device="cpu").scores([picture], labels=[1]) for path in (tmp_path / "index", index)
    )
    np.testing.assert_array_equal(again, whole)
    with pytest.raises(StoreMismatchError, match="was begun with 2 teachers, not with 3"):
        featurize_ensemble([*teachers, teachers[0]], digits_folder, tmp_path / "index", **SETTINGS)


def test_bad_input_is_one_line(
    index: Path, tiny_index: Path, teachers: list[Path], digits_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match="`teachers` must be two at least, got 1"):
        featurize_ensemble(teachers[:1], digits_folder, tmp_path / "index")
    with pytest.raises(StoreError, match="exists and is not an index of several teachers; name a new folder"):
        featurize_ensemble(teachers, digits_folder, tiny_index)
    with pytest.raises(ArgumentError, match=r"`teacher` must be as many as the index has \(=2\), got 1"):
        Attributor.open(index, teacher=teachers[0])
    (tmp_path / "ensemble.json").write_text(json.dumps({"members": ["../elsewhere"]}))
    with pytest.raises(StoreCorruptError, match="a member lies elsewhere"):
        Attributor.open(tmp_path)


def test_the_command_line_takes_several_teachers(
    teachers: list[Path], digits_folder: Path, tmp_path: Path, picture: Path
) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
        return result.output

    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    folder = str(tmp_path / "index")
    each = [f"--teacher={teacher}" for teacher in teachers]
    assert run("featurize", *each, f"--dataset={digits_folder}", f"--output={folder}", *flags).count("20 examples") == 2
    assert run("index", folder, "--damping=0.5").count("20 examples indexed") == 2
    question = ("query", folder, f"--image={picture}", "--label=1", "--device=cpu", "--json")
    answer = json.loads(run(*question, *each))
    assert answer["settings"]["damping"] == "0.5, 0.5"
    assert "no problems found" in run("verify", folder)
    features = tmp_path / "index" / "checkpoint-1" / "features" / "part-000000.safetensors"
    content = bytearray(features.read_bytes())
    content[-1] ^= 1
    features.write_bytes(content)
    assert any("checkpoint-1" in problem for problem in verify(folder))
    refused = CliRunner().invoke(main, ["inspect", folder])
    assert refused.exit_code != 0
    assert "has an index for each of several teachers; name one" in refused.output
