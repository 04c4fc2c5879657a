"""Detection: boxes, suppression, average precision, assignment and loss against brute force and other libraries."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from microglia.tasks.average_precision import THRESHOLDS, average_precision, class_precision
from microglia.tasks.boxes import complete_iou, corners, iou, nms
from microglia.tasks.detections import USE, precision_metric, same_boxes, suppressed
from microglia.tasks.yolo import BALANCE, DetectionLoss, Gains, Grid, assign, decoded, distance
from microglia.zoo.yolov5 import ANCHORS, STRIDES

GRID = Grid(STRIDES, ANCHORS)
seeds = st.integers(0, 2**20)
quick = settings(deadline=None, max_examples=20)


@pytest.fixture(scope="module")
def ops():
    """torchvision's own operators, those that run here."""
    pytest.importorskip("torchvision")
    from microglia.zoo.external import import_torchvision

    import_torchvision()
    from torchvision import ops

    return ops


def boxes_of(generator, n, *, whole=False):
    """Returns random boxes in a square of 20 pixels; whole numbers give many ties."""
    points = generator.integers(0, 20, (n, 4)) if whole else generator.uniform(0, 20, (n, 4))
    points = points.astype(float)
    low, high = np.minimum(points[:, :2], points[:, 2:]), np.maximum(points[:, :2], points[:, 2:]) + 0.5
    return torch.tensor(np.concatenate([low, high], 1), dtype=torch.float32).reshape(-1, 4)


def greedy(boxes, scores, limit, labels):
    order = scores.argsort(descending=True, stable=True).tolist()
    kept = []
    while order:
        first = order.pop(0)
        kept.append(first)
        close = iou(boxes[first][None], boxes[order])[0] > limit if order else []
        order = [other for other, near in zip(order, close, strict=True) if not (near and labels[first] == labels[other])]
    return kept


@settings(deadline=None, max_examples=12)
@example(0, 400, 0.3, True)
@given(seeds, st.integers(0, 120), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.booleans())
def test_suppression_is_that_of_the_greedy_loop(seed, n, limit, whole):
    generator = np.random.default_rng(seed)
    boxes, labels = boxes_of(generator, n, whole=whole), torch.tensor(generator.integers(0, 3, n))
    scores = torch.tensor(generator.integers(0, 50, n) / 50 if whole else generator.uniform(0, 1, n))
    wanted = greedy(boxes, scores, limit, labels)
    assert nms(boxes, scores, limit, labels).tolist() == wanted
    assert nms(boxes, scores, limit, labels, most=7).tolist() == wanted[:7]
    one = nms(boxes, scores, limit).tolist()
    assert one == greedy(boxes, scores, limit, torch.zeros(n))


def test_overlaps_are_those_of_torchvision(ops):
    generator = np.random.default_rng(0)
    first, second = boxes_of(generator, 40), boxes_of(generator, 40)
    torch.testing.assert_close(iou(first, second), ops.box_iou(first, second))
    ours = 1 - complete_iou(first, second)
    torch.testing.assert_close(ours, ops.complete_box_iou_loss(first, second), atol=1e-6, rtol=1e-6)
    first.requires_grad_()
    mine = torch.autograd.grad((1 - complete_iou(first, second)).sum(), first)[0]
    theirs = torch.autograd.grad(ops.complete_box_iou_loss(first, second).sum(), first)[0]
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    try:
        kept = ops.nms(first.detach(), torch.arange(40) / 40, 0.3)
    except (RuntimeError, NotImplementedError):  # torchvision's compiled operators do not fit this torch
        return
    assert torch.equal(nms(first.detach(), torch.arange(40) / 40, 0.3), kept)


def test_overlap_of_nothing_is_zero():
    flat = torch.tensor([[1.0, 1, 1, 1]])
    assert iou(flat, flat).item() == 0
    assert iou(torch.zeros(0, 4), flat).shape == (0, 1)


# ---------------------------------------------------------------------------------------------------- average precision
def scene(generator, *, images=6, classes=3, crowds=True, whole=True):
    """Returns random (detections, truth) of images: some are empty, scores have ties, class 2 of 4 may be absent."""
    pairs = []
    for _ in range(images):
        m, n = int(generator.integers(0, 5)), int(generator.integers(0, 30))
        truth = boxes_of(generator, m, whole=whole)
        near = truth[generator.integers(0, m, n)] if m else boxes_of(generator, n)
        found = near + torch.tensor(generator.integers(-2, 3, (n, 4)), dtype=torch.float32) / 2
        found[:, 2:] = torch.maximum(found[:, 2:], found[:, :2] + 0.5)
        scores = torch.tensor(generator.integers(1, 20, (n, 1)) / 20, dtype=torch.float32)
        label = torch.tensor(generator.integers(0, classes, (n, 1)), dtype=torch.float32)
        own = torch.tensor(generator.integers(0, classes - 1, (m, 1)), dtype=torch.float32)
        crowd = torch.tensor(generator.uniform(0, 1, (m, 1)) < 0.25 * crowds, dtype=torch.float32)
        pairs.append((torch.cat([found, scores, label], 1), torch.cat([truth, own, crowd], 1)))
    return pairs


def plain_precision(pairs, label, threshold):
    """The definition in loops, of one class and threshold; None without true boxes."""
    rows, wanted = [], 0
    for detections, truth in pairs:
        own = [d.tolist() for d in detections.double() if d[5] == label]
        own = sorted(own, key=lambda d: -d[4])[:100]
        real = [t.tolist() for t in truth.double() if t[4] == label]
        real.sort(key=lambda t: t[5])
        wanted += sum(1 for t in real if not t[5])
        taken = [False] * len(real)
        for d in own:
            best, match = threshold, None
            for k, t in enumerate(real):
                if taken[k] and not t[5]:
                    continue
                if match is not None and not real[match][5] and t[5]:
                    break
                width, height = min(d[2], t[2]) - max(d[0], t[0]), min(d[3], t[3]) - max(d[1], t[1])
                shared = max(width, 0) * max(height, 0)
                mine = (d[2] - d[0]) * (d[3] - d[1])
                union = mine if t[5] else mine + (t[2] - t[0]) * (t[3] - t[1]) - shared
                if shared / union >= best:
                    best, match = shared / union, k
            if match is not None:
                taken[match] = True
            rows.append((d[4], match is not None, match is not None and bool(real[match][5])))
    if not wanted:
        return None
    rows.sort(key=lambda row: -row[0])
    right = wrong = 0
    points = []
    for _, hit, left_out in rows:
        if left_out:
            continue
        right, wrong = right + hit, wrong + (not hit)
        points.append((right / wanted, right / (right + wrong)))
    return sum(max([p for r, p in points if r >= level], default=0.0) for level in np.linspace(0, 1, 101)) / 101


@settings(deadline=None, max_examples=6)
@given(seeds, st.booleans())
def test_average_precision_is_its_definition(seed, crowds):
    pairs = scene(np.random.default_rng(seed), crowds=crowds)
    for label in range(3):
        found = class_precision(pairs, label)
        wanted = [plain_precision(pairs, label, t) for t in THRESHOLDS]
        assert (found is None) == (wanted[0] is None)
        if found is not None:
            np.testing.assert_allclose(found, wanted, atol=1e-9)


def as_coco(pairs, classes):
    """Returns pairs as the two JSON contents of COCO."""
    images = [{"id": k + 1} for k in range(len(pairs))]
    truth, found = [], []
    for k, (detections, real) in enumerate(pairs):
        for x0, y0, x1, y1, label, crowd in real.double().tolist():
            box = [x0, y0, x1 - x0, y1 - y0]
            truth.append({"id": len(truth) + 1, "image_id": k + 1, "category_id": int(label), "bbox": box,
                          "area": box[2] * box[3], "iscrowd": int(crowd)})  # fmt: skip
        for x0, y0, x1, y1, score, label in detections.double().tolist():
            found.append({"image_id": k + 1, "category_id": int(label), "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score})
    return {"images": images, "annotations": truth, "categories": [{"id": k} for k in range(classes)]}, found


@pytest.mark.parametrize("library", ["pycocotools", "faster_coco_eval"])
def test_average_precision_is_that_of_the_library(library, tmp_path):
    if library == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    for seed in range(5):
        pairs = scene(np.random.default_rng(seed))
        content, found = as_coco(pairs, 3)
        (tmp_path / "truth.json").write_text(json.dumps(content))
        truth = COCO(str(tmp_path / "truth.json"))
        judged = COCOeval(truth, truth.loadRes(found), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
        ours = average_precision(pairs, ["a", "b", "c"])
        assert ours["map"] == pytest.approx(judged.stats[0], abs=1e-9)
        assert ours["map50"] == pytest.approx(judged.stats[1], abs=1e-9)


def test_average_precision_is_that_of_torchmetrics():
    from torchmetrics.detection import MeanAveragePrecision

    pairs = scene(np.random.default_rng(1), crowds=False)
    # Its own thresholds are single precision: 0.33 there is above a recall of 33/100.
    steps = {"iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(), "rec_thresholds": np.linspace(0, 1, 101).tolist()}
    metric = MeanAveragePrecision(**steps)
    metric.update([{"boxes": d[:, :4], "scores": d[:, 4], "labels": d[:, 5].int()} for d, _ in pairs],
                  [{"boxes": t[:, :4], "labels": t[:, 4].int()} for _, t in pairs])  # fmt: skip
    theirs = metric.compute()
    ours = average_precision(pairs, ["a", "b", "c"])
    assert ours["map"] == pytest.approx(float(theirs["map"]), abs=1e-6)
    assert ours["map50"] == pytest.approx(float(theirs["map_50"]), abs=1e-6)


def test_ends_of_average_precision():
    truth = torch.tensor([[0.0, 0, 9, 9, 0, 0], [20.0, 20, 30, 30, 2, 0]])
    exact = torch.tensor([[0.0, 0, 9, 9, 0.3, 0], [20.0, 20, 30, 30, 0.9, 2]])
    perfect = average_precision([(exact, truth)], ["a", "b", "c"])
    assert perfect == pytest.approx({"map": 1.0, "map50": 1.0, "map/a": 1.0, "map/c": 1.0})  # b has no true box
    assert average_precision([(exact[:0], truth)], ["a", "b", "c"])["map"] == 0
    assert average_precision([(exact, truth[:0])], ["a"]) == {"map": 0.0, "map50": 0.0}
    crowd = torch.tensor([[0.0, 0, 20, 20, 0, 1], [50.0, 50, 60, 60, 0, 0]])
    inside = torch.tensor([[1.0, 1, 5, 5, 0.9, 0], [6.0, 6, 9, 9, 0.8, 0], [50.0, 50, 60, 60, 0.1, 0]])
    assert average_precision([(inside, crowd)], ["a"])["map"] == pytest.approx(1)  # detections in a crowd do not count


def test_metric_does_not_depend_on_batches_or_ranks():
    generator = np.random.default_rng(3)
    pairs = scene(generator, images=5)
    metric = precision_metric(["a", "b", "c"], (32, 32))

    def batch(indices):
        chosen = [pairs[k] for k in indices]
        truth = torch.cat([t for _, t in chosen])
        image = torch.cat([torch.full((len(t),), place) for place, (_, t) in enumerate(chosen)])
        targets = {"pixels": truth[:, :4], "labels": truth[:, 4].long(), "crowd": truth[:, 5] > 0, "image": image,
                   "size": torch.tensor([[32, 32]] * len(chosen)), "index": torch.tensor(indices)}  # fmt: skip
        return [d for d, _ in chosen], targets

    def values(parts):
        state = None
        for indices in parts:
            state = metric.update(state, *batch(indices))
        return metric.values("map", state)

    whole = values([[0, 1, 2, 3, 4]])
    assert whole["map"] > 0
    assert values([[3, 1], [4, 0], [2, 3]]) == whole  # another order, one image twice
    clipped = [(torch.cat([d[:, :4].clamp(0, 32), d[:, 4:]], 1), t) for d, t in pairs]
    assert whole == average_precision(clipped, ["a", "b", "c"])


def test_boxes_are_judged_in_the_original_image():
    metric = precision_metric(["a"], (64, 64))
    targets = {"pixels": torch.tensor([[10.0, 20, 110, 80]]), "labels": torch.tensor([0]), "crowd": torch.tensor([False]),
               "image": torch.tensor([0]), "size": torch.tensor([[128, 256]]), "index": torch.tensor([0])}  # fmt: skip
    on_canvas = torch.tensor([[2.5, 21, 27.5, 36, 0.9, 0]])  # a quarter of the size, 16 rows of border above
    assert metric.values("map", metric.update(None, [on_canvas], targets))["map"] == pytest.approx(1)


# ---------------------------------------------------------------------------------------------------- assignment and loss
def targets_of(boxes, labels=None, image=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    n = len(boxes)
    return {"boxes": boxes, "labels": torch.tensor(labels or [0] * n), "image": torch.tensor(image or [0] * n),
            "crowd": torch.zeros(n, dtype=torch.bool)}  # fmt: skip


def cells(found):
    return sorted(zip(found.column.tolist(), found.row.tolist(), strict=True))


def test_a_box_goes_to_its_cell_and_the_two_nearest():
    anchors = torch.tensor([[2.0, 2.0]])
    found = assign(targets_of([[3.2 / 8, 4.7 / 8, 0.25, 0.25]]), anchors, (8, 8))
    assert cells(found) == [(2, 4), (3, 4), (3, 5)]
    assert torch.allclose(found.box[:, :2] + torch.stack([found.column, found.row], 1), torch.tensor([3.2, 4.7]))
    assert cells(assign(targets_of([[0.3 / 8, 0.3 / 8, 0.25, 0.25]]), anchors, (8, 8))) == [(0, 0)]  # none outside
    assert cells(assign(targets_of([[7.7 / 8, 7.7 / 8, 0.25, 0.25]]), anchors, (8, 8))) == [(7, 7)]


def test_columns_and_rows_of_a_rectangle_are_not_swapped():
    found = assign(targets_of([[0.5 + 0.2 / 16, 0.25 + 0.3 / 8, 2 / 16, 2 / 8]]), torch.tensor([[2.0, 2.0]]), (8, 16))
    assert cells(found) == [(7, 2), (8, 1), (8, 2)]


@pytest.mark.parametrize(("ratio", "fits"), [(3.99, True), (4.0, False), (1 / 3.99, True), (1 / 4.0, False)])
def test_the_ratio_of_four_is_strict(ratio, fits):
    anchors = torch.tensor([[1.0, 1.0]])
    side = ratio / 8
    assert bool(len(assign(targets_of([[0.5, 0.5, side, 1 / 8]]), anchors, (8, 8)).label)) == fits
    assert bool(len(assign(targets_of([[0.5, 0.5, 1 / 8, side]]), anchors, (8, 8)).label)) == fits


def slow_assignment(targets, anchors, size):
    ny, nx = size
    found = set()
    for place, box in enumerate(targets["boxes"].tolist()):
        x, y, w, h = box[0] * nx, box[1] * ny, box[2] * nx, box[3] * ny
        for anchor, (aw, ah) in enumerate(anchors.tolist()):
            if max(w / aw, aw / w, h / ah, ah / h) >= 4:
                continue
            column, row = int(x), int(y)
            near = [(column, row)]
            near += [(column - 1, row)] if x % 1 < 0.5 and x > 1 else []
            near += [(column, row - 1)] if y % 1 < 0.5 and y > 1 else []
            near += [(column + 1, row)] if (nx - x) % 1 < 0.5 and nx - x > 1 else []
            near += [(column, row + 1)] if (ny - y) % 1 < 0.5 and ny - y > 1 else []
            found |= {(place, anchor, c, r) for c, r in near}
    return found


@quick
@given(seeds, st.integers(0, 12))
def test_assignment_is_that_of_loops(seed, n):
    generator = np.random.default_rng(seed)
    boxes = np.concatenate([generator.uniform(0.01, 0.99, (n, 2)), generator.uniform(0.01, 0.9, (n, 2))], 1)
    targets = targets_of(boxes.tolist(), labels=list(range(n)))
    for level, stride in enumerate(STRIDES):
        anchors = GRID.sides(level, torch.zeros(1))
        size = (64 // stride, 96 // stride)
        found = assign(targets, anchors, size)
        columns = (found.label, found.anchor, found.column, found.row)
        assert set(zip(*(c.tolist() for c in columns), strict=True)) == slow_assignment(targets, anchors, size)
        assert ((found.box[:, :2] > -0.5 - 1e-5) & (found.box[:, :2] < 1.5 + 1e-5)).all()


def test_decoding_undoes_what_the_loss_asks_for():
    size = (96, 64)
    wanted = torch.tensor([[30.0, 50.0, 20.0, 40.0]])
    share = wanted / torch.tensor([64, 96, 64, 96])
    maps = [torch.full((1, 3, size[0] // s, size[1] // s, 6), -20.0) for s in STRIDES]
    matches = 0
    for level, raw in enumerate(maps):
        anchors = GRID.sides(level, raw)
        found = assign(targets_of(share.tolist()), anchors, raw.shape[2:4])
        xy = torch.logit((found.box[:, :2] + 0.5) / 2, eps=1e-6)
        wh = torch.logit((found.box[:, 2:] / anchors[found.anchor]).sqrt() / 2, eps=1e-6)
        raw[found.cells] = torch.cat([xy, wh, torch.full((len(xy), 2), 20.0)], 1)
        matches += len(xy)
    boxes, scores = decoded(maps, GRID)
    sure = scores[0, :, 0] > 0.5
    assert int(sure.sum()) == matches >= 6
    torch.testing.assert_close(boxes[0, sure], corners(wanted).expand(matches, 4), atol=1e-2, rtol=0)
    loss = DetectionLoss(GRID)
    parts = [loss.parts(raw, targets_of(share.tolist()), level) for level, raw in enumerate(maps)]
    assert max(float(box) for box, _, _ in parts) < 1e-3
    assert [len(d) for d in suppressed(boxes, scores, USE)] == [1]


def maps_of(seed, batch=2, size=64, classes=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, size // s, size // s, 5 + classes, generator=generator) for s in STRIDES]


SOME = {"boxes": [[0.4, 0.5, 0.3, 0.4], [0.7, 0.2, 0.2, 0.2], [0.5, 0.5, 0.9, 0.8]], "labels": [0, 2, 1], "image": [0, 0, 1]}


def test_loss_is_its_definition():
    maps, targets = maps_of(0), targets_of(**SOME)
    loss = DetectionLoss(GRID)
    total = 0.0
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    for level, raw in enumerate(maps):
        anchors = GRID.sides(level, raw)
        found = assign(targets, anchors, raw.shape[2:4])
        overlaps, objectness, class_losses = [], torch.zeros_like(raw[..., 4]), []
        for k in range(len(found.label)):
            b, a, r, c = (int(part[k]) for part in found.cells)
            own = raw[b, a, r, c]
            box = torch.cat([2 * own[:2].sigmoid() - 0.5, (2 * own[2:4].sigmoid()) ** 2 * anchors[a]])
            overlap = complete_iou(corners(box[None]), corners(found.box[k][None]))[0]
            overlaps.append(1 - overlap)
            objectness[b, a, r, c] = max(float(overlap), 0)  # the later match of a cell counts
            hot = torch.zeros(3)
            hot[found.label[k]] = 1
            class_losses += [bce(own[5 + j], hot[j]) for j in range(3)]
        part = 0.05 * torch.stack(overlaps).mean() + 0.5 * 3 / 80 * torch.stack(class_losses).mean() if overlaps else 0.0
        total = total + part + (64 / 640) ** 2 * BALANCE[level] * bce(raw[..., 4], objectness)
    assert float(loss(maps, targets)) == pytest.approx(float(total), rel=1e-5)


def test_repeating_a_batch_doubles_the_summed_loss():
    maps, targets = maps_of(1), targets_of(**SOME)
    twice = {key: torch.cat([value, value + 2 if key == "image" else value]) for key, value in targets.items()}
    doubled = [torch.cat([m, m]) for m in maps]
    summed, mean = DetectionLoss(GRID, summed=True), DetectionLoss(GRID)
    assert float(summed(doubled, twice)) == pytest.approx(2 * float(summed(maps, targets)), rel=1e-5)
    assert float(mean(doubled, twice)) == pytest.approx(float(mean(maps, targets)), rel=1e-5)
    assert float(summed(maps, targets)) == pytest.approx(2 * float(mean(maps, targets)), rel=1e-6)


def test_a_batch_without_boxes_has_a_finite_loss_and_gradient():
    for boxes in ([], [[0.5, 0.5, 1e-6, 0.5]]):  # none, or one that fits no anchor
        maps = [m.requires_grad_() for m in maps_of(2)]
        value = DetectionLoss(GRID)(maps, targets_of(boxes))
        value.backward()
        assert math.isfinite(float(value))
        assert float(value) > 0
        assert all(torch.isfinite(m.grad).all() for m in maps)


def test_the_gain_of_objectness_follows_the_size():
    empty = targets_of([])
    only = DetectionLoss(GRID, Gains(0.0, 1.0, 0.0))
    small, large = ([torch.zeros(1, 3, s // k, s // k, 8) for k in STRIDES] for s in (320, 640))
    assert float(only(large, empty)) == pytest.approx(4 * float(only(small, empty)))
    assert float(only(large, empty)) == pytest.approx(sum(BALANCE) * math.log(2))


def test_one_class_needs_no_choice_and_crowds_are_no_targets():
    maps = maps_of(3, classes=1)
    loss = DetectionLoss(GRID, Gains(0.0, 0.0, 1.0))
    assert float(loss(maps, targets_of([[0.5, 0.5, 0.3, 0.3]]))) == 0
    targets = targets_of([[0.5, 0.5, 0.3, 0.3]])
    crowd = {**targets, "crowd": torch.tensor([True])}
    full = DetectionLoss(GRID)
    assert float(full(maps, crowd)) == float(full(maps, targets_of([])))
    assert float(full(maps, targets)) != float(full(maps, crowd))


def test_of_two_matches_of_a_cell_the_later_counts():
    from microglia.tasks.yolo import Assigned, _last_wins

    place = torch.zeros(3, dtype=torch.int64)
    found = Assigned(place, place, place, torch.tensor([1, 1, 0]), torch.zeros(3, 4), place)
    wanted = _last_wins(torch.zeros(1, 1, 1, 2), found, torch.tensor([0.9, 0.2, 0.5]))
    torch.testing.assert_close(wanted.flatten(), torch.tensor([0.5, 0.2]))


def test_distillation_is_zero_for_the_teacher_itself():
    teacher = maps_of(4)
    assert float(distance(teacher, teacher, 2.0)) == pytest.approx(0, abs=1e-6)
    student = [m.clone().requires_grad_() for m in maps_of(5)]
    value = distance(student, teacher, 2.0)
    value.backward()
    assert float(value) > 0.01
    sure = teacher[0][..., 4].sigmoid() > 0.5
    assert float(student[0].grad[..., :4][~sure].abs().max()) == 0  # boxes of background teach nothing
    assert float(student[0].grad[..., 4].abs().min()) > 0


def test_agreement_counts_images_with_the_same_boxes():
    first = [torch.tensor([[0.0, 0, 10, 10, 0.9, 0]]), torch.zeros(0, 6)]
    moved = [first[0] + torch.tensor([0.1, 0, 0.1, 0, 0, 0]), first[1]]
    other = [first[0] + torch.tensor([0, 0, 0, 0, 0, 1.0]), first[1]]
    assert same_boxes(first, moved) == (2, 2)
    assert same_boxes(first, other) == (1, 2)
    assert same_boxes(first, [first[0], first[0]]) == (1, 2)
