"""What featurizing two billion pictures with a teacher of the size of Stable Diffusion 1.5 would take, on paper.

Command:  python scripts/count_scaling.py
Hardware: any, a minute; nothing is run but the counting of operations, on tensors without memory
Writes:   docs/benchmarks/scaling.json and the table that it prints

Counted: floating-point operations of the denoiser (diffusers' `UNet2DConditionModel` as Stable Diffusion 1.5 has it, at
64 x 64 latents, 77 tokens) and of the encoder of its autoencoder (512 x 512 pixels), by torch's flop counter. Measured:
a draw's share of a training step, and bytes of an example (`docs/benchmarks.md`). Assumed, and to be replaced with your
own: the GPU's useful operations a second, its price, and the price of disk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from carv_attrib.parts import GROUP

SHARE_OF_STEP = 0.8
"""Of a plain training step: what a draw costs (`docs/benchmarks.md`, 3.9M UNet and 6.1M DiT, both at most 0.83)."""


def count(module: torch.nn.Module, *arguments: torch.Tensor) -> float:
    """Return the floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*arguments)
    return float(counter.get_total_flops())


def counted() -> dict[str, float]:
    """Return the operations of one forward pass of the denoiser and of the encoder, and the denoiser's parameters."""
    with torch.device("meta"):
        denoiser = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        blocks = ["DownEncoderBlock2D"] * 4
        encoder = AutoencoderKL(
            down_block_types=tuple(blocks),
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=512,
        ).encoder
        forward = count(denoiser, torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768))
        encoding = count(encoder, torch.empty(1, 3, 512, 512))
    parameters = sum(p.numel() for p in denoiser.parameters())
    return {"forward": forward, "encoding": encoding, "parameters": float(parameters)}


@click.command()
@click.option("--examples", default=2e9, show_default=True)
@click.option("--num-draws", default=8, show_default=True)
@click.option("--num-bands", default=4, show_default=True)
@click.option("--proj-dim", default=4096, show_default=True)
@click.option("--flops", default=4e14, show_default=True, help="Useful operations a second of a GPU.")
@click.option("--gpu-hour", default=2.5, show_default=True, help="Price, in dollars.")
@click.option("--terabyte-month", default=20.0, show_default=True, help="Price, in dollars.")
@click.option("--gpus", default=256, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs/benchmarks/scaling.json"))
def main(output: Path, **given: Any) -> None:
    """Count, multiply, write and print."""
    found = counted()
    examples, rate = given["examples"], given["flops"]
    draws = given["num_draws"] * 3 * SHARE_OF_STEP * found["forward"]
    hours = {name: examples * work / rate / 3600 for name, work in (("encode", found["encoding"]), ("draws", draws))}
    dims = given["num_bands"] * given["proj_dim"]
    terabytes = {
        "features": examples * (2 * dims * (1 + 4 / GROUP) + 16) / 1e12,  # two halves, in int8
        "search index (4 bits for 4 dimensions)": examples * (dims / 8 + 9) / 1e12,
        "latents, if kept": examples * 4 * 64 * 64 * 4 / 1e12,
    }
    result = {
        "command": "python scripts/count_scaling.py",
        "given": given,
        "counted": found,
        "gpu_hours": hours,
        "days": sum(hours.values()) / 24 / given["gpus"],
        "dollars": sum(hours.values()) * given["gpu_hour"],
        "terabytes": terabytes,
        "dollars_a_month": sum(terabytes.values()) * given["terabyte_month"],
    }
    output.write_text(json.dumps(result, indent=1) + "\n")
    table = Table("", "")
    for name in ("forward", "encoding"):
        table.add_row(f"{name}, one picture", f"{found[name] / 1e12:.3g} TFLOP")
    table.add_row("draws, one picture", f"{draws / 1e12:.3g} TFLOP")
    for name, value in hours.items():
        table.add_row(f"{name}, all", f"{value:,.0f} GPU hours")
    table.add_row(f"time on {given['gpus']} GPUs", f"{result['days']:.1f} days")
    table.add_row("price", f"{result['dollars']:,.0f} dollars")
    for name, value in terabytes.items():
        table.add_row(name, f"{value:.3g} TB")
    table.add_row("disk", f"{result['dollars_a_month']:,.0f} dollars a month")
    Console().print(table)


if __name__ == "__main__":
    main()
