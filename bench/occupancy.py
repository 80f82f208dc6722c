"""Blocks that a multiprocessor holds at a time, on paper: what the CUDA occupancy calculator says without a device."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTERS = 65536  # of a multiprocessor,
PARTITIONS = 4  # each in its own quarter of them,
REGISTER_UNIT = 256  # and for a warp in portions of so many
SHARED_UNIT = 128  # bytes
RESERVED = 1024  # bytes of shared memory that CUDA takes of every block
THREADS_PER_BLOCK = 1024


@dataclass(frozen=True)
class Architecture:
    """A device, and the limits of its multiprocessors; shared memory in bytes.

    Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and the data sheets.
    """

    num_sms: int
    threads_per_sm: int
    blocks_per_sm: int
    shared_per_sm: int


ARCHITECTURES = {
    "sm_80": Architecture(108, 2048, 32, 164 * 1024),  # A100
    "sm_87": Architecture(16, 1536, 16, 164 * 1024),  # Jetson AGX Orin, 2048 cores
    "sm_90": Architecture(132, 2048, 32, 228 * 1024),  # H100 SXM, H200
}


def blocks_per_sm(architecture: Architecture, threads: int, registers: int, shared: int) -> int:
    """How many blocks of so many threads run on a multiprocessor at a time; 0 when not even one fits.

    Args:
        threads: of a block, at least 1.
        registers: of a thread, at least 1.
        shared: bytes of shared memory of a block, static and dynamic.
    """
    warps = -(-threads // WARP)
    warps_per_partition = REGISTERS // PARTITIONS // _round_up(registers * WARP, REGISTER_UNIT)
    if threads > THREADS_PER_BLOCK:
        return 0
    return min(
        architecture.blocks_per_sm,
        architecture.threads_per_sm // WARP // warps,
        warps_per_partition * PARTITIONS // warps,
        architecture.shared_per_sm // _round_up(shared + RESERVED, SHARED_UNIT),
    )


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
