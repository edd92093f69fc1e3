"""A bulk job on nodes of which one is told that its CPU has AVX2 only: python told_machines.py ADDRESS ART IN OUT.

Each part takes a while, so that every node gets some. Prints what ran where as JSON.
"""

import json
import sys
import time
from dataclasses import replace

from corewise.cluster import bulk, crew, distributed
from corewise.cluster.actor import Answerer
from corewise.records.cpu import Cpu
from corewise.records.jsonable import to_json
from corewise.runtime.cores import compute_on

PART_S = 1.0


class Slow(Answerer):
    """Takes its time."""

    def answer(self, number: int, rows: str) -> str:
        time.sleep(PART_S)
        return super().answer(number, rows)


class Old(Slow):
    """Sees no AVX-512 and no VNNI."""

    def __init__(self, task: str) -> None:
        def keep_cores(count: int) -> Cpu:
            cpu = compute_on(count)
            return replace(cpu, model="an older CPU", isa=tuple(name for name in cpu.isa if name == "avx2"))

        super().__init__(task, keep_cores=keep_cores)


class Telling(crew.RayCrew):
    """Starts such actors."""

    def start(self, node: crew.Node, task: str) -> object:
        import ray

        old = {found["NodeID"] for found in ray.nodes() if "old" in found["Resources"]}
        crew.Answerer = Old if node.id in old else Slow  # type: ignore[misc]
        return super().start(node, task)


if __name__ == "__main__":
    distributed.RayCrew = Telling  # type: ignore[misc]
    address, *places = sys.argv[1:]
    print(json.dumps(to_json(bulk.predict(*places, ray=address, retune_s=3.0))))  # type: ignore[arg-type]
