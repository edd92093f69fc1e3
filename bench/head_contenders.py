"""One contender of ``text_heads.py`` in a process of its own: texts or pairs to the outputs of a head.

    python bench/head_contenders.py NAME PLACE

NAME is ``corewise`` (PLACE is an artifact) or a peer (PLACE is a model's folder that ``prepare`` completed; run by the
peers' own Python). The peers are transformers in PyTorch and Optimum's exports for ONNX Runtime and OpenVINO, in fp32
and in int8; texts are sorted by length and padded to the longest of a batch, as people do who care. Requests and
answers are JSON, a line each, on standard input and output.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

PEERS = ("torch", "onnx", "onnx int8", "openvino", "openvino int8")
CALIBRATING = 300
Answer = Callable[[Sequence[Any], int], list[np.ndarray]]


def kind_of(folder: Path) -> str:
    """The ending of the model's class: ``ForSequenceClassification`` or ``ForTokenClassification``."""
    architecture: str = json.loads((folder / "config.json").read_text())["architectures"][0]
    return "For" + architecture.partition("For")[2]


def open_peer(name: str, folder: Path) -> Any:
    """A peer's model."""
    kind = kind_of(folder)
    if name == "torch":
        import transformers

        model = getattr(transformers, f"AutoModel{kind}").from_pretrained(folder)
        return model.float().eval()
    if name.startswith("onnx"):
        import optimum.onnxruntime as runtime

        file = "model_quantized.onnx" if name.endswith("int8") else "model.onnx"
        return getattr(runtime, f"ORTModel{kind}").from_pretrained(str(folder / name.replace(" ", "-")), file_name=file)
    import optimum.intel as intel

    return getattr(intel, f"OVModel{kind}").from_pretrained(str(folder / name.replace(" ", "-")))


def prepare(folder: Path, known: Path) -> None:
    """Export the model for each peer; ``known`` is a JSON list of texts or pairs, which calibrate OpenVINO's int8."""
    import optimum.intel as intel
    import optimum.onnxruntime as runtime
    from datasets import Dataset
    from optimum.onnxruntime.configuration import AutoQuantizationConfig
    from transformers import AutoTokenizer

    kind, tokenizer = kind_of(folder), AutoTokenizer.from_pretrained(folder)
    exports = {"onnx": (runtime, "ORT"), "openvino": (intel, "OV")}
    for name, (package, prefix) in exports.items():
        if not (folder / name).exists():
            getattr(package, f"{prefix}Model{kind}").from_pretrained(str(folder), export=True).save_pretrained(
                folder / name
            )
    if not (folder / "onnx-int8").exists():
        vnni = "avx512_vnni" in Path("/proc/cpuinfo").read_text()
        config = (AutoQuantizationConfig.avx512_vnni if vnni else AutoQuantizationConfig.avx2)(is_static=False)
        runtime.ORTQuantizer.from_pretrained(folder / "onnx").quantize(
            save_dir=folder / "onnx-int8", quantization_config=config
        )
    if not (folder / "openvino-int8").exists():
        model = getattr(intel, f"OVModel{kind}").from_pretrained(str(folder / "openvino"))
        rows = [dict(encoded(tokenizer, [item])) for item in json.loads(known.read_text())[:CALIBRATING]]
        data = Dataset.from_list([{key: value[0].tolist() for key, value in row.items()} for row in rows])
        intel.OVQuantizer.from_pretrained(model).quantize(
            calibration_dataset=data,
            ov_config=intel.OVConfig(quantization_config=intel.OVQuantizationConfig(num_samples=CALIBRATING)),
            save_directory=folder / "openvino-int8",
        )


def encoded(tokenizer: Any, items: Sequence[Any]) -> Any:
    """A batch of texts or pairs, as PyTorch's tensors."""
    columns = [list(items)] if isinstance(items[0], str) else [list(column) for column in zip(*items, strict=True)]
    return tokenizer(*columns, padding=True, truncation=True, return_tensors="pt")


def open_contender(name: str, place: Path) -> Answer:
    """What gives each item's outputs: classes or scores (C,), of a token classifier its probabilities (tokens, C)."""
    if name == "corewise":
        return open_corewise(place)
    import torch
    from transformers import AutoTokenizer

    model, tokenizer = open_peer(name, place), AutoTokenizer.from_pretrained(place)
    are_tokens = kind_of(place) == "ForTokenClassification"

    def answer(items: Sequence[Any], batch: int) -> list[np.ndarray]:
        order = sorted(
            range(len(items)), key=lambda k: -len(items[k]) if isinstance(items[k], str) else -len(" ".join(items[k]))
        )
        found: list[Any] = [None] * len(items)
        for start in range(0, len(order), batch):
            places = order[start : start + batch]
            inputs = encoded(tokenizer, [items[place] for place in places])
            with torch.inference_mode():
                logits = torch.as_tensor(model(**inputs).logits).float().numpy()
            for place, row, mask in zip(places, logits, inputs["attention_mask"].numpy(), strict=True):
                found[place] = row[: mask.sum()] if are_tokens else row
        return found

    return answer


def open_corewise(place: Path) -> Answer:
    """corewise's ``predict``, which chooses its calls itself; its answers as the logits that they were made of."""
    import corewise

    fast = corewise.load(place)

    def answer(items: Sequence[Any], batch: int) -> list[np.ndarray]:
        answers = fast.predict([tuple(item) if isinstance(item, list) else item for item in items])
        return [values_of(one) for one in answers]

    return answer


def values_of(answer: Any) -> np.ndarray:
    """An answer as an array: a score, or the logarithms of a class answer's probabilities; spans say too little."""
    if hasattr(answer, "probabilities"):
        return np.log(np.maximum(np.float32(list(answer.probabilities.values())), 1e-30))
    return np.float32([answer]) if np.isscalar(answer) else np.float32([len(answer)])


def main(name: str, place: str) -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if name == "prepare":
        prepare(*map(Path, place.split(os.pathsep)))
        return
    answer = open_contender(name, Path(place))
    for line in sys.stdin:
        request = json.loads(line)
        items = json.loads(Path(request["texts"]).read_text())
        started_s = perf_counter()
        found = answer(items, request["batch"])
        took_s = perf_counter() - started_s
        if request.get("vectors"):
            np.savez(request["vectors"], *found)
        print(json.dumps({"seconds": took_s, "texts": len(items)}), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
