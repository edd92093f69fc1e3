"""A workspace that trials run in: the inputs of a model with one input and one output, for engines that make it up."""

from corewise.accuracy.fidelity import compare
from corewise.accuracy.gate import judge
from corewise.accuracy.metrics import default
from corewise.engines import BuildInputs
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Plan, TensorSpec
from corewise.records.goal import Requirements
from corewise.runtime.workspace import Workspace
from corewise.search.trial import SearchContext

PLAN = Plan(threads_per_instance=1, batch=4)


def fill(folder, samples):
    """Write what trial processes read."""
    workspace = Workspace.create(str(folder))
    samples.save(workspace.holdout)
    workspace.write_build_inputs(
        BuildInputs(
            program=workspace.program,
            inputs=(TensorSpec(name="x", dtype="float32", shape=(None, 6)),),
            outputs=(TensorSpec(name="y", dtype="float32", shape=(None, 5)),),
            operators={},
            calibration=samples,
            cpu=inspect_cpu(),
            cache=workspace.cache,
        )
    )
    return workspace


def make_context(workspace, *, max_drop, **options):
    """A context whose gate compares with the first outputs that it sees."""
    reference = []

    def verify(outputs):
        reference.append(outputs)
        metric = default(outputs.leaves[0], None)
        fidelity = compare(reference[0], outputs, metric=metric, labels=None, nest=lambda leaves: leaves[0])
        return fidelity, judge(fidelity, Requirements(max_drop=max_drop))

    options = {"plan": PLAN, "cpu": inspect_cpu(), "timeout_s": 60.0, "on_event": lambda event: None, **options}
    return SearchContext(workspace=workspace, verify=verify, **options)
