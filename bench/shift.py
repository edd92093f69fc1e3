"""Whether int8 holds on text unlike what it was calibrated on: MiniLM, given the first 200 pairs of STS-B alone.

    python -m bench shift [--no-robust] [--budget 240] [--pairs 200] [--engine openvino ...]

The first pairs of STS-B dev are captions of photos; further down come sentences from forums and news. ``corewise
optimize`` sees the captions only, as a user with narrow samples would, and its winner then answers all 3,000 sentences.
What is judged is the cosine of each embedding with fp32's: its mean, and the mean of the worst hundredth. The limits
are those that the project sets itself; ``held`` says whether both hold. ``trials`` has what became of every build.
With ``--no-robust`` the drop under shift decides nothing, which shows what it is good for.
"""

import argparse
from typing import Any

import numpy as np

import corewise
from bench.harness import add_results, example, say
from corewise.report.summary import summarize
from corewise.samples import Samples

FILE = "shift.json"
LEAST_MEAN, LEAST_WORST = 0.995, 0.98
WORST = 0.01
BATCH = 32


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--no-robust", action="store_true", help="the drop under shift decides nothing")
    parser.add_argument("--budget", type=float, default=240.0, metavar="S", help="seconds for the search (240)")
    parser.add_argument("--pairs", type=int, default=200, metavar="N", help="pairs that the search sees (200)")
    parser.add_argument("--engine", action="append", metavar="ENGINE", help="try only these")


def main(options: argparse.Namespace) -> None:
    """Search with narrow samples, measure on all of them, and write both."""
    everything = example("minilm", "samples")()
    narrow = everything.take(range(2 * options.pairs))
    build = example("minilm", "build")
    engines = {"engines": tuple(options.engine)} if options.engine else {}
    robust = not options.no_robust
    result = corewise.optimize(
        build(), narrow, metric="cosine", budget_s=options.budget, robust=robust, on_event=_told, **engines
    )
    cosines = _cosines(_answers(result.model, everything), _answers(_fp32(build()), everything))
    worst = np.sort(cosines)[: max(1, round(WORST * len(cosines)))]
    summary = summarize(result.report)
    record = {
        "winner": result.report.choice.winner.label,
        "speedup": result.report.choice.speedup,
        "mean_cosine": float(cosines.mean()),
        "worst_hundredth": float(worst.mean()),
        "worst": float(cosines.min()),
        "held": bool(cosines.mean() >= LEAST_MEAN and worst.mean() >= LEAST_WORST),
        "limits": {"mean_cosine": LEAST_MEAN, "worst_hundredth": LEAST_WORST},
        "sentences": len(cosines),
        "pairs_seen": options.pairs,
        "budget_s": options.budget,
        "wall_s": result.report.wall_s,
        "drop": summary["drop"],
        "shift_drop": summary["shift_drop"],
        "trials": [
            {name: trial[name] for name in ("label", "state", "reason", "value", "shift_drop", "build_s")}
            for trial in summary["trials"]
        ],
    }
    say(f"{record['winner']}: mean {record['mean_cosine']:.4f}, worst 1 % {record['worst_hundredth']:.4f}")
    add_results(options.results / FILE, "not robust" if options.no_robust else "robust", record)


def _told(event: Any) -> None:
    from corewise.records.events import TrialEnded

    if isinstance(event, TrialEnded):
        trial = event.trial
        say(f"{trial.build.label}: {trial.state} {trial.reason}")


def _fp32(module: Any) -> Any:
    import torch

    def run(**inputs: Any) -> Any:
        with torch.no_grad():
            return module(**{name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()

    return run


def _answers(model: Any, samples: Samples) -> np.ndarray:
    """The embedding of each sentence, (N, 384)."""
    parts = [(rows, model(input_ids=arrays[0], attention_mask=arrays[1])) for rows, arrays in samples.batches(BATCH)]
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    return np.asarray(np.concatenate([answer for _, answer in parts])[order])


def _cosines(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return np.asarray((ours * theirs).sum(axis=1) / norms)
