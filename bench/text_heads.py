"""Texts to labels, scores and spans per second: corewise beside PyTorch, ONNX Runtime and OpenVINO by Optimum.

    python -m bench text_heads [--heads classifier ranker tagger] [--rounds 4] [--budget 2m]

A DistilBERT that classifies sentences of STS-B, a cross-encoder that scores its pairs, and a BERT that labels tokens,
tokenization included. No package has such weights: the encoders of the last two are MiniLM's real ones, the heads and
DistilBERT have weights drawn with a fixed seed, and the file of results says so. Peers have an environment of their
own (that of ``text``) and the batch at which they were fastest; contenders take turns. Scores are compared with
PyTorch's in fp32: the rank correlation, for a classifier the share of equal classes, and the concordance, which
``--max-drop`` limits. Writes text_heads.json.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.harness import DATA, ROOT, add_results, alternate, optimize, ratio_data, ratio_words, say
from bench.head_contenders import PEERS
from bench.text import BATCHES, KNOWN, MODEL, TRIED, Contender, drawn, peer_versions, peers_python, written
from corewise.accuracy.closeness import concordance
from corewise.common.stats import ratio_interval

SEED = 0
REFERENCE = "torch"
SPREAD = 0.5
"""The standard deviation of a head's weights: with transformers' own 0.02 all scores would be nearly equal."""
TINY = {"n_layers": 2, "dim": 64, "n_heads": 2, "hidden_dim": 64}


class Head(NamedTuple):
    """A model to make, and what it is given."""

    make: Callable[[bool], Any]
    pairs: bool
    weights: str
    metric: str


def classifier(tiny: bool) -> Any:
    """DistilBERT with two classes."""
    import transformers

    config = transformers.DistilBertConfig(num_labels=2, **(TINY if tiny else {}))
    return spread(transformers.DistilBertForSequenceClassification(config), "pre_classifier", "classifier")


def ranker(tiny: bool) -> Any:
    """MiniLM as a cross-encoder."""
    import transformers

    return spread(
        transformers.BertForSequenceClassification.from_pretrained(MODEL, num_labels=1, dtype=torch.float32),
        "classifier",
    )


def tagger(tiny: bool) -> Any:
    """MiniLM with nine labels for tokens, as CoNLL-2003 has them."""
    import transformers

    names = ["O", *(f"{prefix}-{kind}" for kind in ("PER", "ORG", "LOC", "MISC") for prefix in "BI")]
    labels = dict(enumerate(names))
    return spread(
        transformers.BertForTokenClassification.from_pretrained(
            MODEL, num_labels=len(names), id2label=labels, dtype=torch.float32
        ),
        "classifier",
    )


def spread(model: Any, *heads: str) -> Any:
    """The model, with random weights in its head."""
    generator = torch.Generator().manual_seed(SEED)
    for name in heads:
        weight = getattr(model, name).weight
        weight.data = torch.randn(weight.shape, generator=generator) * SPREAD / weight.shape[1] ** 0.5
    return model.eval()


REAL = f"MiniLM's real encoder, a head of seed {SEED}"
HEADS = {
    "classifier": Head(classifier, False, f"all of seed {SEED}", "agreement"),
    "ranker": Head(ranker, True, REAL, "spearman"),
    "tagger": Head(tagger, False, REAL, "agreement"),
}


def model_of(name: str, folder: Path, tiny: bool) -> Path:
    """The head's model as a folder of transformers, made if it is not there."""
    from transformers import AutoTokenizer

    place = folder / "model"
    if not (place / "config.json").exists():
        torch.manual_seed(SEED)
        model = HEADS[name].make(tiny)
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        # Older versions of transformers, such as the peers', do not know the class that newer ones name.
        config = json.loads((place / "tokenizer_config.json").read_text())
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {}}
        inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if name != "classifier" else [])
        (place / "tokenizer_config.json").write_text(json.dumps({**config, "model_input_names": inputs}))
    return place


def items_of(head: Head) -> list[Any]:
    """The sentences of STS-B, or its pairs."""
    with (DATA / "stsb.csv").open(newline="", encoding="utf-8") as file:
        pairs = [[row["sentence1"], row["sentence2"]] for row in csv.DictReader(file)]
    return pairs if head.pairs else [text for pair in pairs for text in pair]


def exported(python: Path, model: Path, known: Path) -> None:
    """Export the model for the peers, if that was not done."""
    if not (model / ".complete").exists():
        say(f"exporting for the peers into {model}")
        command = [str(python), str(ROOT / "bench" / "head_contenders.py"), "prepare", f"{model}{os.pathsep}{known}"]
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run(command, check=True, env={**clean, "HF_HUB_OFFLINE": "1"})
        (model / ".complete").touch()


def artifact_of(head: Head, model: Path, folder: Path, items: Sequence[Any], options: argparse.Namespace) -> Path:
    """corewise's artifact, made if it is not there."""
    place = folder / "fast.cw"
    if not place.exists():
        samples = folder / "known.jsonl"
        keys = ("text", "other") if head.pairs else ("text",)
        rows = (dict(zip(keys, item if head.pairs else (item,), strict=True)) for item in items)
        samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
        columns = ("--text", "text", "--pair", "other") if head.pairs else ("--text", "text")
        source = f"{'st' if head.pairs else 'hf'}:{model}"
        optimize(place, source, "--samples", str(samples), *columns, "--budget", options.budget,
                 "--max-drop", options.max_drop)  # fmt: skip
    return place


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One head."""
    head, folder = HEADS[name], options.folder / f"{name}{'-tiny' if options.tiny else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    everything = items_of(head)
    items, known = drawn(everything, options.items), drawn(everything, KNOWN)
    python, model = peers_python(options.folder), model_of(name, folder, options.tiny)
    exported(python, model, written(folder / "known.json", known))
    places = {"corewise": artifact_of(head, model, folder, known, options), **dict.fromkeys(PEERS, model)}
    timed, few = written(folder / "timed.json", items), written(folder / "few.json", drawn(items, TRIED))
    with ExitStack() as stack:
        contenders = {
            each: stack.enter_context(
                Contender(
                    Path(sys.executable) if each == "corewise" else python, each, place, script="head_contenders.py"
                )
            )
            for each, place in places.items()
        }
        batches = {}
        for each, contender in contenders.items():
            contender.ask(few, BATCHES[0])
            tried = {batch: contender.ask(few, batch) for batch in (BATCHES if each != "corewise" else BATCHES[:1])}
            batches[each] = max(tried, key=lambda batch: tried[batch])
        turns = {each: partial(one.ask, timed, batches[each]) for each, one in contenders.items()}
        rates = alternate(options.rounds, turns)
        found = {}
        for each, contender in contenders.items():
            contender.ask(timed, batches[each], folder / f"{each.replace(' ', '-')}.npz")
            with np.load(folder / f"{each.replace(' ', '-')}.npz") as made:
                found[each] = [made[key] for key in made.files]
    manifest = json.loads((places["corewise"] / "manifest.json").read_text())
    best = max(PEERS, key=lambda each: median(rates[each]))
    return {
        "items": len(items),
        "weights": head.weights,
        "tiny": options.tiny,
        "max_drop": float(options.max_drop),
        "build": manifest["build"],
        "plan": manifest["plan"],
        "peers": peer_versions(python),
        "batches": batches,
        "per_s": rates,
        "best_peer": best,
        "over": {each: ratio_data(ratio_interval(rates["corewise"], rates[each])) for each in PEERS},
        "worth": {each: worth(head, found[REFERENCE], found[each], each) for each in found},
        "concordance": {each: nearness(found[REFERENCE], found[each]) for each in found if head is not HEADS["tagger"]},
    }


def worth(head: Head, reference: Sequence[Any], found: Sequence[Any], name: str) -> float | None:
    """The rank correlation of scores, or the share of equal classes; ``None`` for spans, which are not tokens."""
    if head.metric == "spearman":
        from scipy.stats import spearmanr

        return float(spearmanr(np.concatenate(reference), np.concatenate(found)).statistic)
    if head is HEADS["tagger"] and name == "corewise":
        return None
    equal = [np.mean(one.argmax(-1) == other.argmax(-1)) for one, other in zip(reference, found, strict=True)]
    return float(np.mean(equal))


def nearness(reference: Sequence[Any], found: Sequence[Any]) -> float:
    """The metric that ``--max-drop`` limits, of scores or of the logarithms of classes' probabilities."""

    def comparable(outputs: Sequence[Any]) -> Any:
        values = torch.from_numpy(np.stack(outputs).astype(np.float64))
        return (values if values.shape[1] == 1 else values.log_softmax(-1)).numpy()

    return float(concordance(comparable(found), comparable(reference)).value)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("--heads", nargs="*", choices=tuple(HEADS), default=list(HEADS))
    parser.add_argument("--items", type=int, metavar="N", help="texts or pairs that are timed (default: all)")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--budget", default="2m", help="of optimize (default: 2m)")
    parser.add_argument(
        "--max-drop", default="0.01", help="of the share of pairs in the same order, in optimize (default: 0.01)"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a narrow DistilBERT of two layers, to try the bench itself"
    )
    parser.add_argument("--folder", type=Path, default=Path("/tmp/corewise-text"), help="keeps what the next run needs")


def main(options: argparse.Namespace) -> None:
    """Measure each head; the results of others in the file stay."""
    for name in options.heads:
        record = measure(name, options)
        add_results(options.results / "text_heads.json", name, record)
        say(f"\n{name}, {record['items']} items, weights: {record['weights']}")
        for each, rates in record["per_s"].items():
            ratio = f", corewise is {ratio_words(record['over'][each])} of it" if each in record["over"] else ""
            say(
                f"  {each:14s} {median(rates):7.1f}/s{ratio}; {HEADS[name].metric} {record['worth'][each]}, "
                f"concordance {record['concordance'].get(each)}"
            )
