"""The Visual Genome detector is the published one: every stage against an independent computation
from weights in the published layout.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import nms

from extract_features import VGTransform, build_detector, regions

BLOCKS = {"backbone.res2": 3, "backbone.res3": 4, "backbone.res4": 23, "roi_heads.res5": 3}
PICTURE = torch.rand(1, 3, 61, 83, generator=torch.Generator().manual_seed(1))


def published_shapes():
    """Every weight of Hugging Face's unc-nlp/frcnn-vg-finetuned, and its shape."""
    shapes = {"backbone.stem.conv1.weight": (64, 3, 7, 7), "backbone.stem.conv1.norm": 64}
    inputs = 64
    for k, (stage, blocks) in enumerate(BLOCKS.items()):
        middle, outputs = 64 * 2**k, 256 * 2**k
        for b in range(blocks):
            convolutions = {"conv1": (middle, inputs, 1, 1), "conv2": (middle, middle, 3, 3),
                "conv3": (outputs, middle, 1, 1)}
            if b == 0:
                convolutions["shortcut"] = (outputs, inputs, 1, 1)
            for name, shape in convolutions.items():
                shapes[f"{stage}.{b}.{name}.weight"] = shape
                shapes[f"{stage}.{b}.{name}.norm"] = shape[0]
            inputs = outputs
    for name in [name for name in shapes if name.endswith("norm")]:
        n = shapes.pop(name)
        shapes |= {f"{name}.{k}": (n,) for k in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"{name}.num_batches_tracked"] = ()
    layers = {"proposal_generator.rpn_head.conv": (512, 1024, 3, 3),
        "proposal_generator.rpn_head.objectness_logits": (12, 512, 1, 1),
        "proposal_generator.rpn_head.anchor_deltas": (48, 512, 1, 1),
        "roi_heads.box_predictor.cls_score": (1601, 2048),
        "roi_heads.box_predictor.bbox_pred": (6400, 2048),
        "roi_heads.box_predictor.fc_attr": (512, 2304),
        "roi_heads.box_predictor.attr_score": (401, 512)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes | {"roi_heads.box_predictor.cls_embedding.weight": (1601, 256)}


def published_anchors():
    """detectron2's: for each size and ratio, a box around 0 of that area and height / width."""
    cells = []
    for size in (32, 64, 128, 256):
        for ratio in (0.5, 1.0, 2.0):
            w = (size * size / ratio) ** 0.5
            cells.append([-w / 2, -w * ratio / 2, w / 2, w * ratio / 2])
    return torch.tensor(cells)


@pytest.fixture(scope="module")
def published():
    """Random weights in that layout, so scaled that nothing vanishes or explodes."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, shape in published_shapes().items():
        x = torch.randn(shape, generator=generator)
        if name.endswith(("norm.weight", "running_var")):
            x = (0.2 if "conv3" in name else 0.6) + 0.2 * x.abs()  # what 33 blocks add stays small
        elif name.endswith(("norm.bias", "running_mean")):
            x = 0.1 * x
        elif len(shape) > 1:
            x = x * (0.5 / np.prod(shape[1:])) ** 0.5
        weights[name] = x
    weights["proposal_generator.rpn_head.anchor_deltas.weight"] *= 1e-3
    weights["proposal_generator.anchor_generator.cell_anchors.0"] = published_anchors()
    weights["pixel_mean"] = torch.zeros(3)
    return weights


@pytest.fixture(scope="module")
def detector(published, tmp_path_factory):
    """With these weights, and for speed pictures of 96 pixels, not 600; 40 proposals, not 300."""
    path = tmp_path_factory.mktemp("vg") / "pytorch_model.bin"
    torch.save(published, path)
    model = build_detector("vg", path)
    model.transform.min_size, model.transform.max_size = 96, 160
    assert model.rpn._post_nms_top_n["testing"] == 300
    model.rpn._post_nms_top_n["testing"] = 40
    return model


@pytest.mark.parametrize("size, prepared", [
    ((427, 640), (600, 899)), ((333, 500), (600, 901)),  # 899.3, 900.9: to the nearest
    ((100, 500), (200, 1000)), ((500, 100), (1000, 200)), ((1, 3000), (1, 1000)),  # never 0
    ((360, 640), (562, 1000))])  # 562.4999 in the double precision of Detectron
def test_the_short_side_becomes_600_and_the_long_one_at_most_1000(size, prepared):
    found = VGTransform()([torch.zeros(3, *size)])[0]
    assert tuple(found.image_sizes[0]) == prepared == found.tensors.shape[2:]


def test_a_picture_becomes_blue_green_red_minus_its_mean():
    image = torch.rand(3, 4, 6)
    transform = VGTransform()
    transform.min_size, transform.max_size = 10, 100
    mean = torch.tensor([102.9801, 115.9465, 122.7717])
    expected = F.interpolate(255 * image[None, [2, 1, 0]], (10, 15), mode="bilinear")[0]
    found = transform([image])[0].tensors[0]
    torch.testing.assert_close(found, expected - mean[:, None, None], rtol=0, atol=2e-4)


def reference_norm(x, weights, name):
    return F.batch_norm(x, *(weights[f"{name}.norm.{k}"]
        for k in ("running_mean", "running_var", "weight", "bias")))


def reference_stage(x, weights, stage, stride, dilation=1):
    """Residual blocks of three convolutions; the first block strides in its first convolution."""
    for b in range(BLOCKS[stage]):
        name, s = f"{stage}.{b}", stride if b == 0 else 1
        y = F.conv2d(x, weights[f"{name}.conv1.weight"], stride=s)
        y = reference_norm(y, weights, f"{name}.conv1").relu()
        y = F.conv2d(y, weights[f"{name}.conv2.weight"], padding=dilation, dilation=dilation)
        y = reference_norm(y, weights, f"{name}.conv2").relu()
        y = reference_norm(F.conv2d(y, weights[f"{name}.conv3.weight"]), weights, f"{name}.conv3")
        if b == 0:
            x = F.conv2d(x, weights[f"{name}.shortcut.weight"], stride=s)
            x = reference_norm(x, weights, f"{name}.shortcut")
        x = (x + y).relu()
    return x


def reference_map(x, weights):
    x = F.conv2d(x, weights["backbone.stem.conv1.weight"], stride=2, padding=3)
    x = reference_norm(x, weights, "backbone.stem.conv1").relu()
    x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
    for stage, stride in (("backbone.res2", 1), ("backbone.res3", 2), ("backbone.res4", 2)):
        x = reference_stage(x, weights, stage, stride)
    return x


@pytest.fixture(scope="module")
def prepared(detector):
    return detector.transform(list(PICTURE))[0]


@pytest.fixture(scope="module")
def seen(prepared, published):
    return reference_map(prepared.tensors, published)


@torch.no_grad()
def test_the_map_is_that_of_the_published_network(detector, prepared, seen):
    assert seen.shape == (1, 1024, 6, 9) and seen.abs().mean() > 0.01  # 96 x 131 at stride 16
    torch.testing.assert_close(detector.backbone(prepared.tensors), seen, rtol=1e-3, atol=1e-3)


def reference_pool(plane, box):
    """RoIPool by hand: the box in whole cells, cut into 14 x 14 bins that may share cells, the
    largest value of each.
    """
    x1, y1, x2, y2 = (int(np.floor(c / 16 + 0.5)) for c in box)
    w, h = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
    bins = np.zeros((14, 14))
    for i in range(14):
        for j in range(14):
            rows = slice(max(0, y1 + int(i * h / 14)), max(0, y1 + int(np.ceil((i + 1) * h / 14))))
            columns = slice(
                max(0, x1 + int(j * w / 14)), max(0, x1 + int(np.ceil((j + 1) * w / 14))))
            part = plane[rows, columns]
            bins[i, j] = part.max() if part.size else 0
    return bins


BOXES = torch.tensor([[0.0, 0, 131, 96], [20, 30, 90, 50], [100, 10, 110, 90], [64, 64, 65, 65]])


def test_regions_are_pooled_as_by_hand(detector, seen):
    found = detector.roi_heads.box_roi_pool({"0": seen}, [BOXES], [(96, 131)])
    assert found.shape == (4, 1024, 14, 14)
    for box, pooled in zip(BOXES.tolist(), found):
        for channel in (0, 500, 1023):
            expected = reference_pool(seen[0, channel].numpy(), box)
            np.testing.assert_allclose(pooled[channel], expected, rtol=1e-6)


@torch.no_grad()
def test_features_and_classes_are_those_of_the_published_network(detector, seen, published):
    """layer4 at stride 1 with dilation 2 in every block, the mean; the background is class 0."""
    pooled = detector.roi_heads.box_roi_pool({"0": seen}, [BOXES], None)
    features = reference_stage(pooled, published, "roi_heads.res5", 1, dilation=2).mean((2, 3))
    found = detector.roi_heads.box_head(pooled)
    torch.testing.assert_close(found, features, rtol=1e-3, atol=1e-4)
    logits = detector.roi_heads.box_predictor.cls_score(features)
    theirs = F.linear(features, *(published[f"roi_heads.box_predictor.cls_score.{k}"]
        for k in ("weight", "bias")))
    torch.testing.assert_close(logits[:, 1:], theirs[:, :-1])
    torch.testing.assert_close(logits[:, 0], theirs[:, -1])


def reference_proposals(seen, weights, size):
    """All anchors decoded and clipped, best first, less what overlaps a better one by > .7."""
    name = "proposal_generator.rpn_head"
    conv, score, delta = ([weights[f"{name}.{k}.{p}"] for p in ("weight", "bias")]
        for k in ("conv", "objectness_logits", "anchor_deltas"))
    hidden = F.conv2d(seen, *conv, padding=1).relu()
    scores = F.conv2d(hidden, *score)[0].permute(1, 2, 0).flatten()  # (h w 12,)
    deltas = F.conv2d(hidden, *delta)[0].unflatten(0, (12, 4)).permute(2, 3, 0, 1)  # (h, w, 12, 4)
    y, x = (16 * torch.arange(n) for n in seen.shape[2:])
    cells = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[:, :, None]  # (h, w, 1, 2)
    sides = published_anchors()[:, 2:] - published_anchors()[:, :2]  # around their centres
    centre, half = cells + sides * deltas[..., :2], sides * deltas[..., 2:].exp() / 2
    boxes = torch.cat([centre - half, centre + half], dim=-1).reshape(-1, 4)
    boxes = boxes.clamp(min=0).minimum(torch.tensor([size[1], size[0]] * 2))
    sound = (boxes[:, :2] < boxes[:, 2:]).all(dim=1)
    return boxes[sound][nms(boxes[sound], scores[sound], 0.7)][:40]


@torch.no_grad()
def test_proposals_are_the_best_anchors_moved_clipped_and_thinned_out(
        detector, prepared, seen, published):
    found, _ = detector.rpn(prepared, {"0": seen})
    expected = reference_proposals(seen, published, prepared.image_sizes[0])
    assert len(expected) == 40
    np.testing.assert_allclose(found[0], expected, atol=0.02)


def test_given_boxes_come_back_with_the_features_of_exactly_those_boxes(detector, monkeypatch):
    """36 regions without regard to how sure the detector is; all where there are fewer."""
    found = regions(detector, PICTURE, 36)[0]
    assert [x.shape for x in found] == [(36, 4), (36, 2048), (36, 1601)]
    boxes, features, _ = found
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 83.01 and boxes[:, 3].max() <= 61.01
    chosen = [7, 0, 20]
    same, again, _ = regions(detector, PICTURE, 36, boxes[chosen])[0]
    assert np.array_equal(same, boxes[chosen])
    np.testing.assert_allclose(again, features[chosen], rtol=1e-4, atol=1e-5)
    half = regions(detector, PICTURE, 36, boxes[chosen], "bf16")[0][1]
    assert 0 < np.abs(half - again).max() < 0.01 * np.abs(again).max()
    monkeypatch.setitem(detector.rpn._post_nms_top_n, "testing", 3)
    assert len(regions(detector, PICTURE, 36)[0][0]) == 3
