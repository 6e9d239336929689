"""What extract_features.py promises: the toy detector, the choice of regions, a store of scenes."""

import numpy as np
import pytest
import torch

import extract_features
from data import HELD_OUT_SCENES, TOY_CLASSES, BadInput, FeatureStore, Scene
from extract_features import (build_detector, detection_quality, draw_scenes, extract_scenes,
    regions, select_regions, toy_targets, train_toy_detector)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return build_detector("toy")


@pytest.fixture(scope="module")
def images():
    return [image / 255 for image in draw_scenes(range(3))]


def iou(a, b):
    """Overlap of two boxes by hand."""
    w = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return w * h / (area - w * h)


def select_slowly(boxes, probs, most, confidence):
    """Anderson's rule, class by class and box by box."""
    best = [0.0] * len(boxes)
    for c in range(1, len(probs[0])):
        kept = []
        for i in sorted(range(len(boxes)), key=lambda i: -probs[i][c]):
            if all(iou(boxes[i], boxes[j]) <= 0.3 for j in kept):
                kept.append(i)
                best[i] = max(best[i], probs[i][c])
    order = sorted(range(len(boxes)), key=lambda i: -best[i])
    if confidence is not None:
        most = min(most, max(1, sum(b > confidence for b in best)))
    return order[:most]


@pytest.mark.parametrize("most, confidence", [(8, 0.2), (20, None), (30, 0.9)])
def test_regions_are_chosen_by_andersons_rule(most, confidence):
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        corner = torch.rand(20, 2, generator=generator) * 60
        size = 10 + torch.rand(20, 2, generator=generator) * 40
        boxes = torch.cat([corner, corner + size], dim=1)
        probs = (4 * torch.randn(20, 6, generator=generator)).softmax(dim=1)
        found = select_regions(boxes, probs, most, confidence).tolist()
        assert found == select_slowly(boxes.tolist(), probs.tolist(), most, confidence)


def test_of_two_boxes_around_one_thing_the_surer_one_stays():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [50, 50, 60, 60]])
    probs = torch.tensor([[0.1, 0.6, 0.3], [0.1, 0.8, 0.1], [0.2, 0.5, 0.3]])
    assert select_regions(boxes, probs, most=8).tolist() == [1, 2, 0]  # 0 survives as class 2, .3
    assert select_regions(boxes, probs, most=8, confidence=0.4).tolist() == [1, 2]


def test_a_region_is_what_the_detector_says_of_its_proposal(detector, images):
    """Boxes are inside the picture; distributions sum to 1 and follow from the feature."""
    for boxes, features, probs in regions(detector, images, 8):
        assert 1 <= len(boxes) <= 8 and features.shape == (len(boxes), 128)
        assert boxes.min() >= 0 and boxes.max() <= 128 and (boxes[:, 2:] > boxes[:, :2]).all()
        assert probs.sum(dim=1).allclose(torch.ones(len(boxes)), atol=1e-5)
        head = detector.roi_heads.box_predictor.cls_score
        assert probs.allclose(head(features).softmax(dim=1), atol=1e-5)


def test_a_batch_of_scenes_gives_what_each_scene_gives_alone(detector, images):
    together = regions(detector, images, 8)
    for image, (boxes, features, _) in zip(images, together):
        alone = regions(detector, [image], 8)[0]
        torch.testing.assert_close(boxes, alone[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(features, alone[1], rtol=1e-3, atol=1e-3)


def test_unknown_detectors_and_foreign_weights_are_refused(tmp_path):
    with pytest.raises(BadInput, match="'yolo': expected vg, coco, toy"):
        build_detector("yolo")
    torch.save({"x": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(BadInput, match="w.pt: not the weights of the toy detector"):
        build_detector("toy", tmp_path / "w.pt")


def test_the_targets_of_a_scene_are_its_things():
    scene = Scene(5)
    targets = toy_targets(scene)
    for thing, box, label in zip(
            scene.things, targets["boxes"].tolist(), targets["labels"].tolist()):
        assert tuple(box) == thing.box
        assert TOY_CLASSES[label] == f"{thing['colour']} {thing['shape']}"


def test_detection_quality_by_hand(monkeypatch):
    """Scene 0: everything found but the first thing, and the second one called by a wrong name."""
    scene = Scene(HELD_OUT_SCENES)
    targets = toy_targets(scene)
    n = len(scene.things)
    assert n > 2
    probs = torch.nn.functional.one_hot(targets["labels"], len(TOY_CLASSES)).float()
    probs[1] = probs[1].roll(1)
    answer = (targets["boxes"][1:], None, probs[1:])
    monkeypatch.setattr(extract_features, "scene_regions", lambda *_: [answer])
    found = detection_quality(None, [scene.number])
    assert list(found.values()) == pytest.approx([(n - 1) / n, (n - 1) / n, (n - 2) / n])


def test_a_few_steps_of_training_lower_the_loss():
    """After 25 steps on 16 scenes, proposals cover the things far better than before."""
    scenes, images = [Scene(n) for n in range(16)], draw_scenes(range(16))
    torch.manual_seed(0)
    before = build_detector("toy")
    after = train_toy_detector(scenes, images, iterations=25, batch=4)
    targets = [toy_targets(s) for s in scenes]

    def loss(model):
        with torch.no_grad():
            return sum(model.train()(list(images / 255), targets).values()).item()

    assert loss(after) < 0.6 * loss(before)


def test_an_interrupted_extraction_goes_on_to_the_same_store(detector, tmp_path, monkeypatch):
    numbers = list(range(20))
    extract_scenes(detector, numbers, tmp_path / "whole")
    real, calls = FeatureStore.create, []

    def create_and_die(*args, **named):
        writer = real(*args, **named)
        write = writer.write

        def dying_write(row, *values):
            calls.append(row)
            if len(calls) == 7:
                raise KeyboardInterrupt
            write(row, *values)

        writer.write = dying_write
        return writer

    monkeypatch.setattr(FeatureStore, "create", create_and_die)
    with pytest.raises(KeyboardInterrupt):
        extract_scenes(detector, numbers, tmp_path / "parts")
    monkeypatch.setattr(FeatureStore, "create", real)
    assert not FeatureStore.is_complete(tmp_path / "parts")
    extract_scenes(detector, numbers, tmp_path / "parts")
    one, two = FeatureStore(tmp_path / "whole"), FeatureStore(tmp_path / "parts")
    assert {*one.arrays} == {"ids", "counts", "sizes", "boxes", "features", "class_weight",
        "class_bias"}
    for name in one.arrays:
        assert np.array_equal(one.arrays[name], two.arrays[name])
    assert one.num_region_classes == 49 and one.class_names[0] == "background"
