"""Figures that others have published, for simulations of machines that are not here."""

from corewise.batching import LatencyTable, Partitions

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BERT_MS = {
    1: (120.2, 136.9, 174.6, 242.0, 371.3, 648.7, 1193.7, 2275.3, 4498.8),
    2: (71.0, 81.1, 97.8, 129.8, 206.1, 343.9, 621.1, 1179.6, 2327.8),
    4: (33.5, 39.1, 48.7, 76.7, 114.1, 201.0, 347.7, 651.9, 1263.6),
    8: (23.0, 27.6, 33.4, 49.7, 78.4, 140.8, 227.9, 431.7, 787.6),
    16: (21.0, 25.4, 30.3, 42.9, 59.9, 114.1, 172.5, 300.3, 569.3),
}
"""Mean milliseconds of BERT in TorchScript by threads, for ``BATCHES``, on one node of 16 cores.

From ``bert/cloudlab/large-batches/bert_latency.csv`` of https://github.com/msr-fiddle/packrat (Bhardwaj et al., ICML
2025). Each was measured while nothing else ran.
"""


def bert_partitions(cores: int) -> Partitions:
    """BERT on 16, 32 or 64 cores.

    For more threads than a node's there is no published figure: each doubling gains as much as that from 8 to 16 did,
    though they would also cross the border of a node.
    """
    times_ms, threads = {threads: list(ms) for threads, ms in BERT_MS.items()}, max(BERT_MS)
    doubling = [after / before for before, after in zip(BERT_MS[8], BERT_MS[16], strict=True)]
    while threads < cores:
        wider = [ms * factor for ms, factor in zip(times_ms[threads], doubling, strict=True)]
        threads *= 2
        times_ms[threads] = [max(wider[: k + 1]) for k in range(len(wider))]
    tables = {count: LatencyTable(points=tuple(zip(BATCHES, ms, strict=True))) for count, ms in times_ms.items()}
    return Partitions(tables, cores=cores)


def alone_s(partitions: Partitions, rows: int) -> float:
    """Seconds of a batch on one instance with all threads."""
    return partitions.tables[partitions.cores].latency_ms(rows) / 1e3
