"""Every Triton kernel, compiled ahead of time for three generations of devices: no device is needed for that.

No kernel may put registers into memory, the encoder must use the matrix units, and what a program takes of a processor
must leave room for as many as trainer/kernels/triton/launching.py says.
"""

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trainer.kernels.triton import concepts as concept_kernels
from trainer.kernels.triton import correlations, heads, launching, search, terms, visit

# Compute capability -> what multiplies matrices in its PTX, and bytes of shared memory of a processor.
DEVICES = {80: ("mma.sync", 164 << 10), 90: ("wgmma.mma_async", 228 << 10), 100: ("tcgen05.mma", 228 << 10)}
RESERVED = 1 << 10  # bytes of shared memory that a program costs beside its own
REGISTERS_OF_A_PROCESSOR = 1 << 16
WIDTH, CONCEPTS = 768, 6

# Parameter -> type, where it is not a pointer to fp32 or the address of one (64 bits).
INTEGERS = {"B", "places", "D", "row_words", "slot_words", "banks", "n", "R", "A", "K", "capacity", "each"}
INTEGERS |= {"row_stride", "stride"}
POINTERS = {
    **dict.fromkeys(("by_slot", "by_row", "counts", "row", "place", "active"), "*i32"),
    **dict.fromkeys(("table", "start", "row_start", "label", "answer"), "*i64"),
}


class Compiled(NamedTuple):
    """ptx; registers of a thread; bytes of a thread's local memory; bytes of a program's shared memory."""

    ptx: str
    registers: int
    local: int
    shared: int


def compiled(kernel: Any, constants: dict[str, Any], capability: int, folder: Path, **options: int) -> Compiled:
    """A kernel for a capability, as training would launch it on the sizes above."""
    types = {}
    for name in kernel.arg_names:
        kind = "i32" if name in INTEGERS else POINTERS.get(name, "*fp32")
        types[name] = "constexpr" if name in constants else kind
    if kernel is search.encode:
        types |= {"x": "*bf16", "W": "*bf16"}
    if kernel is terms.gradients:
        types |= {"x": "*bf16", "g_recon": "*bf16"}
    if kernel is search.prepare:
        types["W"] = "*bf16"
    types |= {name: "fp32" for name in ("window", "half") if name in types}
    types |= {name: "*i1" for name in ("made", "fired") if name in types}
    if "operand" in types:
        types |= {"operand": "*bf16", "product" if "product" in types else "above": "*bf16"}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in ("R", "A", "banks", "stride")
    }
    aligned = {place: aligned[place] for place in aligned if types[kernel.arg_names[place[0]]] != "constexpr"}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    (folder / "cubin").write_bytes(found.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", folder / "cubin"], capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert len(numbers) == 3, usage
    return Compiled(found.asm["ptx"], numbers["REG"], numbers["STACK"] + numbers["LOCAL"], found.metadata.shared)


def launches(width: int, concepts: int) -> dict[str, tuple[Any, dict[str, Any], int]]:
    """Name -> kernel, constants and warps, of all kernels but the encoder, as visit.py launches them."""
    D, R = launching.block(width), launching.block(concepts)
    wide, few, both = launching.warps(D), launching.warps(R), launching.warps(D + R)
    columns = heads.columns(concepts)
    slope = {"BD": D, "BR": R, "BE": visit.TOGETHER}
    return {
        "prepare": (search.prepare, {"BD": D, "ERROR": visit.ERROR}, wide),
        "count": (search.count, {"BW": 256}, 1),
        "spread_out": (search.spread_out, {"BW": 256}, 1),
        "again": (search.again, {"BD": D, "BE": visit.TOGETHER}, wide),
        "link": (search.link, {"BE": visit.LINKED}, 4),
        "decode": (terms.decode, {"UNIT": False, "JUMP": True, "BD": D}, wide),
        "column_sums": (correlations.column_sums, {"BR": R, "BE": launching.side_by_side(R)}, few),
        "weighted_sums": (correlations.weighted_sums, {"BR": R, "BE": launching.side_by_side(R)}, few),
        "correlate": (correlations.correlate, {"BR": R}, few),
        "concept_gradient": (correlations.concept_gradient, {"BR": R, "BE": launching.side_by_side(R)}, few),
        "pretrain": (terms.gradients, slope | {"UNIT": False, "PERP": False, "JUMP": False, "PULL": False}, both),
        "align": (terms.gradients, slope | {"UNIT": True, "PERP": True, "JUMP": False, "PULL": False}, both),
        "jumps": (
            terms.gradients,
            slope | {"BE": visit.FEWER, "UNIT": False, "PERP": True, "JUMP": True, "PULL": True},
            both,
        ),
        "pull_distance": (terms.pull_distance, {"UNIT": False, "BD": D}, wide),
        "encode_row": (concept_kernels.encode_row, {"BR": R, "SAME": False}, few),
        "encode_row_backward": (concept_kernels.encode_row_backward, {"BR": R, "CODE": True, "SAME": False}, few),
        "slot_backward": (concept_kernels.slot_backward, {"BB": heads.MANY, "BD": D}, wide),
        "answer_row": (concept_kernels.answer_row, {"BA": R}, few),
        "code_totals": (concept_kernels.code_totals, columns, 4),
        "code_squares": (concept_kernels.code_squares, columns, 4),
        "standardise": (concept_kernels.standardise, columns | {"SHARE": 1e-6}, 4),
        "counts_from": (concept_kernels.counts_from, {"LOW": 3.0, "HIGH": 6.0, "BK": heads.MANY}, 4),
        "follow": (concept_kernels.follow, {"RATE": 0.01, "BK": heads.MANY, "BR": R}, 4),
    }


def check_encoder(capability: int, folder: Path, tile: launching.Tile) -> None:
    product, shared = DEVICES[capability]
    made = compiled(search.encode, tile.constants, capability, folder, num_warps=tile.warps, num_stages=tile.stages)
    assert made.local == 0 and product in made.ptx
    programs = launching.WARPS_PER_PROCESSOR // tile.warps
    assert programs * (made.shared + RESERVED) <= shared
    assert programs * made.registers * 32 * tile.warps <= REGISTERS_OF_A_PROCESSOR


def check(capability: int, folder: Path, kernel: Any, constants: dict[str, Any], warps: int) -> None:
    made = compiled(kernel, constants, capability, folder, num_warps=warps)
    assert made.local == 0
    assert made.registers <= launching.REGISTERS
    assert made.shared <= 16 << 10


def test_one_of_each_kind(tmp_path):
    check_encoder(90, tmp_path, launching.TILES[0])
    check(90, tmp_path, *launches(WIDTH, CONCEPTS)["pretrain"])


@pytest.mark.slow
@pytest.mark.parametrize("capability", DEVICES)
def test_every_kernel(tmp_path, capability):
    for tile in launching.tiles(capability):
        check_encoder(capability, tmp_path, tile)
    for launch in launches(WIDTH, CONCEPTS).values():
        check(capability, tmp_path, *launch)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "concepts"), [(4096, 6), (768, 1000)])
def test_wide_models_and_many_concepts(tmp_path, width, concepts):
    for launch in launches(width, concepts).values():
        check(90, tmp_path, *launch)


@pytest.mark.slow
def test_memory_that_registers_spill_to_is_found(tmp_path):
    """The wide tile does not fit the registers on sm_100."""
    tile = launching.WIDE
    made = compiled(search.encode, tile.constants, 100, tmp_path, num_warps=tile.warps, num_stages=tile.stages)
    assert made.local > 0


def test_all_kernels_are_here():
    kernels = {
        value
        for room in (search, terms, correlations, concept_kernels)
        for value in vars(room).values()
        if isinstance(value, triton.JITFunction)
    }
    helpers = {search.address, search.optional, search.located, search.encoder_of, search.dead, search._ones}
    helpers |= {search._list_of, concept_kernels.cross_entropy}
    assert kernels - helpers == {kernel for kernel, *_ in launches(WIDTH, CONCEPTS).values()} | {search.encode}
