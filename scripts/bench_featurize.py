"""What features cost: against plain training steps, against peers, with the size of the data, and by stage.

Command:  python scripts/bench_featurize.py    (with `pip install -e '.[bench]'` for the peer LoGra)
Hardware: 2 CPU cores, about 25 minutes; on a machine with CUDA also Stable Diffusion 1.5 and DiT-XL/2
Writes:   docs/benchmarks/featurize.json after every cell, so that a killed run goes on, and the tables that it prints

`--part ratios`. Methods take turns in every repetition, each repetition beginning with the next one, so that ratios
hold while the machine's speed drifts; medians and quartiles over repetitions. All are given the same micro-batches:

- training step: forward and backward with gradients of all weights, no optimizer.
- floor: forward, and backward with respect to activations. The graph starts where it does for ours, at the outputs of
  the first Linear and Conv2d layers; no other hooks.
- ours Kronecker: `Estimator.features` at the default projection.
- vmap: `torch.func.vmap(grad)` with respect to the weights of the attributed layers alone; attention is written out
  (SDPBackend.MATH) on CPU, where the fused kernel has no batching rule and runs row by row.
- LoGra: dattri's `HookManager` and compressors, which is what its `LoGraAttributor.cache` runs for each batch, at our
  rank (16 on each side) and at its default (64), around one ordinary backward of the diffusion loss; nothing is
  offloaded, stored or inverted. It knows only Linear layers that are called once in a forward pass: all others are
  frozen and left out, and cost it nothing. `share` is that of the attributed weights which it covers. Its compressors
  run without `torch.compile`, which recompiles for every layer and was no faster.

Peak memory: of live tensors during one network call of micro-batch rows, over what was there before, measured in a call
of its own (`peak_bytes`).

`--part projection`. vmap, then TRAK's BasicProjector (and CudaProjector, where `fast_jl` imports) at 2,048 dims; ours
dense, whole; and the projections alone, on the same gradients, at most 64 rows. BasicProjector makes its matrix anew,
block by equal block of columns, in every call; where the whole matrix would have more than `--basic-entries` entries,
as many blocks are timed as that allows, and the time is taken in proportion (`share`).

`--part growth`. Seconds of all of `featurize` for the demo teacher, and a linear fit over N examples and K draws.

`--part stages`. Where the time of `featurize` goes: functions are wrapped with clocks that count what the wrapped
functions inside them do not; the projected backward is split by the ratio floor / ours, measured beside it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from benchmark import Results, quartiles
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from carv_attrib import featurize, load_teacher
from carv_attrib.config import FeaturizeConfig
from carv_attrib.data import PixelSpec
from carv_attrib.data.sources import open_digits
from carv_attrib.estimator import Encoded, Estimator, build_estimator
from carv_attrib.gradient import row_objective, select_layers
from carv_attrib.manifest import choose_micro_batch
from carv_attrib.memory import peak_bytes
from carv_attrib.projection import DenseProjector, Layer
from carv_attrib.teacher import Teacher, placement
from carv_attrib.teachers._diffusers import DiffusersTeacher, freeze, schedule_of

COMMAND = "python scripts/bench_featurize.py"
PEER_DIM = 2048
LOGRA_RANKS = (16, 64)
PEER_DRAWS = 4
"""Peers are measured at as many draws, and at one thread."""
BASELINE = "training step"
EVALUATIONS = {"demo": 512, "unet-4m": 64, "dit-6m": 64, "sd15": 32, "dit-xl-2": 64}
"""Network evaluations of a method in a repetition, rounded up to whole micro-batches."""
PROJECTION_ROWS = 64
"""At most, of a network call in the second table."""
MATRIX_BLOCK = 128
MATRIX_ENTRIES = 2**30
"""Columns, and at most entries, of the part of BasicProjector's matrix that exists at once."""
GRADIENT_BYTES = 2**33
"""Of the per-example gradients that vmap may hold at once."""


# Teachers


def unet_4m() -> nn.Module:
    """Return an untrained UNet of about 4M parameters for 16 x 16 latents with 4 channels."""
    return UNet2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=32,
    )


def dit(*, layers: int, heads: int, head_dim: int, sample_size: int, num_classes: int) -> nn.Module:
    """Return an untrained DiT with patches of 2 x 2, as `facebook/DiT-XL-2-256` is configured."""
    return DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=sample_size,
        patch_size=2,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=num_classes,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )


def dit_6m() -> nn.Module:
    """Return an untrained DiT of about 6M parameters (hidden size 272) for 16 x 16 latents with 4 channels."""
    return dit(layers=4, heads=4, head_dim=68, sample_size=16, num_classes=10)


def dit_xl_2() -> nn.Module:
    """Return an untrained DiT-XL/2 for 256 x 256: 675M weights and, in diffusers, embeddings in every block."""
    return dit(layers=28, heads=16, head_dim=72, sample_size=32, num_classes=1000)


def sd15() -> nn.Module:
    """Return an untrained UNet of Stable Diffusion 1.5."""
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,  # diffusers means the number of heads
        cross_attention_dim=768,
        norm_num_groups=32,
    )


UNTRAINED = {"unet-4m": unet_4m, "dit-6m": dit_6m, "sd15": sd15, "dit-xl-2": dit_xl_2}
CUDA_ONLY = ("sd15", "dit-xl-2")


def open_teacher(name: str) -> Teacher:
    """Return the packaged teacher, or an untrained one; the large ones on the GPU in bfloat16."""
    if name == "demo":
        return load_teacher("demo", device="cpu")
    device, dtype = ("cuda", torch.bfloat16) if name in CUDA_ONLY else ("cpu", torch.float32)
    with torch.device(device):
        torch.manual_seed(0)
        denoiser = UNTRAINED[name]()
    fill_zeros(denoiser)
    freeze(denoiser, device=torch.device(device), dtype=dtype)
    kind = "prompt" if name == "sd15" else "label" if name.startswith("dit") else "none"
    size = denoiser.config.sample_size
    return DiffusersTeacher(
        source=f"random {name}",
        fingerprint="",
        pixel_spec=PixelSpec(8 * size, 8 * size, 3),
        latent_shape=(4, size, size),
        noise_schedule=schedule_of(DDPMScheduler()),
        condition_kind=kind,
        num_classes=denoiser.config.num_embeds_ada_norm if kind == "label" else 0,
        denoiser=denoiser,
    )


@torch.no_grad()
def fill_zeros(denoiser: nn.Module) -> None:
    """Give small random values to weights that start as zeros, which would cut whole blocks off the gradient."""
    for parameter in denoiser.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)


def random_examples(teacher: Teacher, num_examples: int) -> Encoded:
    """Return latents of unit variance, and a class or a text: the time of a network does not depend on what it sees."""
    device, dtype = placement(teacher)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(num_examples, 1, *teacher.latent_shape, generator=generator).to(device, dtype)
    if teacher.condition_kind == "prompt":
        text = torch.randn(num_examples, 77, 768, generator=generator)
        return Encoded(latents, {"encoder_hidden_states": text.to(device, dtype)})
    labels = [i % teacher.num_classes for i in range(num_examples)] if teacher.num_classes else None
    return Encoded(latents, teacher.condition(labels, None))


# What is timed


@dataclass(frozen=True)
class Call:
    """The inputs of one network call, on the teacher's device."""

    noisy_latents: Tensor
    timesteps: Tensor
    condition: Mapping[str, Tensor]
    target: Tensor

    def first(self, rows: int) -> Call:
        """Return the first rows."""
        condition = {name: values[:rows] for name, values in self.condition.items()}
        return Call(self.noisy_latents[:rows], self.timesteps[:rows], condition, self.target[:rows])


def network_calls(estimator: Estimator, encoded: Encoded) -> list[Call]:
    """Return the calls that the features use: every draw of every example, micro-batch by micro-batch."""
    teacher, num_draws = estimator.teacher, estimator.config.num_draws
    (device, dtype), draws, calls = placement(teacher), estimator.draws([0]), []
    for rows in torch.arange(len(encoded.latents) * num_draws).split(estimator.micro_batch):
        example, draw = rows // num_draws, rows % num_draws
        latents, noise = encoded.latents[example.to(device), 0], draws.noise[0, draw].to(device, dtype)
        timesteps = draws.timesteps[0, draw].to(device)
        condition = {name: values[example.to(values.device)] for name, values in encoded.condition.items()}
        schedule = teacher.noise_schedule
        noisy, target = schedule.add_noise(latents, noise, timesteps), schedule.target(latents, noise, timesteps)
        calls.append(Call(noisy, timesteps, condition, target))
    return calls


def run_backward(teacher: Teacher, calls: Sequence[Call]) -> None:
    """Run forward and backward of the summed losses of each call."""
    for call in calls:
        output = teacher.predict(call.noisy_latents, call.timesteps, call.condition)
        row_objective("loss", output, call.target).sum().backward()


def train(teacher: Teacher, calls: Sequence[Call]) -> None:
    """Take the gradients of all weights."""
    teacher.denoiser.requires_grad_(True)
    run_backward(teacher, calls)
    teacher.denoiser.requires_grad_(False)
    teacher.denoiser.zero_grad(set_to_none=True)


def first_layers(teacher: Teacher, call: Call) -> list[nn.Module]:
    """Return the attributed layers with no other upstream: the graph starts at their outputs."""
    found: list[nn.Module] = []

    def start(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()
            found.append(module)

    with hooks([layer.module for layer in select_layers(teacher.denoiser)], start):
        teacher.predict(call.noisy_latents, call.timesteps, call.condition)
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def hooks(modules: Sequence[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """Call `hook` after each forward of these modules."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def floor(teacher: Teacher, calls: Sequence[Call], first: Sequence[nn.Module]) -> None:
    """Take gradients of activations alone, from the outputs of the first layers on."""

    def start(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.requires_grad_()

    with hooks(first, start):
        run_backward(teacher, calls)


def vmap_gradients(teacher: Teacher, call: Call) -> dict[str, Tensor]:
    """Return the gradient of every attributed weight for each row, by `torch.func`."""
    denoiser, channels = teacher.denoiser, teacher.latent_shape[0]
    weights = {
        f"{layer.name}.{name}": parameter
        for layer in select_layers(denoiser)
        for name, parameter in layer.module.named_parameters()
    }

    def loss(weights: dict[str, Tensor], noisy: Tensor, timestep: Tensor, condition: Any, target: Tensor) -> Tensor:
        inputs = {"timestep": timestep[None], **{name: value[None] for name, value in condition.items()}}
        output = functional_call(denoiser, weights, (noisy[None],), inputs).sample[:, :channels]
        return row_objective("loss", output, target[None]).sum()

    on_cpu = call.noisy_latents.device.type == "cpu"  # no batching rule for the fused kernel there
    with sdpa_kernel(SDPBackend.MATH) if on_cpu else contextlib.nullcontext():
        gradients: dict[str, Tensor] = vmap(grad(loss), (None, 0, 0, 0, 0))(
            weights, call.noisy_latents, call.timesteps, dict(call.condition), call.target
        )
    return gradients


def flatten(layers: Sequence[Layer], gradients: Mapping[str, Tensor]) -> Tensor:
    """Return all weights of each row, layer by layer in the order of `DenseProjector.matrix`."""
    columns = []
    for layer in layers:
        weight = gradients[f"{layer.name}.weight"].flatten(2)
        bias = gradients.get(f"{layer.name}.bias")
        weight = weight if bias is None else torch.cat([weight, bias.unsqueeze(-1)], dim=2)
        columns.append(weight.flatten(1))
    return torch.cat(columns, dim=1)


def project_densely(projector: DenseProjector, gradients: Sequence[tuple[Layer, Tensor]]) -> Tensor:
    """Return our dense projection of the flat gradients of each layer."""
    return sum(projector.project(layer, gradient) for layer, gradient in gradients)


def basic_blocks(num_weights: int, max_entries: float) -> tuple[int, int, int]:
    """Return the columns of a block of BasicProjector's matrix, how many blocks there are, and how many to time."""
    columns = max(1, min(MATRIX_BLOCK, MATRIX_ENTRIES // num_weights))
    columns = 2 ** int(np.log2(columns))  # so that all blocks are full
    blocks = PEER_DIM // columns
    return columns, blocks, int(max(2, min(blocks, max_entries // (num_weights * columns))))


def project_basic(gradients: Tensor, columns: int, blocks: int) -> float:
    """Return the seconds of `trak.projectors.BasicProjector.project` with so many blocks of columns."""
    from trak.projectors import BasicProjector, ProjectionType

    projector = BasicProjector(
        gradients.shape[1],
        columns * blocks,
        0,
        ProjectionType.rademacher,
        gradients.device,
        block_size=columns,
        dtype=torch.float32,
    )
    return seconds(lambda: projector.project(gradients, model_id=0))


def cuda_projector(num_weights: int) -> Any:
    """Return TRAK's CudaProjector, or None where it does not build."""
    try:
        from trak.projectors import CudaProjector, ProjectionType

        return CudaProjector(num_weights, PEER_DIM, 0, ProjectionType.rademacher, torch.device("cuda"), 32)
    except (ImportError, ValueError, RuntimeError) as err:
        print(f"CudaProjector skipped: {' '.join(str(err).split())[:90]}")
        return None


class LoGra:
    """dattri's hooks and compressors on a teacher, in the way that its `LoGraAttributor.cache` uses them.

    Only while a method runs: the hooks replace the layers' forward methods.
    """

    def __init__(self, teacher: Teacher, call: Call, rank: int) -> None:
        from dattri.algorithm.block_projected_if.core.compressor import setup_model_compressors

        self._teacher, self._call = teacher, call
        self._modules = called_once(teacher, call)
        self._names = list(self._modules)
        device = str(call.noisy_latents.device)
        options = {"device": device, "proj_max_batch_size": 32}
        first = "sample" if isinstance(teacher.denoiser, UNet2DModel | UNet2DConditionModel) else "hidden_states"
        sample = {first: call.noisy_latents, "timestep": call.timesteps, **call.condition}
        with torch.compiler.set_stance("force_eager"):
            self._compressors = setup_model_compressors(
                teacher.denoiser,
                self._names,
                {**options, "proj_dim": rank, "proj_type": "normal"},
                {**options, "proj_dim": -1, "proj_type": "identity"},
                sample,
                device,
            )
        self.dims = sum(block.shape[1] for block in self.run([call.first(2)]))
        weights = {layer.name: layer.num_weights for layer in select_layers(teacher.denoiser)}
        self.share = sum(weights[name] for name in self._names) / sum(weights.values())

    def run(self, calls: Sequence[Call]) -> list[Tensor]:
        """Return the compressed gradients of the last call."""
        from dattri.algorithm.block_projected_if.core.hook import HookManager

        manager = HookManager(self._teacher.denoiser, self._names, self._call.noisy_latents.device.type)
        manager.set_compressors(self._compressors)
        for module in self._modules.values():
            module.weight.requires_grad_(True)  # its graph starts at weights, whose gradients it does not take
        try:
            with torch.compiler.set_stance("force_eager"):
                run_backward(self._teacher, calls)
            return list(manager.get_compressed_grads())
        finally:
            manager.remove_hooks()
            self._teacher.denoiser.requires_grad_(False)


def called_once(teacher: Teacher, call: Call) -> dict[str, nn.Module]:
    """Return the Linear layers that a forward pass calls exactly once, all that dattri's hooks can cope with."""
    counts: dict[nn.Module, int] = defaultdict(int)

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        counts[module] += 1

    linear = {name: m for name, m in teacher.denoiser.named_modules() if isinstance(m, nn.Linear)}
    with hooks(list(linear.values()), count), torch.no_grad():
        teacher.predict(call.noisy_latents, call.timesteps, call.condition)
    return {name: module for name, module in linear.items() if counts[module] == 1}


# Clocks


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    """Return the wall-clock seconds that `work` takes."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


@dataclass(frozen=True)
class Method:
    """Something that is timed.

    Attributes:
        name: for the table.
        work: what is done in a repetition; what it returns, if a number, are its seconds in place of the clock's.
        num_evaluations: network evaluations in it.
        one_call: the same for one micro-batch, for its peak memory.
        facts: JSON-ready, such as the dimensions of a feature.
    """

    name: str
    work: Callable[[], object]
    num_evaluations: int
    one_call: Callable[[], object] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def take_turns(methods: Sequence[Method], repetitions: int, *, warm_up: bool = True) -> dict[str, np.ndarray]:
    """Return the seconds per evaluation of each method in each repetition, after one that is not counted.

    Each repetition begins with the next method, so that none always follows the same one.
    """
    times: dict[str, list[float]] = {method.name: [] for method in methods}
    for repetition in range(-warm_up, repetitions):
        turn = repetition % len(methods)
        for method in (*methods[turn:], *methods[:turn]):
            results: list[object] = []
            clock = seconds(lambda work=method.work, results=results: results.append(work()))
            own = results[0] if isinstance(results[0], float) else clock
            if repetition >= 0:
                times[method.name].append(own / method.num_evaluations)
    return {name: np.array(values) for name, values in times.items()}


# Cells of the first two parts


@dataclass(frozen=True)
class Setting:
    """What the methods of one group share."""

    teacher: Teacher
    num_draws: int
    num_evaluations: int
    micro_batch: int | None = None

    def estimator(self, **settings: Any) -> Estimator:
        """Return an estimator at this number of draws."""
        flat = {"num_draws": self.num_draws, "num_bands": min(4, self.num_draws), **settings}
        config = FeaturizeConfig.from_flat(flat)
        rows = self.micro_batch or choose_micro_batch(self.teacher, config)
        return build_estimator(self.teacher, config, rows, profile=None)

    @functools.cached_property
    def num_rows(self) -> int:
        """Rows of a network call."""
        return self.estimator().micro_batch

    @functools.cached_property
    def encoded(self) -> Encoded:
        """As many examples as have the wanted evaluations, in whole calls."""
        calls = -(-self.num_evaluations // self.num_rows)
        return random_examples(self.teacher, -(-calls * self.num_rows // self.num_draws))

    @functools.cached_property
    def calls(self) -> list[Call]:
        """The network calls for these examples."""
        return network_calls(self.estimator(), self.encoded)

    @property
    def total(self) -> int:
        """Network evaluations of a method."""
        return sum(len(call.timesteps) for call in self.calls)

    def subset(self, num_rows: int) -> Encoded:
        """Return as many examples as fill a call of so many rows."""
        count = -(-num_rows // self.num_draws)
        condition = {name: values[:count] for name, values in self.encoded.condition.items()}
        return Encoded(self.encoded.latents[:count], condition)


def plain_methods(setting: Setting) -> list[Method]:
    """Return the training step and the floor."""
    teacher, calls = setting.teacher, setting.calls
    first, call = first_layers(teacher, calls[0]), calls[:1]
    return [
        Method(BASELINE, lambda: train(teacher, calls), setting.total, lambda: train(teacher, call)),
        Method("floor", lambda: floor(teacher, calls, first), setting.total, lambda: floor(teacher, call, first)),
    ]


def our_method(name: str, setting: Setting, *, one_call_only: bool = False, **settings: Any) -> Method:
    """Return the whole of our features, from encoded examples to numbers on the CPU."""
    estimator, one = setting.estimator(**settings), setting.subset(setting.num_rows)
    draws = estimator.draws([0])
    total = setting.num_rows if one_call_only else setting.total
    encoded = one if one_call_only else setting.encoded
    dims = {"dims": estimator.projector.proj_dim}
    features = estimator.features
    return Method(name, lambda: features(encoded, draws), total, lambda: features(one, draws), dims)


def peer_rows(setting: Setting) -> int:
    """Return the rows of a network call whose gradients fit into memory, at most a micro-batch."""
    layers = select_layers(setting.teacher.denoiser)
    size = placement(setting.teacher)[1].itemsize * sum(layer.num_weights for layer in layers)
    return min(len(setting.calls[0].timesteps), max(1, GRADIENT_BYTES // size))


def vmap_method(setting: Setting) -> Method:
    """Return per-example gradients by vmap, of one call."""
    rows = peer_rows(setting)
    call, dims = (
        setting.calls[0].first(rows),
        sum(layer.num_weights for layer in select_layers(setting.teacher.denoiser)),
    )

    def run() -> None:
        vmap_gradients(setting.teacher, call)

    return Method("vmap", run, rows, run, {"dims": dims})


def logra_methods(setting: Setting) -> list[Method]:
    """Return LoGra at two ranks; none where dattri is not installed, or cannot project here."""
    try:
        peers = [LoGra(setting.teacher, setting.calls[0], rank) for rank in LOGRA_RANKS]
    except (ImportError, ValueError, RuntimeError) as err:
        print(f"LoGra skipped: {' '.join(str(err).split())[:90]}; it needs pip install -e '.[bench]'")
        return []
    return [
        Method(
            f"LoGra, rank {rank}",
            lambda peer=peer: peer.run(setting.calls) and None,
            setting.total,
            lambda peer=peer: peer.run(setting.calls[:1]) and None,
            {"dims": peer.dims, "share": peer.share},
        )
        for rank, peer in zip(LOGRA_RANKS, peers, strict=True)
    ]


def ratio_methods(setting: Setting, *, peers: bool) -> list[Method]:
    """Return the methods of the first table."""
    methods = [*plain_methods(setting), our_method("ours Kronecker", setting)]
    return [*methods, vmap_method(setting), *logra_methods(setting)] if peers else methods


def projection_methods(setting: Setting, max_entries: float, max_dense_entries: float) -> list[Method]:
    """Return the methods of the second table: of one network call each, and what is done to its gradients."""
    teacher, rows = setting.teacher, peer_rows(setting)
    layers = select_layers(teacher.denoiser)
    gradients = flatten(layers, vmap_gradients(teacher, setting.calls[0].first(rows)))
    columns, blocks, timed = basic_blocks(gradients.shape[1], max_entries)
    methods = [
        plain_methods(setting)[0],
        our_method("ours Kronecker", setting),
        vmap_method(setting),
        Method(
            "BasicProjector alone",
            lambda: project_basic(gradients, columns, timed) * blocks / timed,
            rows,
            lambda: project_basic(gradients, columns, 1),
            {"dims": PEER_DIM, "share": timed / blocks},
        ),
    ]
    if gradients.shape[1] * PEER_DIM <= max_dense_entries:
        methods += dense_methods(setting, layers, gradients)
    else:
        print(f"ours dense skipped: its matrix has {gradients.shape[1] * PEER_DIM:.1e} entries; see --dense-entries")
    if gradients.is_cuda and (projector := cuda_projector(gradients.shape[1])):
        facts = {"dims": PEER_DIM}
        methods.append(
            Method("CudaProjector alone", lambda: projector.project(gradients, 0) is None, rows, None, facts)
        )
    return methods


def dense_methods(setting: Setting, layers: Sequence[Layer], gradients: Tensor) -> list[Method]:
    """Return our dense projection, whole, and alone on gradients that lie as `weight_gradient` leaves them."""
    pieces = gradients.split([layer.num_weights for layer in layers], dim=1)
    pairs = [(layer, piece.contiguous()) for layer, piece in zip(layers, pieces, strict=True)]
    projector = DenseProjector("rademacher", PEER_DIM, 0)
    return [
        our_method("ours dense", setting, one_call_only=True, projection="rademacher", proj_dim=PEER_DIM),
        Method(
            "ours dense alone",
            lambda: project_densely(projector, pairs) is None,
            len(gradients),
            facts={"dims": PEER_DIM},
        ),
    ]


def measure(methods: Sequence[Method], repetitions: int, device: str, *, warm_up: bool = True) -> dict[str, Any]:
    """Return one JSON-ready row for each method, ratios being to the training step of the same repetition."""
    times = take_turns(methods, repetitions, warm_up=warm_up)
    facts = {method.name: method.facts for method in methods}
    for alone in [name for name in times if name.endswith("Projector alone")]:
        both = f"vmap + {alone.removesuffix(' alone')}"
        times[both], facts[both] = times["vmap"] + times[alone], facts[alone]
    rows = {}
    for name, taken in times.items():
        rows[name] = {
            "repetitions": len(taken),
            "ms_per_evaluation": quartiles(1e3 * taken),
            "evaluations_per_second": quartiles(1 / taken),
            "ratio": quartiles(taken / times[BASELINE]),
            **facts[name],
        }
    for method in methods:
        work = method.one_call
        peak = None if work is None else peak_bytes(work, torch.device(device))
        rows[method.name] |= {"num_evaluations": method.num_evaluations, "peak_bytes": peak}
    return rows | ({"speedups": speedups(times)} if "vmap + BasicProjector" in times else {})


def speedups(times: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Return how many times faster ours are than TRAK, quartiles over repetitions."""
    ours = [name for name in times if name.startswith("ours") and not name.endswith("alone")]
    pairs = [(peer, name) for peer in times if peer.startswith("vmap +") for name in ours]
    pairs += [(peer, "ours dense alone") for peer in times if peer.endswith("Projector alone")]
    return {f"{name} against {peer}": quartiles(times[peer] / times[name]) for peer, name in pairs if name in times}


# Parts three and four: the whole of `featurize`


def run_featurize(teacher: Teacher, examples: Any, num_draws: int) -> float:
    """Return the seconds of `featurize` into an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"num_draws": num_draws, "num_bands": min(4, num_draws)}
        return seconds(lambda: featurize(teacher, examples, folder, **settings))


def measure_growth(sizes: Sequence[int], draws: Sequence[int]) -> dict[str, Any]:
    """Return the seconds of `featurize` over examples and draws, measured in a random order, and the fit."""
    teacher, digits = load_teacher("demo"), open_digits()
    run_featurize(teacher, digits.select(range(sizes[0])), draws[0])  # not counted: imports, threads
    points = [(size, count) for size in sizes for count in draws]
    order = np.random.default_rng(0).permutation(len(points))
    rows = []
    for size, count in (points[i] for i in order):
        taken = run_featurize(teacher, digits.select(range(size)), count)
        rows.append({"examples": size, "draws": count, "seconds": taken})
    rows.sort(key=lambda row: (row["examples"], row["draws"]))
    return {"rows": rows, "fit": fit_growth(rows)}


def fit_growth(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return a, b and c of `seconds = a + N (b + c K)` with standard errors, from least squares of relative errors."""
    size, draws, taken = (np.array([row[name] for row in rows]) for name in ("examples", "draws", "seconds"))
    design = np.stack([np.ones(len(rows)), size, size * draws], axis=1) / taken[:, None]
    solution, _, _, _ = np.linalg.lstsq(design, np.ones(len(rows)), rcond=None)
    residuals = 1 - design @ solution
    variance = residuals @ residuals / (len(rows) - 3)
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    names = ("constant_s", "example_s", "evaluation_s")
    fit = {name: [float(value), float(error)] for name, value, error in zip(names, solution, errors, strict=True)}
    return fit | {"relative_residual": float(np.sqrt(variance))}


PROJECTED = "network and projection"
NETWORK = "network's forward and backward"
STAGES = {
    "opening": ["carv_attrib.data:open_dataset", "carv_attrib.manifest:open_or_create"],
    "pilot": ["carv_attrib.manifest:run_pilot"],
    "reading": ["carv_attrib.batches:read_batch"],
    "encoding": ["carv_attrib.batches:encode_batch"],
    "draws": ["carv_attrib.estimator:Estimator.draws"],
    PROJECTED: ["carv_attrib.gradient:project_gradient"],
    "host copy, averaging": [
        "carv_attrib.estimator:Estimator.features",
        "carv_attrib.estimator:check_finite",
        "carv_attrib.estimator:average_bands",
        "carv_attrib.estimator:root_weighted",
        "carv_attrib.parts:concatenate",
    ],
    "writing": ["carv_attrib.store:FeatureStore.write_part"],
    "waiting for threads": ["concurrent.futures._base:Future.result"],
    "kernel and index": ["carv_attrib.pipeline:ensure_index"],
}
"""The functions whose time is that of a stage, as `module:name`."""
WHOLE = ("pilot", "kernel and index")
"""Stages that own all that is done inside them, but the network's work."""


class StageClock:
    """Seconds of each stage, not counting those of other stages inside it.

    Attributes:
        seconds: in the thread that made the clock.
        beside: in other threads, while that one went on.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.beside: dict[str, float] = defaultdict(float)
        self._thread = threading.get_ident()
        self._local = threading.local()

    def wrap(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with a clock around it."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            stack = self._local.__dict__.setdefault("stack", [])
            inside_whole = bool(stack) and stack[-1][0] in WHOLE
            if inside_whole and stage != PROJECTED:
                return function(*args, **kwargs)
            name = f"{stack[-1][0]}: {stage}" if inside_whole else stage
            stack.append([name, 0.0])
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - started
                _, inside = stack.pop()
                clock = self.seconds if threading.get_ident() == self._thread else self.beside
                clock[name] += elapsed - inside
                if stack:
                    stack[-1][1] += elapsed

        return timed


@contextlib.contextmanager
def clocks(clock: StageClock) -> Iterator[None]:
    """Put clocks around the functions of `STAGES`, wherever the package has imported them."""
    changed = []
    for stage, paths in STAGES.items():
        for path in paths:
            name, function, owners = find_function(path)
            wrapped = clock.wrap(stage, function)
            changed += [(owner, name, function) for owner in owners]
            for owner in owners:
                setattr(owner, name, wrapped)
    try:
        yield
    finally:
        for owner, name, function in changed:
            setattr(owner, name, function)


def find_function(path: str) -> tuple[str, Callable[..., Any], list[Any]]:
    """Return the name of a function, the function, and its class or the modules of the package that have it."""
    module, qualified = path.split(":")
    owner = functools.reduce(getattr, qualified.split(".")[:-1], sys.modules[module])
    name = qualified.rsplit(".", 1)[-1]
    function = getattr(owner, name)
    if isinstance(owner, type):
        return name, function, [owner]
    package = [module for key, module in sys.modules.items() if key.startswith("carv_attrib")]
    return name, function, [module for module in package if vars(module).get(name) is function]


def measure_stages(num_examples: int | None, num_draws: int, repetitions: int) -> dict[str, Any]:
    """Return seconds and shares of each stage of `featurize`, medians over repetitions, and its ratio to training."""
    teacher, digits = load_teacher("demo"), open_digits()
    digits = digits if num_examples is None else digits.select(range(num_examples))
    run_featurize(teacher, digits.select(range(128)), num_draws)  # not counted: imports, threads
    setting = Setting(teacher, num_draws, EVALUATIONS["demo"])
    methods = [*plain_methods(setting), our_method("ours", setting)]
    runs, ratios = [], []
    for repetition in range(repetitions):
        steps = take_turns(methods, 3, warm_up=repetition == 0)
        clock = StageClock()
        with clocks(clock):
            total = run_featurize(teacher, digits, num_draws)
        floor_share = float(np.median(steps["floor"] / steps["ours"]))
        runs.append(split_stages(clock, total, floor_share))
        ratios.append(total / (len(digits) * num_draws * np.median(steps[BASELINE])))
    names = list(runs[0])
    medians = {name: float(np.median([run.get(name, 0.0) for run in runs])) for name in names}
    network = [sum(taken for name, taken in run.items() if name.endswith(NETWORK)) for run in runs]
    outside = [1 - inside / run["all"] for inside, run in zip(network, runs, strict=True)]
    return {
        "examples": len(digits),
        "draws": num_draws,
        "repetitions": repetitions,
        "seconds": medians,
        "share_outside_network": quartiles(np.array(outside)),
        "ratio_to_training_steps": quartiles(np.array(ratios)),
    }


def split_stages(clock: StageClock, total: float, floor_share: float) -> dict[str, float]:
    """Return the seconds of each stage, with each projected backward cut in two, and what no clock saw."""
    split = {}
    for prefix in ("", *(f"{stage}: " for stage in WHOLE)):
        both = clock.seconds.get(prefix + PROJECTED, 0.0)
        if both or not prefix:
            split |= {f"{prefix}{NETWORK}": both * floor_share, f"{prefix}hooks, projection": both * (1 - floor_share)}
    own = {stage: clock.seconds[stage] for stage in STAGES if stage != PROJECTED}
    beside = {f"{stage} (beside, in a thread)": taken for stage, taken in clock.beside.items()}
    return {**split, **own, "other": total - sum(clock.seconds.values()), "all": total, **beside}


# The run


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    parts: Sequence[str]
    teachers: Sequence[str]
    threads: Sequence[int]
    draws: Sequence[int]
    repetitions: int
    slow_repetitions: int
    basic_entries: float
    dense_entries: float
    evaluations: int | None
    micro_batch: int | None
    examples: int | None
    only: str

    def setting(self, name: str, teacher: Teacher, num_draws: int) -> Setting:
        """Return what the methods of a group share."""
        return Setting(teacher, num_draws, self.evaluations or EVALUATIONS[name], self.micro_batch)


def planned_groups(options: Options) -> list[tuple[str, str, int, int]]:
    """Return (part, teacher, threads, draws) of the first two parts; the GPU needs no more than one thread."""
    groups = []
    for name in options.teachers:
        threads = [1] if name in CUDA_ONLY else options.threads
        ratios = [("ratios", name, count, draws) for count in threads for draws in options.draws]
        groups += [*ratios, ("projection", name, 1, PEER_DRAWS)]
    return [group for group in groups if group[0] in options.parts]


def run_group(options: Options, results: Results, group: tuple[str, str, int, int], teacher: Teacher) -> None:
    """Measure the methods of a group that are wanted and missing, with the training step, and keep them."""
    part, name, threads, num_draws = group
    prefix = f"{part}/{name}/{threads} threads/{num_draws} draws"
    torch.set_num_threads(threads)
    setting = options.setting(name, teacher, num_draws)
    if part == "projection":
        setting = replace(setting, micro_batch=min(PROJECTION_ROWS, setting.num_rows))
        methods, repetitions = (
            projection_methods(setting, options.basic_entries, options.dense_entries),
            options.slow_repetitions,
        )
    else:
        peers = (threads, num_draws) == (1, PEER_DRAWS)
        methods, repetitions = ratio_methods(setting, peers=peers), options.repetitions
        methods = [m for m in methods if m.name == BASELINE or wanted(options, results, f"{prefix}/{m.name}")]
    device = placement(teacher)[0].type
    print(f"{time.strftime('%H:%M:%S')} {prefix}: {', '.join(method.name for method in methods)}", flush=True)
    rows = measure(methods, repetitions, device, warm_up=part != "projection")
    for method, row in rows.items():
        results.add(f"{prefix}/{method}", row)


def wanted(options: Options, results: Results, key: str) -> bool:
    """Return whether a cell was asked for and is not there yet."""
    return options.only in key and key not in results


def is_due(options: Options, results: Results, group: tuple[str, str, int, int]) -> bool:
    """Return whether any cell of a group is wanted and missing; the second table's are measured all at once."""
    part, name, threads, num_draws = group
    prefix = f"{part}/{name}/{threads} threads/{num_draws} draws"
    if part == "projection":
        return options.only in f"{prefix}/vmap + BasicProjector" and f"{prefix}/speedups" not in results
    names = [BASELINE, "floor", "ours Kronecker"]
    if (threads, num_draws) == (1, PEER_DRAWS):
        names += ["vmap", *(f"LoGra, rank {rank}" for rank in LOGRA_RANKS if has_dattri())]
    return any(wanted(options, results, f"{prefix}/{method}") for method in names)


def has_dattri() -> bool:
    """Return whether the peer LoGra is installed."""
    import importlib.util

    return importlib.util.find_spec("dattri") is not None


def run(options: Options, results: Results) -> None:
    """Measure everything that was asked for and is missing."""
    groups = [group for group in planned_groups(options) if is_due(options, results, group)]
    for name in options.teachers:
        own = [group for group in groups if group[1] == name]
        teacher = open_teacher(name) if own else None
        for group in own:
            try:
                run_group(options, results, group, teacher)
            except torch.OutOfMemoryError as err:
                print(f"skipped: {' '.join(str(err).split())[:100]}")
        del teacher
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    torch.set_num_threads(max(options.threads))
    sizes = (200, 400, 800, 1600) if options.examples is None else (options.examples, 2 * options.examples)
    if "growth" in options.parts and wanted(options, results, "growth/demo"):
        print(f"{time.strftime('%H:%M:%S')} growth", flush=True)
        results.add("growth/demo", {"threads": max(options.threads), **measure_growth(sizes, (2, 4, 8, 16))})
    if "stages" in options.parts and wanted(options, results, "stages/demo"):
        print(f"{time.strftime('%H:%M:%S')} stages", flush=True)
        stages = measure_stages(options.examples, 8, options.slow_repetitions + 1)
        results.add("stages/demo", {"threads": max(options.threads), **stages})


# Tables


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median and the quartiles."""
    low, middle, high = (f"{value:,.{digits}f}" for value in values)
    return f"{middle} [{low}, {high}]"


def cell_row(key: str, cell: Mapping[str, Any]) -> list[str]:
    """Return a cell of the first two parts as texts."""
    name, threads, draws, method = key.split("/", 3)
    peak = cell.get("peak_bytes")
    share = cell.get("share")
    rate = cell["evaluations_per_second"]
    return [
        name,
        threads.split()[0],
        draws.split()[0],
        method if share is None else f"{method} ({share:.0%})",
        spread(rate, 1 if rate[0] > 10 else 3),
        spread(cell["ratio"]),
        f"{cell['dims']:,}" if "dims" in cell else "",
        "" if peak is None else f"{peak / 2**20:,.0f}",
    ]


def print_tables(results: Results) -> None:
    """Print what there is."""
    console = Console(width=150)
    for part in ("ratios", "projection"):
        columns = ("teacher", "threads", "draws", "method", "evaluations/s", "ratio", "dims", "peak MiB")
        cells = results.of_part(part)
        table = Table(*columns, title=f"{part}: median \\[quartiles]; ratio to the training step")
        for key, cell in cells.items():
            if not key.endswith("/speedups"):
                table.add_row(*cell_row(key, cell))
        if cells:
            console.print(table)
        for key, cell in cells.items():
            for pair, values in cell.items() if key.endswith("/speedups") else ():
                console.print(f"{key.split('/')[0]}: {pair}: {spread(values, 1)} times faster", highlight=False)
    for cell in results.of_part("growth").values():
        print_growth(console, cell)
    for cell in results.of_part("stages").values():
        print_stages(console, cell)


def print_growth(console: Console, cell: Mapping[str, Any]) -> None:
    """Print seconds over examples and draws, and the fit."""
    draws = sorted({row["draws"] for row in cell["rows"]})
    table = Table("examples", *(f"{k} draws" for k in draws), title="featurize, seconds")
    for size in sorted({row["examples"] for row in cell["rows"]}):
        own = {row["draws"]: row["seconds"] for row in cell["rows"] if row["examples"] == size}
        table.add_row(str(size), *(f"{own[k]:.2f}" for k in draws))
    console.print(table)
    fit = cell["fit"]
    (a, a_se), (b, b_se), (c, c_se) = fit["constant_s"], fit["example_s"], fit["evaluation_s"]
    console.print(
        f"seconds = {a:.2f} ± {a_se:.2f} + N ({1e3 * b:.2f} ± {1e3 * b_se:.2f} ms "
        f"+ {1e3 * c:.3f} ± {1e3 * c_se:.3f} ms K); "
        f"relative residual {fit['relative_residual']:.1%}",
        highlight=False,
    )


def print_stages(console: Console, cell: Mapping[str, Any]) -> None:
    """Print seconds and shares by stage."""
    title = f"featurize, {cell['examples']} digits at {cell['draws']} draws, {cell['threads']} threads"
    table = Table("stage", "seconds", "share", title=title)
    for stage, taken in cell["seconds"].items():
        table.add_row(stage, f"{taken:.2f}", f"{taken / cell['seconds']['all']:.1%}")
    console.print(table)
    console.print(f"share outside the network's forward and backward: {spread(cell['share_outside_network'], 3)}")
    console.print(f"over as many training steps: {spread(cell['ratio_to_training_steps'])}")


PARTS = ("ratios", "projection", "growth", "stages")


@click.command()
@click.option("--part", type=click.Choice([*PARTS, "all"]), default="all", show_default=True)
@click.option("--teacher", "teachers", multiple=True, type=click.Choice(list(EVALUATIONS)), help="Default: all.")
@click.option("--num-threads", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--num-draws", multiple=True, type=int, default=(1, 4, 16), show_default=True)
@click.option("--repetitions", default=5, show_default=True, help="Of the first table.")
@click.option("--slow-repetitions", default=2, show_default=True, help="With TRAK's projectors; stages have one more.")
@click.option("--basic-entries", default=1e9, show_default=True, help="Entries of BasicProjector's matrix to time.")
@click.option("--dense-entries", default=1e10, show_default=True, help="Of our dense matrix; skipped if it has more.")
@click.option("--evaluations", type=int, help="Of each method in a repetition, in place of the defaults.")
@click.option("--micro-batch", type=int, help="Rows of a network call, in place of the defaults.")
@click.option("--examples", type=int, help="Digits, in place of the sizes of the last two parts; for a trial.")
@click.option("--only", default="", help="Measure only cells whose keys hold this text.")
@click.option("--fresh", is_flag=True, help="Forget what an earlier run measured.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs/benchmarks/featurize.json"))
def main(part: str, teachers: tuple[str, ...], output: Path, fresh: bool, **settings: Any) -> None:
    """Measure what is missing, and print the tables."""
    on_gpu = CUDA_ONLY if torch.cuda.is_available() else ()
    available = [name for name in EVALUATIONS if name not in CUDA_ONLY or name in on_gpu]
    options = Options(
        parts=PARTS if part == "all" else (part,),
        teachers=[name for name in available if not teachers or name in teachers],
        threads=settings["num_threads"],
        draws=settings["num_draws"],
        **{name: value for name, value in settings.items() if name not in ("num_threads", "num_draws")},
    )
    results = Results(output, COMMAND, fresh=fresh)
    run(options, results)
    print_tables(results)


if __name__ == "__main__":
    main()
