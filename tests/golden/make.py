"""Makes the golden reports beside it: one realistic report in every format. Run it to renew them, and read the diff."""

import io
import json
from pathlib import Path
from typing import Any

from builders import requirements, text
from rich.console import Console

from corewise.records.build import Build, ElasticPlan, Plan, Receipt
from corewise.records.cpu import Cache, Cpu, LogicalCpu
from corewise.records.fidelity import GroupFidelity
from corewise.records.jsonable import to_json
from corewise.records.measurement import Measurement, Rates
from corewise.records.report import Choice, LosingTrial, Preprocess, Report, SampleFacts
from corewise.records.trial import Fidelity, Trial
from corewise.records.tuned import Elasticity, LoadPoint
from corewise.report import html, markdown, terminal

FOLDER = Path(__file__).parent
PLAN = Plan(threads_per_instance=2, batch=16)

EAGER = Build(engine="eager", precision="fp32")
EAGER_BF16 = Build(engine="eager", precision="bf16")
ONEDNN = Build(engine="torch-int8", precision="int8", options=(("backend", "onednn"), ("reduce_range", True)))
X86 = Build(engine="torch-int8", precision="int8", options=(("backend", "x86"), ("reduce_range", True)))
OPENVINO = Build(engine="openvino", precision="fp32")
OPENVINO_INT8 = Build(engine="openvino", precision="int8", options=(("reduce_range", True),))
ORT_INT8 = Build(
    engine="onnxruntime",
    precision="int8",
    options=(("per_channel", False), ("ranges", "minmax"), ("reduce_range", True)),
)
LOGITS = GroupFidelity(name="output_0", sqnr_db=20.8, floor_db=5.0, correlation=0.9958)
UNLIKE = Fidelity(
    metric="top1",
    samples=41,
    baseline_value=0.9024,
    value=0.8780,
    drop=0.0244,
    drop_low=-0.0302,
    drop_high=0.0901,
    sqnr_db=19.6,
    cosine=0.9951,
    agreement=39 / 41,
    groups=(GroupFidelity(name="output_0", sqnr_db=17.2, floor_db=5.0, correlation=0.9905),),
)
"""The winner on samples unlike those that calibrated."""
ORT_DYNAMIC = Build(engine="onnxruntime", precision="int8-dynamic")


def fidelity(right: int, low: float, high: float, sqnr_db: float, cosine: float, same: int, **more: Any) -> Fidelity:
    """Top-1 with so many of 300 right, where fp32 has 276; ``same`` of its answers are fp32's."""
    return Fidelity(
        metric="top1",
        samples=300,
        baseline_value=0.92,
        value=right / 300,
        drop=0.92 - right / 300,
        drop_low=low,
        drop_high=high,
        sqnr_db=sqnr_db,
        cosine=cosine,
        agreement=same / 300,
        **more,
    )


def measured(per_s: float, batch: int, slowest: float = 1.06) -> Measurement:
    """Five calls at about this rate, the last one slower."""
    p50_ms = 1000 * batch / per_s
    calls = tuple(round(p50_ms * factor, 3) for factor in (0.99, 0.995, 1.0, 1.01, slowest))
    plan = Plan(threads_per_instance=2, batch=batch)
    return Measurement(
        plan=plan, latencies_ms=calls, throughput_per_s=per_s, p50_ms=round(p50_ms, 3), p99_ms=calls[-1], spread=0.015
    )


def rates(build: Build, per_s: float) -> Rates:
    """Nine rounds at about this rate."""
    jitter = (0, 0.4, -0.3, 0.1, -0.2, 0.3, -0.1, 0.2, -0.4)
    return Rates(build=build, plan=PLAN, per_s=tuple(round(per_s * (1 + j / 20), 2) for j in jitter))


TRIALS = (
    Trial(
        build=EAGER,
        state="ok",
        reason=text("the baseline: 13.1 items/s"),
        build_s=1.9,
        payload_bytes=102_503_112,
        peak_memory_bytes=1_402_003_456,
        fidelity=fidelity(276, 0.0, 0.0, 200.0, 1.0, 300),
        verified_per_s=12.6,
        measurements=(measured(11.2, 1), measured(13.1, 16)),
    ),
    Trial(
        build=EAGER_BF16, state="pruned", reason=text("this CPU has no bf16 instructions: it would be slower than fp32")
    ),
    Trial(
        build=OPENVINO,
        state="ok",
        reason=text("top1 0.9200 against 0.9200; 19.8 items/s"),
        build_s=6.2,
        payload_bytes=102_288_904,
        peak_memory_bytes=1_120_337_920,
        fidelity=fidelity(276, 0.0, 0.0, 118.4, 1.0, 300),
        measurements=(measured(19.1, 1), measured(19.8, 16)),
    ),
    Trial(
        build=OPENVINO_INT8,
        state="ok",
        reason=text("top1 0.9167 against 0.9200; 55.6 items/s"),
        build_s=48.7,
        payload_bytes=26_341_376,
        peak_memory_bytes=2_310_811_648,
        notes=("batch 1 and 16 have compiled models of their own",),
        fidelity=fidelity(275, -0.01, 0.0167, 22.9, 0.9976, 293, basis="labels", groups=(LOGITS,), shift=UNLIKE),
        measurements=(measured(50.3, 1), measured(55.6, 16)),
        receipt=Receipt(
            layers=54, int8=53, kernels=(("Convolution/f32", 1), ("Convolution/u8", 52), ("FullyConnected/u8", 1))
        ),
    ),
    Trial(
        build=ONEDNN,
        state="ok",
        reason=text("top1 0.9133 against 0.9200; 41.9 items/s"),
        build_s=31.4,
        payload_bytes=25_906_120,
        peak_memory_bytes=1_988_100_096,
        fidelity=fidelity(274, -0.0033, 0.0167, 22.1, 0.9971, 294),
        measurements=(measured(38.8, 1), measured(41.9, 16, slowest=1.31)),
    ),
    Trial(
        build=X86,
        state="failed",
        reason=text("killed by signal 11 (SIGSEGV) while verifying after 3.1 s"),
        build_s=30.2,
        peak_memory_bytes=1_954_545_664,
    ),
    Trial(
        build=ORT_INT8,
        state="rejected",
        reason=text("top1 0.8900 against 0.9200: drop 0.0300 [0.0100, 0.0500] is above 0.01"),
        build_s=22.8,
        payload_bytes=25_724_391,
        peak_memory_bytes=1_733_296_128,
        fidelity=fidelity(267, 0.01, 0.05, 16.3, 0.9884, 279),
        verified_per_s=36.4,
        receipt=Receipt(layers=54, int8=53, kernels=(("Gemm", 1), ("QLinearConv", 53)), fell_back=("node_linear",)),
    ),
    Trial(
        build=ORT_DYNAMIC,
        state="failed",
        reason=text("the package 'onnxscript' is missing; pip install 'corewise[onnxruntime]'"),
    ),
)

ELASTICITY = Elasticity(
    plan=ElasticPlan(wide=PLAN, narrow=Plan(threads_per_instance=1, instances=2, batch=16)),
    pays=False,
    curve=(
        LoadPoint(load=0.05, p50_ms=(20.1, 19.9, 36.2), p99_ms=(40.3, 38.8, 44.0)),
        LoadPoint(load=2 / 3, p50_ms=(41.0, 39.4, 48.8), p99_ms=(97.2, 101.5, 112.0)),
        LoadPoint(load=0.95, p50_ms=(130.4, 128.9, 151.3), p99_ms=(388.0, 391.0, 442.0)),
    ),
    saturated_per_s=(55.4, 55.6, 53.9),
    memory_bytes=734_003_200,
)

CHOICE = Choice(
    winner=OPENVINO_INT8,
    plan=PLAN,
    throughput_per_s=55.4,
    baseline_throughput_per_s=13.07,
    speedup=4.24,
    speedup_low=4.17,
    speedup_high=4.31,
    reason=text(
        "openvino/int8/reduce_range=True wins: 55.4/s, "
        "4.24x [4.17, 4.31] the baseline eager/fp32 in 9 alternating rounds"
    ),
    losers=(
        LosingTrial(build=EAGER, state="ok", reason=text("0.24x [0.23, 0.24] of the winner in the alternating run")),
        LosingTrial(build=EAGER_BF16, state="pruned", reason=TRIALS[1].reason),
        LosingTrial(build=OPENVINO, state="ok", reason=text("not a finalist: 19.8/s in its trial against 55.6/s")),
        LosingTrial(build=ONEDNN, state="ok", reason=text("0.75x [0.74, 0.77] of the winner in the alternating run")),
        LosingTrial(build=X86, state="failed", reason=TRIALS[5].reason),
        LosingTrial(build=ORT_INT8, state="rejected", reason=TRIALS[6].reason),
        LosingTrial(build=ORT_DYNAMIC, state="failed", reason=TRIALS[7].reason),
    ),
    warnings=(text("300 samples are too few to tell: the drop of 0.0033 may be as high as 0.0167, above 0.01"),),
    elasticity=ELASTICITY,
)

REPORT = Report(
    model="resnet50.py:build",
    created="2026-03-14T09:26:53+00:00",
    versions={
        "corewise": "0.1.0",
        "python": "3.11.9",
        "torch": "2.13.0",
        "openvino": "2026.4.0",
        "onnxruntime": "1.32.0",
    },
    cpu=Cpu(
        architecture="x86_64",
        vendor="AuthenticAMD",
        model="AMD EPYC 7763 64-Core Processor",
        isa=("avx2", "fma", "f16c"),
        cpus=(LogicalCpu(cpu=0, core=0, socket=0, node=0), LogicalCpu(cpu=1, core=1, socket=0, node=0)),
        caches=(Cache(level=3, kind="unified", size_bytes=33_554_432, shared_by=2),),
        affinity=(0, 1),
        quota_cores=None,
        memory_bytes=25_276_063_744,
        memory_limit_bytes=None,
    ),
    requirements=requirements("throughput", max_drop=0.01),
    samples=SampleFacts(
        source="photos/",
        fingerprint="5f0c1d0e3a7b4c2f",
        calibration=200,
        holdout=300,
        seed=0,
        labelled=True,
        preprocess=Preprocess(),
    ),
    trials=TRIALS,
    finals=(rates(EAGER, 13.07), rates(OPENVINO_INT8, 55.4), rates(ONEDNN, 41.7)),
    choice=CHOICE,
    wall_s=252.4,
    peak_memory_bytes=2_310_811_648,
    notes=(text("the batch dimension is dynamic; height and width are fixed at 224"),),
)


def shown(report: Report, width: int) -> str:
    """The report as it appears on a terminal of that width, without colours."""
    console = Console(file=io.StringIO(), width=width, record=True, color_system=None)
    console.print(terminal.render(report))
    return "".join(f"{line.rstrip()}\n" for line in console.export_text().splitlines())


def files() -> dict[str, str]:
    """Each golden file's name and text."""
    return {
        "report.json": json.dumps(to_json(REPORT), indent=2) + "\n",
        "report.md": markdown.render(REPORT),
        "report.html": html.render(REPORT),
        "show.txt": shown(REPORT, 80),
    }


if __name__ == "__main__":
    for name, content in files().items():
        (FOLDER / name).write_text(content)
