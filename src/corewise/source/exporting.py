"""From a user's module to one exported program with flat tensors."""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.export import ExportedProgram

from corewise.records.behaviour import BatchMixing
from corewise.samples import Samples
from corewise.source.behaviour import (
    ROWS,
    batch_mixing,
    mixing_origin,
    reads_buffer,
    state_change,
    without_updates,
)
from corewise.source.checks import as_module
from corewise.source.examples import Examples
from corewise.source.exported import Exported, Flat
from corewise.source.running import check_structure, output_specs, run, run_batches, takes
from corewise.source.state import kept_state
from corewise.source.tracing import trace


@torch.inference_mode(mode=False)  # in which the caller may be: its tensors do not tell whether they were changed
def export(model: nn.Module | ExportedProgram, samples: Samples, *, fixed_batch: int | None = None) -> Exported:
    """Run ``model`` on samples and export it.

    The model is put in eval mode, and decoders of transformers return no cache. Dimension 0 of every input is the
    batch; what differs between samples is dynamic too. A model whose batch cannot be dynamic, or that mixes the rows of
    a batch, gets the fixed batch 1, which runtimes call row by row (``runtime.instances.open_plan``).

    Args:
        model: What to export; float32, on the CPU.
        samples: Inputs for it, without a batch dimension.
        fixed_batch: Export with this batch instead of a dynamic one.

    Returns:
        The program and what is known of it. A model that cannot be exported is no error: see ``Exported.why_not``.

    Raises:
        SamplesError: The model does not take the samples.
        NotRepeatable: The same input is answered differently from call to call: the model has state, or is random.
        SourceError: It is no model, its weights are not usable, or its outputs are no tensors, have NaN, do not have
            the batch as first dimension, or compare the rows of the batch with each other.
    """
    module, own_batch = as_module(model)
    flat = Flat(module, samples.structure)
    new = kept_state(module)
    examples = Examples(samples, module)
    rows, why_fixed = fixed_batch or own_batch, ""
    if rows:
        structure, outputs = run(flat, examples.largest(rows), examples.inputs)
        why_fixed = "it was asked for" if fixed_batch else "the model is an exported program with that batch"
    else:
        structure, outputs, why_fixed = run_batches(flat, examples)
        rows = 1 if why_fixed else None
    again, smallest = run(flat, examples.smallest(rows or 1), examples.inputs)
    check_structure(structure, again)
    state = state_change(flat, examples.largest(rows or 1), examples.other(rows or 1), new)
    known = _with_fixed_batch(flat, examples, rows, why_fixed) if rows else _with_any_batch(flat, examples)
    if state and known.program:
        without_updates(known.program)
        state = replace(state, is_read=reads_buffer(known.program, state.name))
    return Exported(
        program=known.program,
        why_not=known.why_not,
        module=flat,
        inputs=examples.inputs,
        outputs=output_specs(structure, outputs, smallest),
        output_structure=structure,
        fixed_batch=known.rows,
        why_fixed=known.why_fixed,
        mixing=known.mixing,
        state=state,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Traced:
    """A program, and the batch that it takes."""

    program: ExportedProgram | None
    why_not: str
    rows: int | None = None
    why_fixed: str = ""
    mixing: BatchMixing | None = None


def _with_any_batch(flat: Flat, examples: Examples) -> _Traced:
    """The program with a dynamic batch; with a batch of one where there is none, or rows would be mixed."""
    different = examples.unlike(ROWS)
    mixing = batch_mixing(flat, different)
    checks = [examples.smallest(1), examples.largest(3)]
    # A packed sequence becomes a padded one, which equal lengths alone would not try.
    if any(isinstance(part, nn.RNNBase) for part in flat.modules()):
        ragged = examples.ragged(ROWS)
        checks += [ragged] if ragged and takes(flat, ragged, examples.inputs) else []
    program, why_not = trace(flat, examples.largest(2), examples.varying, checks, dynamic_batch=True)
    if mixing:
        origin = mixing_origin(program, different) if program else None
        single = _with_fixed_batch(flat, examples, 1, "a row's answer depends on the other rows of its batch")
        return replace(single, mixing=replace(mixing, origin=origin))
    if program is None:
        single = _with_fixed_batch(flat, examples, 1, why_not)
        return single if single.program else _Traced(program=None, why_not=why_not)
    return _Traced(program=program, why_not="")


def _with_fixed_batch(flat: Flat, examples: Examples, rows: int, why: str) -> _Traced:
    """The program that takes ``rows`` rows a call."""
    largest = examples.largest(rows)
    checks = (examples.smallest(rows), largest)
    program, why_not = trace(flat, largest, examples.varying, checks, dynamic_batch=False)
    return _Traced(program=program, why_not=why_not, rows=rows, why_fixed=why)
