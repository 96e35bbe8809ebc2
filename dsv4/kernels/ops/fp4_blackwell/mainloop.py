"""The pipeline of an FP4 x FP4 product: who copies, who multiplies, and when.

A CTA computes tiles of 128 rows x `tile_n` columns. One warp copies steps of up to 256 columns into
a ring of shared memory: codes by tensor maps (swizzled), scale tiles as the plain runs of bytes
they are. Another warp moves a step's scales to tensor memory and multiplies there, 64 columns an
instruction (`tcgen05.mma.kind::mxf4nvf4.block_scale`, a scale per 16). Four warps take the sums
out of tensor memory while the next tile is multiplied, where there is room for two.

Barriers: `full` and `empty` of every stage, `acc_full` and `acc_empty` of every accumulator.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float4E2M1FN, Float8E4M3FN, Int32, Int64, range_constexpr
from cutlass.cute.nvgpu import cpasync, make_tiled_tma_atom_A, make_tiled_tma_atom_B, tcgen05
from cutlass.utils import blackwell_helpers, blockscaled_layout

from dsv4.kernels.ops.fp4_blackwell import ptx
from dsv4.kernels.ops.fp4_blackwell.tiles import (
    TILE_BYTES,
    TILE_COLUMNS,
    TILE_ROWS,
    row_tiles,
    scale_offset,
    slab_step,
    step_columns,
)

BLOCK = 16
EPILOGUE_WARPS = 4
MMA_WARP, COPY_WARP = 4, 5
THREADS = 32 * 6
TENSOR_MEMORY_COLUMNS = 512
SHARED_BYTES = 227 * 1024
RESERVED_BYTES = 2048  # barriers, the group search, alignment
MOST_STAGES = 8


class Shared(NamedTuple):
    """Shared memory: stages of both operands and their scales (pointers), and barriers."""

    a: Any
    b: Any
    a_scales: Any
    b_scales: Any
    full: Any
    empty: Any
    acc_full: Any
    acc_empty: Any


class Place(NamedTuple):
    """A tile: rows from `first_row` below `end_row`, row tile of the scales, weight, columns."""

    layer: Any
    first_row: Any
    end_row: Any
    scale_tile: Any
    column_tile: Any


class Maps(NamedTuple):
    """Tensor maps of both operands' codes, and their coordinates."""

    a_atom: Any
    a: Any
    b_atom: Any
    b: Any


class Mainloop:
    """One weight shape: `layers` matrices `[N, K]` in `slabs` K-slabs each."""

    def __init__(self, n: int, k: int, slabs: int, layers: int, tile_n: int, staging: int) -> None:
        self.n, self.k, self.slabs, self.layers, self.tile_n = n, k, slabs, layers, tile_n
        self.slab_k = k // slabs
        self.step = step_columns(self.slab_k)
        self.slab_steps = self.slab_k // self.step
        self.steps = slabs * self.slab_steps
        self.tiles_n = -(-n // tile_n)
        self.step_tiles = self.step // TILE_COLUMNS
        self.scale_bytes = self.step_tiles * TILE_BYTES  # of 128 rows
        self.a_bytes, self.b_bytes = TILE_ROWS * self.step // 2, tile_n * self.step // 2
        self.b_row_tiles = tile_n // TILE_ROWS
        self.stage_bytes = self.a_bytes + self.b_bytes + (1 + self.b_row_tiles) * self.scale_bytes
        room = SHARED_BYTES - RESERVED_BYTES - staging
        self.stages = min(room // self.stage_bytes, MOST_STAGES)
        scale_columns = (TILE_ROWS + tile_n) // 32 * self.step_tiles
        self.accumulators = 2 if 2 * tile_n + scale_columns <= TENSOR_MEMORY_COLUMNS else 1

    def mma(self) -> Any:
        """The instruction: 128 x tile_n x 64, both operands in shared memory."""
        shape = (TILE_ROWS, self.tile_n, 64)
        return cute.make_tiled_mma(
            tcgen05.MmaMXF4NVF4Op(
                Float8E4M3FN, shape, tcgen05.CtaGroup.ONE, tcgen05.OperandSource.SMEM
            )
        )

    @property
    def tile(self) -> tuple[int, int, int]:
        """Rows, columns and K of a step."""
        return TILE_ROWS, self.tile_n, self.step

    def code_layouts(self, mma: Any) -> tuple[Any, Any]:
        """Shared-memory layouts of both operands' codes."""
        return (
            blackwell_helpers.make_smem_layout_a(mma, self.tile, Float4E2M1FN, self.stages),
            blackwell_helpers.make_smem_layout_b(mma, self.tile, Float4E2M1FN, self.stages),
        )

    def scale_layouts(self, mma: Any) -> tuple[Any, Any]:
        """Shared-memory layouts of the scales: tiles along K, then (of b) along its rows."""
        return (
            blockscaled_layout.make_smem_layout_sfa(mma, self.tile, BLOCK, self.stages),
            blockscaled_layout.make_smem_layout_sfb(mma, self.tile, BLOCK, self.stages),
        )

    def maps(self, x_codes: Any, codes: Any) -> Maps:
        """Tensor maps, made on the host: activations `[T, K]`, weights `[N, Ks, layers * S]`."""
        mma = self.mma()
        a_layout, b_layout = self.code_layouts(mma)
        a = cute.make_tensor(
            cute.recast_ptr(x_codes.iterator, dtype=Float4E2M1FN),
            cute.make_layout((x_codes.shape[0], self.k, 1), stride=(self.k, 1, self.k)),
        )
        b = cute.make_tensor(
            cute.recast_ptr(codes.iterator, dtype=Float4E2M1FN),
            cute.make_layout(
                (self.n, self.slab_k, self.layers * self.slabs),
                stride=(self.slab_k, 1, self.n * self.slab_k),
            ),
        )
        op = cpasync.CopyBulkTensorTileG2SOp(tcgen05.CtaGroup.ONE)
        first = (None, None, None, 0)
        a_atom, a_map = make_tiled_tma_atom_A(op, a, cute.slice_(a_layout, first), self.tile, mma)
        b_atom, b_map = make_tiled_tma_atom_B(op, b, cute.slice_(b_layout, first), self.tile, mma)
        return Maps(a_atom, a_map, b_atom, b_map)

    @cute.jit
    def allocate(self, smem: Any) -> Shared:
        """Place everything and set up the barriers; the CTA has to meet before they are used."""
        stages, turns = self.stages, self.accumulators
        a = smem.allocate(stages * self.a_bytes, 1024)
        b = smem.allocate(stages * self.b_bytes, 1024)
        a_scales = smem.allocate(stages * self.scale_bytes, 128)
        b_scales = smem.allocate(stages * self.b_row_tiles * self.scale_bytes, 128)
        barriers = smem.allocate_tensor(Int64, cute.make_layout(2 * (stages + turns)), 16).iterator
        own = Shared(
            a,
            b,
            a_scales,
            b_scales,
            barriers,
            barriers + stages,
            barriers + 2 * stages,
            barriers + 2 * stages + turns,
        )
        thread, _, _ = cute.arch.thread_idx()
        if thread == 0:
            for stage in range_constexpr(stages):
                cute.arch.mbarrier_init(own.full + stage, 1)
                cute.arch.mbarrier_init(own.empty + stage, 1)
            for turn in range_constexpr(turns):
                cute.arch.mbarrier_init(own.acc_full + turn, 1)
                cute.arch.mbarrier_init(own.acc_empty + turn, 32 * EPILOGUE_WARPS)
        cute.arch.mbarrier_init_fence()
        return own

    @cute.jit
    def copy(
        self, maps: Any, x_scales: Any, scales: Any, own: Any, place: Any, done: Int32
    ) -> Int32:
        """The copying warp: all steps of a tile. done: steps copied before; -> after."""
        mma = self.mma()
        part = mma.get_slice(0)
        a_layout, b_layout = self.code_layouts(mma)
        one, rows = cute.make_layout(1), cute.domain_offset((place.first_row, 0, 0), maps.a)
        a_tiles = cute.local_tile(rows, (TILE_ROWS, self.step), (0, None, 0))
        to_a, from_a = cpasync.tma_partition(
            maps.a_atom,
            0,
            one,
            cute.group_modes(_staged(own.a, a_layout), 0, 3),
            cute.group_modes(part.partition_A(a_tiles), 0, 3),
        )
        b_tiles = cute.local_tile(maps.b, (self.tile_n, self.step), (place.column_tile, None, None))
        to_b, from_b = cpasync.tma_partition(
            maps.b_atom,
            0,
            one,
            cute.group_modes(_staged(own.b, b_layout), 0, 3),
            cute.group_modes(part.partition_B(b_tiles), 0, 3),
        )
        for step in cutlass.range(self.steps, unroll=1):
            at = done + step
            stage = at % self.stages
            cute.arch.mbarrier_wait(own.empty + stage, ((at // self.stages) & 1) ^ 1)
            slab, own_step = slab_step(step, self.slab_steps)
            layer = place.layer * self.slabs + slab
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(own.full + stage, self.stage_bytes)
                self._copy_scales(x_scales, scales, own, place, layer, step, own_step, stage)
            full = own.full + stage
            cute.copy(maps.a_atom, from_a[None, step], to_a[None, stage], tma_bar_ptr=full)
            cute.copy(
                maps.b_atom, from_b[None, own_step, layer], to_b[None, stage], tma_bar_ptr=full
            )
        return done + self.steps

    @cute.jit
    def _copy_scales(
        self,
        x_scales: Any,
        scales: Any,
        own: Any,
        place: Any,
        layer: Int32,
        step: Int32,
        slab_step: Int32,
        stage: Int32,
    ) -> None:
        """A step's scale tiles, neighbours along K, of 128 rows at a time."""
        source = scale_offset(
            Int64(place.scale_tile), step * self.step_tiles, self.k // TILE_COLUMNS
        )
        ptx.copy_bulk(
            own.a_scales + stage * self.scale_bytes,
            x_scales.iterator + source,
            self.scale_bytes,
            own.full + stage,
        )
        for i in range_constexpr(self.b_row_tiles):
            # Beyond the last row tile codes are zero; any scale there will do that is a number.
            tile = place.column_tile * self.b_row_tiles + i
            tile = cutlass.min(tile, row_tiles(self.n) - 1)
            row = Int64(layer) * row_tiles(self.n) + tile
            source = scale_offset(row, slab_step * self.step_tiles, self.slab_k // TILE_COLUMNS)
            ptx.copy_bulk(
                own.b_scales + (stage * self.b_row_tiles + i) * self.scale_bytes,
                scales.iterator + source,
                self.scale_bytes,
                own.full + stage,
            )

    @cute.jit
    def multiply(self, own: Any, memory: Any, done: Int32, turn: Int32) -> Int32:
        """The multiplying warp: all steps of a tile into accumulator `turn % accumulators`.

        memory: tensor memory; done: steps multiplied before; -> after.
        """
        mma = self.mma()
        a_layout, b_layout = self.code_layouts(mma)
        a = mma.make_fragment_A(_staged(own.a, a_layout))
        b = mma.make_fragment_B(_staged(own.b, b_layout))
        which = turn % self.accumulators
        acc = self.accumulator(mma, memory, which)
        a_scales, b_scales = self._scale_memory(mma, memory)
        a_copy = _to_tensor_memory(own.a_scales, self.scale_layouts(mma)[0], a_scales)
        b_copy = _to_tensor_memory(own.b_scales, self.scale_layouts(mma)[1], b_scales)
        cute.arch.mbarrier_wait(own.acc_empty + which, ((turn // self.accumulators) & 1) ^ 1)
        for step in cutlass.range(self.steps, unroll=1):
            at = done + step
            stage = at % self.stages
            cute.arch.mbarrier_wait(own.full + stage, (at // self.stages) & 1)
            ptx.after_thread_sync()
            for copy, source, target in (a_copy, b_copy):
                cute.copy(copy, source[None, None, None, None, stage], target)
            for inner in range_constexpr(self.step_tiles):
                mma.set(tcgen05.Field.ACCUMULATE, (step != 0) if inner == 0 else True)
                mma.set(tcgen05.Field.SFA, a_scales[None, None, inner].iterator)
                mma.set(tcgen05.Field.SFB, b_scales[None, None, inner].iterator)
                columns = (None, None, inner, stage)
                cute.gemm(mma, acc, a[columns], b[columns], acc)
            with cute.arch.elect_one():
                tcgen05.commit(own.empty + stage)
        with cute.arch.elect_one():
            tcgen05.commit(own.acc_full + which)
        return done + self.steps

    def accumulator(self, mma: Any, memory: Any, which: Any) -> Any:
        """Float32 sums `[128, tile_n]`, lanes by columns of tensor memory."""
        shape = mma.make_fragment_C(mma.partition_shape_C(self.tile[:2])).layout
        return cute.make_tensor(memory + which * self.tile_n, shape)

    def _scale_memory(self, mma: Any, memory: Any) -> tuple[Any, Any]:
        """Where in tensor memory the instruction reads a step's scales: behind the sums."""
        layouts = self.scale_layouts(mma)
        first = (None, None, None, 0)
        make = (blockscaled_layout.make_tmem_layout_sfa, blockscaled_layout.make_tmem_layout_sfb)
        column, tensors = self.accumulators * self.tile_n, []
        for layout, form, rows in zip(layouts, make, (TILE_ROWS, self.tile_n), strict=True):
            place = cute.recast_ptr(memory + column, dtype=Float8E4M3FN)
            own = form(mma, self.tile, BLOCK, cute.slice_(layout, first))
            tensors.append(cute.make_tensor(place, own))
            column += rows // 32 * self.step_tiles
        return tensors[0], tensors[1]


def _staged(place: Any, layout: Any) -> Any:
    """Codes in shared memory, all stages."""
    pointer = cute.recast_ptr(place, layout.inner, dtype=Float4E2M1FN)
    return cute.make_tensor(pointer, layout.outer)


def _to_tensor_memory(place: Any, layout: Any, target: Any) -> tuple[Any, Any, Any]:
    """(copy, source by stage, target) that spread scales to the four warps' lanes."""
    source = cute.make_tensor(cute.recast_ptr(place, dtype=Float8E4M3FN), layout)
    source, target = cute.filter_zeros(source), cute.filter_zeros(target)
    atom = cute.make_copy_atom(tcgen05.Cp4x32x128bOp(tcgen05.CtaGroup.ONE), Float8E4M3FN)
    copy = tcgen05.make_s2t_copy(atom, target)
    part = copy.get_slice(0)
    described = tcgen05.get_s2t_smem_desc_tensor(copy, part.partition_S(source))
    return copy, described, part.partition_D(target)
