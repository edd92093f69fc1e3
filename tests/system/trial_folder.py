"""A folder that trials work in: the material of a model with one input and one output, for engines that make it up."""

from corewise.accuracy.fidelity import compare
from corewise.accuracy.gate import judge
from corewise.accuracy.metrics import default
from corewise.engines import BuildInputs
from corewise.machine.inspect import inspect
from corewise.records.build import Plan, TensorSpec
from corewise.records.goal import Objective
from corewise.runtime.worker import CALIBRATION, HOLDOUT, PROGRAM, write_build_inputs
from corewise.search.trial import SearchContext

PLAN = Plan(threads_per_instance=1, batch=4)


def fill(folder, samples):
    """Write what trial children read."""
    for name in ("builds", "outputs", "logs", "cache"):
        (folder / name).mkdir()
    samples.save(folder / CALIBRATION)
    samples.save(folder / HOLDOUT)
    material = BuildInputs(
        program=folder / PROGRAM,
        inputs=(TensorSpec(name="x", dtype="float32", shape=(None, 6)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=(None, 5)),),
        operators={},
        calibration=samples,
        cpu=inspect(),
        cache=folder / "cache",
    )
    write_build_inputs(folder, material)


def make_setting(folder, *, max_drop, **options):
    """A setting whose gate compares with the first outputs that it sees."""
    reference = []

    def verify(outputs):
        reference.append(outputs)
        metric = default(outputs.leaves[0], None)
        fidelity = compare(reference[0], outputs, metric=metric, labels=None, nest=lambda leaves: leaves[0])
        return fidelity, judge(fidelity, Objective(max_drop=max_drop))

    wanted = {"plan": PLAN, "cpu": inspect(), "timeout_s": 60.0, "tell": lambda event: None, **options}
    return SearchContext(folder=folder, verify=verify, **wanted)
