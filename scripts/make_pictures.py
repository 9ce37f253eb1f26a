"""Draw the pictures of the report page that README and docs show.

Command:  python scripts/make_pictures.py     (needs `make demo` before, and Chromium)
Writes:   docs/images/report.png, docs/images/five-digits.png
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
from PIL import Image, ImageChops

from carv_attrib import Attributor
from carv_attrib.demo import CLASSES
from carv_attrib.report import QueryResult
from carv_attrib.report.html import render_html

IMAGES = Path("docs/images")
MAX_HEIGHT = 8000
ANSWERS_ONLY = "<style>.tables, .reading { display: none }</style></head>"


def photograph(results: Sequence[QueryResult], path: Path, chromium: str, width: int, scale: float) -> None:
    """Save a picture of the page of some results, without settings, explanations and the empty rest below."""
    with tempfile.TemporaryDirectory() as folder:
        page, shot = Path(folder) / "page.html", Path(folder) / "page.png"
        page.write_text(render_html(results, title="").replace("</head>", ANSWERS_ONLY))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/user"]
        size = [f"--window-size={width},{MAX_HEIGHT}", f"--force-device-scale-factor={scale}"]
        subprocess.run(
            [chromium, *flags, *size, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True
        )
        with Image.open(shot) as opened:
            picture = opened.convert("RGB")
    background = Image.new("RGB", picture.size, picture.getpixel((0, 0)))
    bounds = ImageChops.difference(picture, background).getbbox()
    if bounds is None:
        raise click.ClickException("the picture of the page is empty; see whether Chromium can draw it.")
    margin = bounds[0]
    picture.crop((0, max(0, bounds[1] - margin), picture.width, bounds[3] + margin)).save(path, optimize=True)


@click.command()
@click.option("--demo", "folder", type=click.Path(path_type=Path, exists=True), default=Path("demo-out"))
@click.option("--chromium", default="chromium", show_default=True, help="Name or path of the program.")
def main(folder: Path, chromium: str) -> None:
    """Draw them."""
    attributor = Attributor.open(folder / "index")
    queries = {label: folder / f"generated-{label}.png" for label in CLASSES}
    single = [attributor.query(queries[3], label=3, top_k=5, opponents=True)]
    several = [attributor.query(path, label=label, top_k=5) for label, path in queries.items()]
    photograph(single, IMAGES / "report.png", chromium, 1000, 1.0)
    photograph(several, IMAGES / "five-digits.png", chromium, 1000, 0.6)


if __name__ == "__main__":
    main()
