"""The built-in metrics of tasks beside independent computations, and the interval that each has."""

from contextlib import redirect_stdout
from io import StringIO
from itertools import count

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, ndcg_score, roc_auc_score

from corewise.accuracy.detection import average_precision, decoder
from corewise.accuracy.fidelity import Outputs, compare
from corewise.accuracy.metrics import evaluate, resolve
from corewise.accuracy.outputs import ragged
from corewise.accuracy.pooled import Pooled
from corewise.common.detections import suppressed
from corewise.common.errors import MetricError, SamplesError
from corewise.common.nested import flatten, unflatten


def rng(seed=0):
    return np.random.default_rng(seed)


def value(metric, outputs, labels):
    scores = evaluate(resolve(metric), outputs, labels, len(flatten(outputs)[0][0]))
    return scores.value if isinstance(scores, Pooled) else float(scores.mean())


def drop(metric, reference, candidate, labels=None, groups=None):
    """The fidelity of a candidate: nested outputs in, the paired drop and its interval out."""
    leaves, structure = flatten(reference)
    return compare(
        Outputs(tuple(leaves)),
        Outputs(tuple(flatten(candidate)[0])),
        metric=resolve(metric),
        labels=labels,
        groups=groups,
        nest=lambda flat: unflatten(structure, flat),
        clock=(0.05 * tick for tick in count()).__next__,  # a hundred resamples, however busy the machine is
    )


def test_f1_is_scikit_learns():
    scores, labels = rng().normal(size=(80, 5)), rng(1).integers(5, size=80)
    expected = f1_score(labels, scores.argmax(1), average="macro")
    assert value("f1", scores, labels) == pytest.approx(expected)
    several = rng(2).integers(2, size=(80, 5))
    assert value("f1", scores, several) == pytest.approx(f1_score(several, scores > 0, average="macro"))
    assert value("f1", 1 / (1 + np.exp(-scores)), several) == pytest.approx(value("f1", scores, several))


def test_f1_of_tokens_leaves_out_what_has_no_class():
    scores = ragged([rng(k).normal(size=(length, 4)) for k, length in enumerate((5, 3, 7))])
    labels = ragged([rng(9 + k).integers(4, size=length) for k, length in enumerate((5, 3, 7))])
    expected = f1_score(np.concatenate(labels)[1:], np.concatenate([s.argmax(1) for s in scores])[1:], average="macro")
    labels[0][0] = -100
    assert value("f1", scores, labels) == pytest.approx(expected)


def test_auc_is_scikit_learns():
    truth, scores = rng(3).integers(2, size=60), rng(4).normal(size=(60, 1)).round(1)
    expected = roc_auc_score(truth, scores[:, 0])
    assert value("auc", scores, truth) == pytest.approx(expected)
    assert value("auc", np.concatenate([-scores, scores], axis=1), truth) == pytest.approx(expected)
    classes = rng(5).integers(3, size=60)
    shares = rng(6).dirichlet(np.ones(3), size=60)
    assert value("auc", shares, classes) == pytest.approx(roc_auc_score(classes, shares, multi_class="ovr"))


def test_correlations_are_scipys():
    predicted, truth = rng(7).normal(size=(50, 1)), rng(8).normal(size=50)
    assert value("pearson", predicted, truth) == pytest.approx(pearsonr(predicted[:, 0], truth)[0])
    assert value("spearman", predicted.round(), truth) == pytest.approx(spearmanr(predicted.round(), truth)[0])


def test_pairs_of_embeddings_are_compared_by_their_cosine():
    vectors, truth = rng(9).normal(size=(40, 8)), rng(10).normal(size=20).repeat(2)
    left, right = vectors[::2], vectors[1::2]
    cosines = (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
    assert value("spearman", vectors, truth) == pytest.approx(spearmanr(cosines, truth[::2])[0])
    # Both sentences of a pair are drawn together, whether or not the samples have groups.
    noisy = vectors + rng(11).normal(size=vectors.shape)
    without, pairs = drop("spearman", vectors, noisy, truth), np.arange(40) // 2
    with_groups = drop("spearman", vectors, noisy, truth, groups=pairs)
    assert (without.drop_low, without.drop_high) == (with_groups.drop_low, with_groups.drop_high)
    with pytest.raises(SamplesError, match="embeddings of pairs that share a label"):
        value("spearman", vectors, truth[::-1] + np.arange(40))


def test_errors_are_lower_for_better_outputs():
    truth = rng(12).normal(size=(100, 3)) * 10
    near, far = truth + 0.5, truth + np.where(np.arange(3) == 1, 3.0, 0.5)
    assert value("mae", near, truth) == pytest.approx(0.5)
    assert value("rmse", far, truth) == pytest.approx(np.sqrt((0.25 + 9 + 0.25) / 3))
    fidelity = drop("mae", near, far, truth)
    assert (fidelity.lower_is_better, fidelity.baseline_value) == (True, pytest.approx(0.5))
    assert fidelity.value > fidelity.baseline_value
    assert fidelity.drop == pytest.approx(2.5 / 3)
    assert fidelity.drop_low <= fidelity.drop <= fidelity.drop_high
    with pytest.raises(SamplesError, match=r"label of holdout sample 0 has shape \(2,\), but the output has \(3,\)"):
        value("mae", near, truth[:, :2])


def test_ndcg_is_scikit_learns_with_exponential_gains():
    scores, relevance = rng(13).normal(size=(12, 30)), rng(14).integers(4, size=(12, 30))
    assert value("ndcg@10", scores, relevance) == pytest.approx(ndcg_score(2**relevance - 1, scores, k=10))
    assert value("ndcg@3", scores, relevance) == pytest.approx(ndcg_score(2**relevance - 1, scores, k=3))
    pairs = np.stack([np.arange(12).repeat(30), relevance.ravel()], axis=1)
    assert value("ndcg@10", scores.reshape(-1, 1), pairs) == pytest.approx(value("ndcg@10", scores, relevance))


def test_ndcg_of_embeddings_ranks_the_documents_of_the_holdout():
    documents = np.eye(4)
    queries = np.array([[0.1, 0.9, 0.5, 0.0], [0.9, 0.0, 0.0, 0.1]])
    labels = ragged(
        [{"id": np.array(10 + k)} for k in range(4)]
        + [
            {"relevant": np.array([11, 12]), "relevance": np.array([1, 2])},
            {"relevant": np.array([10, 99]), "relevance": np.array([1, 3])},
        ]
    )
    first = ndcg_score([[0, 1, 3, 0]], queries[:1], k=10)  # the second has its only document first
    assert value("ndcg@10", np.concatenate([documents, queries]), labels) == pytest.approx((first + 1) / 2)


def test_recall_counts_the_neighbours_that_are_kept():
    vectors = rng(15).normal(size=(50, 16))
    assert value("recall@5", vectors * 7, vectors) == 1
    noisy = vectors + 0.3 * rng(16).normal(size=vectors.shape)

    def nearest(a):
        unit = a / np.linalg.norm(a, axis=1, keepdims=True)
        return np.argsort(-(unit @ unit.T) + 9 * np.eye(50), axis=1)[:, :5]

    expected = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(nearest(vectors), nearest(noisy), strict=True)])
    assert value("recall@5", noisy, vectors) == pytest.approx(expected)
    with pytest.raises(MetricError, match="4 samples do not have 5 neighbours"):
        value("recall@5", vectors[:4], vectors[:4])


def edits(a, b):
    """Levenshtein's distance by its textbook recursion."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, before = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def test_error_rates_count_edits_over_the_length_of_the_labels():
    truth = ragged([np.array(t) for t in ([1, 2, 3, 9, 4], [5, 6], [7, 7, 9, 8, 9, 1])])
    found = np.array([[1, 3, 9, 4, 0, 0], [5, 6, 2, 0, 0, 0], [7, 9, 8, 8, 9, 1]])
    texts = [[1, 3, 9, 4], [5, 6, 2], [7, 9, 8, 8, 9, 1]]
    expected = sum(edits(a, list(b)) for a, b in zip(texts, truth, strict=True)) / 13
    assert value("cer", found, truth) == pytest.approx(expected)
    spaced = ragged([{"ids": ids, "separator": np.array(9)} for ids in truth])
    # Words: (1 2 3)(4) as (1 3)(4); (5 6) as (5 6 2); (7 7)(8)(1) as (7)(8 8)(1).
    assert value("wer", found, spaced) == pytest.approx(4 / 6)
    with pytest.raises(SamplesError, match="which token stands between words"):
        value("wer", found, truth)


def test_scores_of_tokens_are_decoded_as_ctc_is():
    tokens = np.array([[0, 3, 3, 0, 3, 0, 0, 5], [0, 2, 0, 0, 4, 4, 0, 0]])
    scores = np.eye(6)[tokens]
    assert value("cer", scores, ragged([np.array([3, 3, 5]), np.array([2, 4])])) == 0
    assert value("cer", scores, ragged([np.array([3, 5]), np.array([2, 4, 4])])) == pytest.approx(2 / 5)


def test_miou_is_the_mean_over_classes_of_all_pixels():
    labels, scores = rng(17).integers(3, size=(6, 8, 8)), rng(18).normal(size=(6, 3, 8, 8))
    labels[0, 0, :4] = 255
    answers, valid = scores.argmax(1), labels != 255
    shares = []
    for name in range(3):
        ours, theirs = (answers == name) & valid, labels == name
        shares.append((ours & theirs).sum() / (ours | theirs).sum())
    assert value("miou", scores, labels) == pytest.approx(np.mean(shares))
    assert value("miou", np.moveaxis(scores, 1, -1), labels) == pytest.approx(np.mean(shares))
    assert value("miou", answers, labels) == pytest.approx(np.mean(shares))
    enlarged = labels.repeat(4, axis=1).repeat(4, axis=2)
    assert value("miou", scores, enlarged) == pytest.approx(np.mean(shares))
    with pytest.raises(SamplesError, match="in the size of the output, or a whole multiple"):
        value("miou", scores, labels[:, :7])


def test_miou_knows_masks_as_pictures_have_them_and_refuses_classes_that_the_model_lacks():
    scores = rng(19).normal(size=(6, 2, 8, 8))
    masks = rng(20).integers(2, size=(6, 8, 8))
    masks[0, 0, 0] = 1
    assert value("miou", scores, masks * 255) == pytest.approx(value("miou", scores, masks))
    assert value("miou", scores[:, 1:], masks * 255) == pytest.approx(value("miou", scores[:, 1:], masks))
    with pytest.raises(SamplesError, match=r"sample 0 has class 2, the model's classes are 0\.\.1"):
        value("miou", scores, masks * 2)


def test_psnr_takes_its_peak_from_the_labels():
    image = rng(19).uniform(0, 1, size=(4, 1, 12, 12))
    assert value("psnr", image + 0.1, image) == pytest.approx(20)
    assert value("psnr", 255 * image + 25.5, 255 * image) == pytest.approx(20)
    assert value("psnr", image, image) == 100


def test_ssim_is_that_of_its_paper():
    x, y = rng(20).uniform(size=(1, 16, 16)), rng(21).uniform(size=(1, 16, 16))
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for i in range(5, 11):
        for j in range(5, 11):
            a, b = (image[0, i - 5 : i + 6, j - 5 : j + 6] for image in (x, y))
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb, cov = (
                (window * a * a).sum() - ma**2,
                (window * b * b).sum() - mb**2,
                (window * a * b).sum() - ma * mb,
            )
            similar = (2 * ma * mb + 0.01**2) * (2 * cov + 0.03**2)
            found.append(similar / ((ma**2 + mb**2 + 0.01**2) * (va + vb + 0.03**2)))
    assert value("ssim", x, y) == pytest.approx(np.mean(found))
    assert value("ssim", x, x) == pytest.approx(1)


def boxes_at(corners, classes, scores=None):
    """One image's targets or detections, of boxes of 100 by 100 pixels."""
    corners = np.asarray(corners, float).reshape(-1, 2)
    found = {"boxes": np.concatenate([corners, corners + 100], axis=1), "labels": np.asarray(classes, np.int64)}
    return found | ({} if scores is None else {"scores": np.asarray(scores, float)})


def stacked(images):
    """What a model returns for images with different numbers of boxes."""
    return {name: ragged([image[name] for image in images]) for name in images[0]}


TARGETS = [boxes_at([(0, 0), (300, 0)], [1, 2]), boxes_at([], []), boxes_at([(50, 50)], [1])]


def test_map_of_perfect_detections_is_1():
    found = [image | {"scores": np.full(len(image["labels"]), 0.9)} for image in TARGETS]
    assert value("map", stacked(found), ragged(TARGETS)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        # A shift of 20 pixels leaves an overlap of 80/120: right at the thresholds .5 to .65, of ten.
        (
            [boxes_at([(20, 0), (300, 0)], [1, 2], [0.9, 0.8]), boxes_at([], [], []), boxes_at([(70, 50)], [1], [0.7])],
            0.7,
        ),
        # Class 2 is missed: class 1 counts alone for a half.
        ([boxes_at([(0, 0)], [1], [0.9]), boxes_at([], [], []), boxes_at([(50, 50)], [1], [0.7])], 0.5),
        # The wrong one of class 1 comes first: precision 1/2, then 2/3, so that the envelope is 2/3 everywhere.
        (
            [
                boxes_at([(0, 0), (300, 0)], [1, 2], [0.8, 0.9]),
                boxes_at([(0, 0)], [1], [0.95]),
                boxes_at([(50, 50)], [1], [0.7]),
            ],
            (2 / 3 + 1) / 2,
        ),
    ],
)
def test_map_by_hand(found, expected):
    assert value("map", stacked(found), ragged(TARGETS)) == pytest.approx(expected, abs=1e-6)


def test_any_selection_of_images_has_the_map_that_pycocotools_accumulates():
    raw = raw_detector(images=12)
    truth = [suppressed(one) for one in decoder(raw)(raw)]
    found = [suppressed(one) for one in decoder(raw)(raw + rng(3).normal(size=raw.shape) * 3)]
    for rows in (np.arange(12), rng(4).integers(12, size=12)):
        chosen = [[one[row] for row in rows] for one in (found, truth)]
        evaluation = evaluated(*chosen)
        expected = evaluation.eval["precision"][evaluation.eval["precision"] > -1].mean()
        assert average_precision(found, truth, "map").of_rows(rows) == pytest.approx(expected)


def evaluated(found, truth):
    """pycocotools' own evaluation, from its data structures to its accumulation."""
    names = sorted({int(name) for one in truth for name in one.classes})
    sides = []
    with redirect_stdout(StringIO()):
        for side in (truth, found):
            coco, rows = COCO(), [(k, *row) for k, one in enumerate(side) for row in zip(*one, strict=True)]
            coco.dataset = {
                "images": [{"id": k} for k in range(len(side))],
                "categories": [{"id": name} for name in names],
                "annotations": [
                    {"id": n + 1, "image_id": k, "category_id": int(name), "iscrowd": 0, "area": 1, "score": score}
                    | {"bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
                    for n, (k, box, score, name) in enumerate(rows)
                ],
            }
            coco.createIndex()
            sides.append(coco)
        evaluation = COCOeval(*sides, "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl, evaluation.params.maxDets = [[0, 1e10]], ["all"], [100]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def raw_detector(seed=0, images=20):
    """(N, 4 + 3, 64) as YOLO exports: centers and sizes in pixels, then scores; two objects in each image."""
    outputs = np.zeros((images, 7, 64), np.float32)
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(8))).reshape(2, 64) * 80 + 40
    outputs[:, :2] = grid + rng(seed).normal(size=(images, 2, 64))
    outputs[:, 2:4] = 60
    outputs[:, 4:] = rng(seed + 1).uniform(0, 0.01, size=(images, 3, 64))
    for image in range(images):
        for cell in rng(image).choice(64, size=2, replace=False):
            outputs[image, 4 + cell % 3, cell] = 0.5 + 0.4 * (cell / 64)
    return outputs


def test_fp32_scores_1_by_detections_however_many_it_has():
    crowded = np.concatenate([rng(6).uniform(0, 640, (4, 2, 400)), np.full((4, 2, 400), 20.0)], axis=1)
    crowded = np.concatenate([crowded, rng(7).uniform(0.3, 0.9, (4, 1, 400)), np.zeros((4, 1, 400))], axis=1)
    assert value("detections", crowded.astype(np.float32), crowded.astype(np.float32)) == pytest.approx(1)


def test_detections_need_no_labels():
    reference = raw_detector()
    assert value("detections", reference, reference) == pytest.approx(1)
    assert value("detections", reference.swapaxes(1, 2), reference.swapaxes(1, 2)) == pytest.approx(1)
    lost, moved = reference.copy(), reference.copy()
    lost[:, 4:] = 0
    moved[:, :2] += 80
    assert value("detections", lost, reference) == 0
    assert value("detections", moved, reference) < 0.05
    fidelity = drop("detections", reference, reference + rng(5).normal(size=reference.shape) * 0.002)
    assert 0 <= fidelity.drop < 0.05
    with pytest.raises(MetricError, match="fp32 detects nothing"):
        value("detections", lost, lost)
    with pytest.raises(MetricError, match=r"finds no boxes and scores in the outputs \(float64 \(5, 3\)\)"):
        value("detections", np.ones((5, 3)), np.ones((5, 3)))


def test_raw_outputs_have_the_same_map_in_every_form():
    raw = raw_detector()
    targets = []
    for image in raw:
        name, cell = np.nonzero(image[4:] > 0.25)
        center, half = image[:2, cell].T, image[2:4, cell].T / 2
        targets.append({"boxes": np.concatenate([center - half, center + half], axis=1), "labels": name})
    boxes, scores = raw[:, :4].swapaxes(1, 2), raw[:, 4:].swapaxes(1, 2)
    logits = np.log(np.maximum(scores, 1e-6) / (1 - scores))
    corners = np.concatenate([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], axis=2)
    best = np.argsort(-scores.max(2), axis=1)[:, :10, None]
    final = np.concatenate([corners, scores.max(2)[..., None], scores.argmax(2)[..., None]], axis=2)
    forms = {
        "channels first": raw,
        "channels last": raw.swapaxes(1, 2),
        "logits": np.concatenate([boxes, logits], axis=2),
        "two arrays": (boxes, scores),
        "corners": np.concatenate([corners, scores], axis=2),
        "after suppression": np.take_along_axis(final, best, axis=1),
        "as transformers": {"logits": logits, "pred_boxes": boxes / 640},
    }
    relative = [
        {
            "class_labels": t["labels"],
            "boxes": np.concatenate([(t["boxes"][:, :2] + 30) / 640, 0 * t["boxes"][:, :2] + 60 / 640], 1),
        }
        for t in targets
    ]
    for form, outputs in forms.items():
        labels = ragged(relative if form == "as transformers" else targets)
        assert value("map", outputs, labels) == pytest.approx(1), form


@pytest.mark.parametrize(
    ("metric", "reference", "labels"),
    [
        ("f1", rng(1).normal(size=(60, 4)), rng(2).integers(4, size=60)),
        ("auc", rng(1).normal(size=(60, 1)), rng(2).integers(2, size=60)),
        ("rmse", rng(1).normal(size=(60, 1)), rng(2).normal(size=60)),
        ("spearman", rng(1).normal(size=(60, 1)), rng(2).normal(size=60)),
        ("ndcg@10", rng(1).normal(size=(60, 8)), rng(2).integers(3, size=(60, 8))),
        ("recall@10", rng(1).normal(size=(60, 8)), None),
        ("cer", rng(1).integers(1, 5, size=(60, 8)), rng(2).integers(1, 5, size=(60, 8))),
        ("miou", rng(1).normal(size=(60, 3, 4, 4)), rng(2).integers(3, size=(60, 4, 4))),
        ("ssim", rng(1).uniform(size=(60, 12, 12)), rng(2).uniform(size=(60, 12, 12))),
        ("detections", raw_detector(images=30), None),
    ],
)
def test_every_metric_has_a_paired_interval(metric, reference, labels):
    candidate = reference
    if reference.dtype.kind == "f":
        candidate = reference + 0.02 * reference.std() * rng(3).normal(size=reference.shape)
    fidelity = drop(metric, reference, candidate, labels)
    assert fidelity.drop_low <= fidelity.drop <= fidelity.drop_high
    assert fidelity.drop_high - fidelity.drop_low < 0.5
    same = drop(metric, reference, reference.copy(), labels)
    assert same.drop_low <= same.drop == 0 <= same.drop_high
