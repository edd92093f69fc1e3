"""The model that the user calls: nested tensors in and out, whatever engine runs them."""

import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np

from corewise.artifact.checks import InputChecks
from corewise.artifact.watch import Outside, RangeWatch
from corewise.common.errors import InputError
from corewise.common.nested import Structure, match_call, unflatten
from corewise.engines import Session
from corewise.pipeline import TOP, AudioRunner, ImageAsk, ImageRunner, TextRunner, check_top
from corewise.records.build import TensorSpec
from corewise.records.ranges import InputRange, SeenRanges


class Model:
    """An opened model. Call it as the original: torch tensors give torch tensors, numpy arrays give numpy arrays.

    Thread-safe. It runs the plan that was measured (``instances.open_plan``): a call with more rows than the plan's
    batch is cut into micro-batches for all instances; a smaller call is divided among those that are idle. Under an
    elastic plan (``elastic.open_elastic``) a call that is alone takes all cores, and calls of many threads share them.
    Raises ``InputError`` if the arguments do not have the structure, dtypes and shapes of the samples.
    """

    def __init__(
        self,
        session: Session,
        *,
        inputs: Sequence[TensorSpec],
        input_structure: Structure,
        output_structure: Structure,
        ranges: Sequence[InputRange] | None = None,
        check_finite: bool = True,
        seen_ranges: SeenRanges | None = None,
        texts: TextRunner | None = None,
        images: ImageRunner | None = None,
        recordings: AudioRunner | None = None,
        files: object = None,
    ) -> None:
        """``session`` must accept calls from several threads at the same time.

        ``ranges`` are the allowed values of each input, and ``check_finite`` refuses NaN and infinities
        (``InputChecks``). ``seen_ranges`` are what inputs and outputs were like in the search (``RangeWatch``).
        ``texts`` answers texts, ``images`` images and ``recordings`` recordings, if the artifact carries such a
        pipeline. ``files`` lives as long as the model: the owner of a temporary folder that the session may read.
        """
        self._session = session
        self._inputs = tuple(inputs)
        self._input_structure = input_structure
        self._output_structure = output_structure
        self._checks = InputChecks(self._inputs, ranges, check_finite=check_finite)
        self._watch = RangeWatch(seen_ranges)
        self._warned = False
        self.texts, self.images, self.recordings = texts, images, recordings
        self._files = files

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs for one batch (dimension 0 of every input)."""
        leaves = match_call(self._input_structure, args, kwargs)
        arrays = [_array(leaf, spec) for leaf, spec in zip(leaves, self._inputs, strict=True)]
        if len({len(array) for array in arrays}) > 1 or not len(arrays[0]):
            counts = [len(array) for array in arrays]
            raise InputError(f"the inputs have {counts} items", "give the same number of each, at least 1")
        self._checks.check(arrays)
        outputs: list[Any] = self._session.run(arrays)
        looked = self._watch.see(arrays, outputs)
        if looked and not self._warned and (outside := self._watch.outside) is not None and outside.many:
            self._warned = True
            warnings.warn(outside.words, stacklevel=2)
        if hasattr(leaves[0], "detach"):
            outputs = [_tensor(array) for array in outputs]
        return unflatten(self._output_structure, outputs)

    def predict(
        self,
        items: Any,
        *,
        prompt: str | None = None,
        top: int | None = None,
        score_threshold: float | None = None,
        iou_threshold: float | None = None,
    ) -> Any:
        """The answers to raw items: texts are tokenized, images and recordings decoded; all instances run.

        Args:
            items: A list, an iterator or a single item. Items are texts, or pairs of texts for a model of pairs; or
                images: paths, contents (``bytes``), PIL images or uint8 arrays (H, W, 3) in RGB; or recordings: paths,
                contents, or tuples of an array (frames,) or (channels, frames) and its frames per second. An iterator
                is read only as the answers are taken, so that memory stays bounded for millions of items.
            prompt: The name of the prompt that goes before each text, for a model that has prompts.
            top: For an image or a recording, how many of the most probable classes to give. Default: 5.
            score_threshold: For a detector, the lowest score of an object that is kept. Default: 0.25 if overlapping
                boxes have to be suppressed (YOLO, SSD), else 0.5 (DETR).
            iou_threshold: If overlapping boxes have to be suppressed, the overlap (intersection over union) with a
                better box of its class at which a box is dropped. Default: 0.45.

        Returns:
            The answers in the order of the items: an array of vectors, float32 (N, D), or of scores (N,); a list of
            arrays if their sizes differ; a list of ``ClassAnswer`` (label, probability, probabilities); a list of lists
            of ``Span`` (label, probability, start, end, text); or a list of lists of ``Detection`` (label, score, box
            as x1, y1, x2, y2 in pixels of the upright photo). An iterator gives an iterator of the single answers, and
            a single item its answer. A warning says how many texts were cut to the tokens that the model takes.

        Raises:
            InputError: An item cannot be answered, or an argument does not fit the artifact.
        """
        media = self.images or self.recordings
        if media is not None and self.texts is None:
            if prompt is not None:
                raise InputError(f"a prompt goes before texts, and the model takes {media.noun}s", "leave out prompt")
            check_top(media.pipeline, top)
            ask = ImageAsk(
                top=TOP if top is None else top, score_threshold=score_threshold, iou_threshold=iou_threshold
            )
            return media.predict(items, ask)
        if self.texts is None:
            raise InputError(
                "the artifact has no pipeline for raw items",
                "call it with tensors, or make it again from st:FOLDER or hf:FOLDER, or with --tokenizer, or from a "
                "folder of images or recordings; if a function prepared them, give it: load(..., preprocess=function)",
            )
        for name, given in (("top", top), ("score_threshold", score_threshold), ("iou_threshold", iou_threshold)):
            if given is not None:
                raise InputError(f"{name} is for images, and the model takes texts", f"leave out {name}")
        return self.texts.predict(items, prompt=prompt)

    @property
    def outside(self) -> Outside | None:
        """How often inputs and outputs left the ranges of the search; ``None`` where nothing was watched.

        Once it is far more often than for samples like those of the search, a call warns.
        """
        return self._watch.outside

    def close(self) -> None:
        """Free memory and threads after the running calls have ended."""
        self._session.close()
        if self.texts is not None:
            self.texts.close()

    def __reduce__(self) -> Any:
        raise TypeError("an opened model cannot be copied or pickled; call corewise.load in each process")

    def __enter__(self) -> "Model":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _array(leaf: Any, spec: TensorSpec) -> np.ndarray:
    # Checked before the conversion to numpy, which has no bfloat16.
    dtype = str(leaf.dtype).removeprefix("torch.")
    if dtype != spec.dtype:
        raise InputError(f"input {spec.name!r} is {dtype}", f"give {spec.dtype}")
    # What is neither, such as a column of pandas, becomes an array.
    array: np.ndarray = leaf.detach().cpu().numpy() if hasattr(leaf, "detach") else np.asarray(leaf)
    fits = len(array.shape) == len(spec.shape) and all(
        expected is None or size == expected for size, expected in zip(array.shape, spec.shape, strict=True)
    )
    if not fits:
        expected_shape = ", ".join("any" if size is None else str(size) for size in spec.shape)
        raise InputError(f"input {spec.name!r} has shape {tuple(array.shape)}", f"give ({expected_shape})")
    return array


def _tensor(array: np.ndarray) -> Any:
    # The caller gave tensors, so torch is imported already.
    import torch

    return torch.from_numpy(array)
