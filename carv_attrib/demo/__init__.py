"""The packaged teacher and what it is for: generate digits, and ask which training digits made them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from carv_attrib.attributor import Attributor
from carv_attrib.pipeline import featurize
from carv_attrib.report import QueryResult, write_html
from carv_attrib.teachers import load_teacher

CLASSES = (0, 3, 5, 7, 8)


def generate(labels: Sequence[int], *, seed: int = 0, num_inference_steps: int = 50) -> list[Image.Image]:
    """Return one 32 x 32 digit that the packaged teacher generates for each label."""
    from diffusers import DiTPipeline

    folder = Path(__file__).parent / "teacher"
    pipeline = DiTPipeline.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    images: list[Image.Image] = pipeline(
        list(labels), guidance_scale=1.0, generator=generator, num_inference_steps=num_inference_steps
    ).images
    return images


def run_demo(output: str | Path, labels: Sequence[int] = CLASSES) -> tuple[list[QueryResult], Path]:
    """Featurize the digits, generate some, query them; return the results and the path of the report.

    Raises:
        StoreError: if `output` cannot be written.
    """
    output = Path(output)
    teacher = load_teacher("demo")
    featurize(teacher, "digits", output / "index")
    attributor = Attributor.open(output / "index", teacher=teacher)
    results = []
    for label, image in zip(labels, generate(labels), strict=True):
        path = output / f"generated-{label}.png"
        image.save(path)
        results.append(attributor.query(path, label=label, opponents=True))
    report = output / "report.html"
    write_html(results, report, title="Which digits made these?")
    return results, report
