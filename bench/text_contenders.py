"""One contender of ``text.py`` in a process of its own: strings to vectors, as often as it is asked.

    python bench/text_contenders.py NAME PLACE

NAME is ``corewise`` (PLACE is an artifact), or a backend of sentence-transformers (PLACE is a folder that ``prepare``
made; run by the peers' own Python). Requests and answers are JSON, a line each, on standard input and output.
"""

import csv
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

BACKENDS: dict[str, tuple[str, str | None]] = {
    "torch": ("torch", None),
    "onnx": ("onnx", "onnx/model.onnx"),
    "onnx int8": ("onnx", "onnx/model_int8.onnx"),
    "openvino": ("openvino", "openvino/openvino_model.xml"),
    "openvino int8": ("openvino", "openvino/openvino_model_qint8_quantized.xml"),
}
"""Each peer's backend of sentence-transformers, and its file within the folder."""
FP32 = {"dtype": "float32"}
CALIBRATING = 300
"""sentence-transformers' own default for static int8."""
Encode = Callable[[Sequence[str], int], Any]


def sentence_transformer(name: str, folder: Path) -> Any:
    """A peer as sentence-transformers opens it."""
    from sentence_transformers import SentenceTransformer

    backend, file = BACKENDS[name]
    options = FP32 if file is None else {"file_name": file}
    return SentenceTransformer(str(folder), backend=backend, device="cpu", model_kwargs=options)


def prepare(model: Path, folder: Path, texts: Path) -> None:
    """Export the model for each backend, quantized as sentence-transformers' documentation has it.

    ``texts`` is a JSON list of texts that calibrate the static int8. What is there is not made again.
    """
    from optimum.intel import OVQuantizationConfig
    from sentence_transformers import (
        SentenceTransformer,
        export_dynamic_quantized_onnx_model,
        export_static_quantized_openvino_model,
    )

    if not (folder / "modules.json").exists():
        SentenceTransformer(str(model), device="cpu", model_kwargs=FP32).save_pretrained(str(folder))
    for backend, file in (BACKENDS["onnx"], BACKENDS["openvino"]):
        if not (folder / str(file)).exists():
            exported = SentenceTransformer(str(folder), backend=backend, device="cpu", model_kwargs={"export": True})
            exported.save_pretrained(str(folder))
    if not (folder / str(BACKENDS["onnx int8"][1])).exists():
        vnni = "avx512_vnni" in Path("/proc/cpuinfo").read_text()
        export_dynamic_quantized_onnx_model(
            sentence_transformer("onnx", folder), "avx512_vnni" if vnni else "avx2", str(folder), file_suffix="int8"
        )
    if not (folder / str(BACKENDS["openvino int8"][1])).exists():
        data = folder / "calibration"
        data.mkdir(exist_ok=True)
        with (data / "train.csv").open("w", newline="", encoding="utf-8") as lines:
            csv.writer(lines).writerows([["sentence"], *([text] for text in json.loads(texts.read_text()))])
        export_static_quantized_openvino_model(
            sentence_transformer("openvino", folder),
            OVQuantizationConfig(num_samples=CALIBRATING),
            str(folder),
            dataset_name=str(data),
            dataset_config_name="default",
            dataset_split="train",
            column_name="sentence",
        )


def open_contender(name: str, place: Path) -> Encode:
    """What makes vectors of texts in calls of so many rows; corewise chooses its calls itself."""
    if name == "corewise":
        import corewise

        fast = corewise.load(place)
        return lambda texts, batch: fast.predict(list(texts))
    model = sentence_transformer(name, place)
    return lambda texts, batch: model.encode(list(texts), batch_size=batch, show_progress_bar=False)


def answer(encode: Encode, request: dict[str, Any]) -> dict[str, float]:
    """Encode the texts of a JSON file, save the vectors where the request says so; the seconds of encoding."""
    texts = json.loads(Path(request["texts"]).read_text())
    started_s = perf_counter()
    vectors = encode(texts, request["batch"])
    took_s = perf_counter() - started_s
    if request.get("vectors"):
        np.save(request["vectors"], np.asarray(vectors, np.float32))
    return {"seconds": took_s, "texts": len(texts)}


def main(name: str, place: str) -> None:
    """Answer requests until standard input ends."""
    # Libraries print to standard output too; the answers keep it for themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if name == "prepare":
        model, folder, texts = place.split(os.pathsep)
        prepare(Path(model), Path(folder), Path(texts))
        return
    encode = open_contender(name, Path(place))
    for line in sys.stdin:
        print(json.dumps(answer(encode, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
