"""A published weight version: its name, where its bytes lie, and the proof that a worker holds it.

The learner's weight sender makes a ``WeightBundle``; a worker's receiver answers with a ``WeightProof``; the driver judges it
with ``check_proof``. Nothing here moves bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from sgpo_dist.errors import WeightSyncError

PROMPT_TOKENS: Final = 64
COMPLETION_TOKENS: Final = 32
"""The most of a probe: both sides compute all of it at each publication, whatever a run's texts are. With less of a prompt what follows is less
certain, and gaps in bfloat16 are wider."""


@dataclass(frozen=True, slots=True)
class ProbeRow:
    """One fixed probe: ``prompt_ids`` followed by ``completion_ids`` whose log-probs both sides compute."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]

    @classmethod
    def cut(cls, prompt_ids: tuple[int, ...], completion_ids: tuple[int, ...]) -> Self:
        """A prompt's last tokens and its completion's first."""
        return cls(prompt_ids[-PROMPT_TOKENS:], completion_ids[:COMPLETION_TOKENS])


@dataclass(frozen=True, slots=True)
class WeightBundle:
    """One version ready to be received.

    ``uri`` names the bytes for the transport (a safetensors file in shared memory for ``shm``; empty for device transports).
    ``checksum`` is the BLAKE3 digest (128 bits, hex) over the tensors in name order; ``probe_logps`` are the learner's own
    per-token log-probs (nats) of the probe completions, one tuple a row.
    """

    version: int
    transport: str
    uri: str
    node_id: str
    checksum: str
    num_bytes: int
    names: tuple[str, ...]
    probe_logps: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class WeightProof:
    """A worker's answer after it took a version: what it read, and what its live engine now computes."""

    worker_id: str
    version: int
    checksum: str
    probe_logps: tuple[tuple[float, ...], ...]
    stall_s: float
    total_s: float


def mean_abs_gap(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """Mean over all probe tokens of |log-prob difference| in nats. Raises WeightSyncError when the shapes differ or are empty."""
    gaps = [abs(a - b) for row_a, row_b in zip(ours, theirs, strict=False) for a, b in zip(row_a, row_b, strict=False)]
    if [len(row) for row in ours] != [len(row) for row in theirs] or not gaps:
        raise WeightSyncError("probe log-probs of learner and worker have different shapes; the probe set differs between them")
    return sum(gaps) / len(gaps)


def check_proof(bundle: WeightBundle, proof: WeightProof, tolerance: float) -> float:
    """The proof's mean absolute log-prob gap; raises WeightSyncError unless version, checksum and log-probs agree."""
    if proof.version != bundle.version:
        raise WeightSyncError(f"worker {proof.worker_id} answered for version {proof.version}, not {bundle.version}")
    if proof.checksum != bundle.checksum:
        raise WeightSyncError(f"worker {proof.worker_id} read other bytes for version {bundle.version} (checksum differs)")
    gap = mean_abs_gap(bundle.probe_logps, proof.probe_logps)
    if not gap <= tolerance:
        raise WeightSyncError(
            f"worker {proof.worker_id} computes other log-probs for version {bundle.version}: mean gap {gap:.4g} nats, allowed {tolerance:.4g}"
        )
    return gap
