"""The Visual Genome detector is the published one: every stage against an independent computation
from weights in the published layout.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import nms

from extract_features import C4RoIPool, VGTransform, build_detector, regions


def test_the_bins_of_a_box_by_hand():
    """A map of one row, with cells 1, 2, 3, 4 of 16 pixels. The box reaches from pixel 16 to 47, so
    in whole cells from 1 to 3: they hold 2, 3, 4. Fourteen bins share these, 3/14 of a cell each.
    Bin 4 reaches from 12/14 to 15/14: it sees two cells, and keeps the 3. So does bin 9 with the 4.
    """
    maps = {"0": torch.tensor([[[[1.0, 2, 3, 4]]]])}
    box = torch.tensor([[16.0, 0, 47, 7]])
    pooled = C4RoIPool()(maps, [box], None)
    assert pooled.shape == (1, 1, 14, 14)
    for row in pooled[0, 0].tolist():
        assert row == [2] * 4 + [3] * 5 + [4] * 5


# --- Weights in the published layout --------------------------------------------------------------

RPN = "proposal_generator.rpn_head"
BOX = "roi_heads.box_predictor"
BLOCKS = {"backbone.res2": 3, "backbone.res3": 4, "backbone.res4": 23, "roi_heads.res5": 3}
PICTURE = torch.rand(1, 3, 61, 83, generator=torch.Generator().manual_seed(1))


def block_shapes(name, inputs, middle, outputs, first):
    """{convolution: shape} of a residual block; the first of a stage has a shortcut."""
    shapes = {
        f"{name}.conv1": (middle, inputs, 1, 1),
        f"{name}.conv2": (middle, middle, 3, 3),
        f"{name}.conv3": (outputs, middle, 1, 1)}
    if first:
        shapes[f"{name}.shortcut"] = (outputs, inputs, 1, 1)
    return shapes


def published_shapes():
    """Every weight of Hugging Face's unc-nlp/frcnn-vg-finetuned, and its shape."""
    convolutions = {"backbone.stem.conv1": (64, 3, 7, 7)}
    inputs = 64
    for k, (stage, blocks) in enumerate(BLOCKS.items()):
        middle = 64 * 2**k
        outputs = 4 * middle
        for b in range(blocks):
            name = f"{stage}.{b}"
            convolutions |= block_shapes(name, inputs, middle, outputs, first=b == 0)
            inputs = outputs
    shapes = {}
    for name, shape in convolutions.items():
        channels = shape[:1]
        shapes[f"{name}.weight"] = shape
        for key in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.norm.{key}"] = channels
        shapes[f"{name}.norm.num_batches_tracked"] = ()
    layers = {
        f"{RPN}.conv": (512, 1024, 3, 3),
        f"{RPN}.objectness_logits": (12, 512, 1, 1),
        f"{RPN}.anchor_deltas": (48, 512, 1, 1),
        f"{BOX}.cls_score": (1601, 2048),
        f"{BOX}.bbox_pred": (6400, 2048),
        f"{BOX}.fc_attr": (512, 2304),
        f"{BOX}.attr_score": (401, 512)}
    for name, shape in layers.items():
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]
    shapes[f"{BOX}.cls_embedding.weight"] = (1601, 256)
    return shapes


def published_anchors():
    """detectron2's: for each size and ratio, a box around 0 of that area and height / width."""
    cells = []
    for size in (32, 64, 128, 256):
        for ratio in (0.5, 1.0, 2.0):
            w = size / ratio**0.5
            h = w * ratio
            cells.append([-w / 2, -h / 2, w / 2, h / 2])
    return torch.tensor(cells)


@pytest.fixture(scope="module")
def published():
    """Random weights in that layout, so scaled that nothing vanishes or explodes."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in published_shapes().items():
        x = torch.randn(shape, generator=generator)
        if name.endswith(("norm.weight", "running_var")):
            least = 0.2 if "conv3" in name else 0.6  # what 33 blocks add stays small
            x = least + 0.2 * x.abs()
        elif name.endswith(("norm.bias", "running_mean")):
            x = 0.1 * x
        elif len(shape) > 1:
            x = x * (0.5 / np.prod(shape[1:])) ** 0.5
        weights[name] = x
    weights[f"{RPN}.anchor_deltas.weight"] *= 1e-3
    weights["proposal_generator.anchor_generator.cell_anchors.0"] = published_anchors()
    weights["pixel_mean"] = torch.zeros(3)
    return weights


@pytest.fixture(scope="module")
def detector(published, tmp_path_factory):
    """With these weights, and for speed pictures of 96 pixels, not 600; 40 proposals, not 300."""
    path = tmp_path_factory.mktemp("vg") / "pytorch_model.bin"
    torch.save(published, path)
    model = build_detector("vg", path)
    model.transform.min_size = 96
    model.transform.max_size = 160
    proposals = model.rpn._post_nms_top_n
    assert proposals["testing"] == 300
    proposals["testing"] = 40
    return model


# --- The picture ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size, prepared", [
    ((427, 640), (600, 899)),  # 899.3, and in the next line 900.9: to the nearest
    ((333, 500), (600, 901)),
    ((100, 500), (200, 1000)),
    ((500, 100), (1000, 200)),
    ((1, 3000), (1, 1000)),  # never 0
    ((360, 640), (562, 1000))])  # 562.4999 in the double precision of Detectron
def test_the_short_side_becomes_600_and_the_long_one_at_most_1000(size, prepared):
    height, width = size
    images, _ = VGTransform()([torch.zeros(3, height, width)])
    assert tuple(images.image_sizes[0]) == prepared
    assert images.tensors.shape[2:] == prepared


def test_a_picture_becomes_blue_green_red_minus_its_mean():
    image = torch.rand(3, 4, 6)
    transform = VGTransform()
    transform.min_size = 10
    transform.max_size = 100
    images, _ = transform([image])
    mean = torch.tensor([102.9801, 115.9465, 122.7717])
    blue_green_red = 255 * image[[2, 1, 0]]
    resized = F.interpolate(blue_green_red[None], (10, 15), mode="bilinear")[0]
    expected = resized - mean[:, None, None]
    torch.testing.assert_close(images.tensors[0], expected, rtol=0, atol=2e-4)


# --- The map --------------------------------------------------------------------------------------


def reference_norm(x, weights, name):
    mean = weights[f"{name}.norm.running_mean"]
    variance = weights[f"{name}.norm.running_var"]
    weight = weights[f"{name}.norm.weight"]
    return F.batch_norm(x, mean, variance, weight, weights[f"{name}.norm.bias"])


def reference_stage(x, weights, stage, stride, dilation=1):
    """Residual blocks of three convolutions; the first block strides in its first convolution."""
    for b in range(BLOCKS[stage]):
        name = f"{stage}.{b}"
        y = F.conv2d(x, weights[f"{name}.conv1.weight"], stride=stride)
        y = reference_norm(y, weights, f"{name}.conv1")
        y = y.relu()
        y = F.conv2d(y, weights[f"{name}.conv2.weight"], padding=dilation, dilation=dilation)
        y = reference_norm(y, weights, f"{name}.conv2")
        y = y.relu()
        y = F.conv2d(y, weights[f"{name}.conv3.weight"])
        y = reference_norm(y, weights, f"{name}.conv3")
        if b == 0:
            x = F.conv2d(x, weights[f"{name}.shortcut.weight"], stride=stride)
            x = reference_norm(x, weights, f"{name}.shortcut")
        x = (x + y).relu()
        stride = 1
    return x


def reference_map(x, weights):
    x = F.conv2d(x, weights["backbone.stem.conv1.weight"], stride=2, padding=3)
    x = reference_norm(x, weights, "backbone.stem.conv1")
    x = x.relu()
    x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
    x = reference_stage(x, weights, "backbone.res2", stride=1)
    x = reference_stage(x, weights, "backbone.res3", stride=2)
    x = reference_stage(x, weights, "backbone.res4", stride=2)
    return x


@pytest.fixture(scope="module")
def prepared(detector):
    images, _ = detector.transform(list(PICTURE))
    return images


@pytest.fixture(scope="module")
def seen(prepared, published):
    return reference_map(prepared.tensors, published)


@torch.no_grad()
def test_the_map_is_that_of_the_published_network(detector, prepared, seen):
    assert seen.shape == (1, 1024, 6, 9)  # 96 x 131 pixels at stride 16
    assert seen.abs().mean() > 0.01
    torch.testing.assert_close(detector.backbone(prepared.tensors), seen, rtol=1e-3, atol=1e-3)


# --- Features of boxes ----------------------------------------------------------------------------

BOXES = torch.tensor([[0.0, 0, 131, 96], [20, 30, 90, 50], [100, 10, 110, 90], [64, 64, 65, 65]])


def bin_edges(first, last):
    """14 slices of whole cells, which may share cells, from pixel `first` to pixel `last`."""
    start = int(np.floor(first / 16 + 0.5))
    end = int(np.floor(last / 16 + 0.5))
    cells = max(end - start + 1, 1)
    edges = []
    for i in range(14):
        low = start + int(i * cells / 14)
        high = start + int(np.ceil((i + 1) * cells / 14))
        edges.append(slice(max(0, low), max(0, high)))
    return edges


def reference_pool(plane, box):
    """RoIPool by hand: the box in whole cells, cut into bins, and the largest value of each."""
    x1, y1, x2, y2 = box
    bins = np.zeros((14, 14))
    for i, rows in enumerate(bin_edges(y1, y2)):
        for j, columns in enumerate(bin_edges(x1, x2)):
            bins[i, j] = plane[rows, columns].max(initial=0)  # the map is never negative
    return bins


def test_regions_are_pooled_as_by_hand(detector, seen):
    pooled = detector.roi_heads.box_roi_pool({"0": seen}, [BOXES], [(96, 131)])
    assert pooled.shape == (4, 1024, 14, 14)
    for box, channels in zip(BOXES.tolist(), pooled):
        for channel in (0, 500, 1023):
            expected = reference_pool(seen[0, channel].numpy(), box)
            np.testing.assert_allclose(channels[channel], expected, rtol=1e-6)


@torch.no_grad()
def test_features_and_classes_are_those_of_the_published_network(detector, seen, published):
    """layer4 at stride 1 with dilation 2 in every block, the mean; the background is class 0."""
    pooled = detector.roi_heads.box_roi_pool({"0": seen}, [BOXES], None)
    bins = reference_stage(pooled, published, "roi_heads.res5", stride=1, dilation=2)
    features = bins.mean((2, 3))
    computed = detector.roi_heads.box_head(pooled)
    torch.testing.assert_close(computed, features, rtol=1e-3, atol=1e-4)
    logits = detector.roi_heads.box_predictor.cls_score(features)
    weight = published[f"{BOX}.cls_score.weight"]
    theirs = F.linear(features, weight, published[f"{BOX}.cls_score.bias"])
    torch.testing.assert_close(logits[:, 1:], theirs[:, :-1])
    torch.testing.assert_close(logits[:, 0], theirs[:, -1])


# --- Proposals and regions ------------------------------------------------------------------------


def reference_layer(x, weights, name, padding=0):
    """(channels, h, w): a layer of the RPN's head."""
    bias = weights[f"{RPN}.{name}.bias"]
    return F.conv2d(x, weights[f"{RPN}.{name}.weight"], bias, padding=padding)[0]


def reference_proposals(seen, weights, size):
    """All anchors decoded and clipped, best first, less what overlaps a better one by > .7."""
    hidden = reference_layer(seen, weights, "conv", padding=1).relu()[None]
    scores = reference_layer(hidden, weights, "objectness_logits")  # (12, h, w)
    scores = scores.permute(1, 2, 0).flatten()  # (h w 12,)
    deltas = reference_layer(hidden, weights, "anchor_deltas").unflatten(0, (12, 4))
    deltas = deltas.permute(2, 3, 0, 1)  # (h, w, 12, 4)
    _, _, h, w = seen.shape
    x = 16 * torch.arange(w)
    y = 16 * torch.arange(h)
    grid = torch.meshgrid(x, y, indexing="xy")
    cells = torch.stack(grid, dim=-1)[:, :, None]  # (h, w, 1, 2)
    anchors = published_anchors()
    sides = anchors[:, 2:] - anchors[:, :2]  # around their centres
    centre = cells + sides * deltas[..., :2]
    half = sides * deltas[..., 2:].exp() / 2
    boxes = torch.cat([centre - half, centre + half], dim=-1).reshape(-1, 4)
    height, width = size
    edges = torch.tensor([width, height, width, height])
    boxes = boxes.clamp(min=0).minimum(edges)
    sound = (boxes[:, :2] < boxes[:, 2:]).all(dim=1)
    boxes = boxes[sound]
    return boxes[nms(boxes, scores[sound], 0.7)][:40]


@torch.no_grad()
def test_proposals_are_the_best_anchors_moved_clipped_and_thinned_out(
        detector, prepared, seen, published):
    proposals, _ = detector.rpn(prepared, {"0": seen})
    expected = reference_proposals(seen, published, prepared.image_sizes[0])
    assert len(expected) == 40
    np.testing.assert_allclose(proposals[0], expected, atol=0.02)


@pytest.fixture(scope="module")
def found(detector):
    """The 36 best regions of the picture, of its 40 proposals."""
    return regions(detector, PICTURE, 36)[0]


def test_36_regions_are_kept_or_all_where_there_are_fewer(detector, found, monkeypatch):
    """Without regard to how sure the detector is."""
    boxes, features, probs = found
    assert boxes.shape == (36, 4)
    assert features.shape == (36, 2048)
    assert probs.shape == (36, 1601)
    assert boxes.min() >= 0
    assert (boxes <= [83.01, 61.01, 83.01, 61.01]).all()
    monkeypatch.setitem(detector.rpn._post_nms_top_n, "testing", 3)
    boxes, _, _ = regions(detector, PICTURE, 36)[0]
    assert len(boxes) == 3


def test_given_boxes_come_back_with_the_features_of_exactly_those_boxes(detector, found):
    """In lower precision, too: a feature then changes by less than 1 % of the largest one."""
    boxes, features, _ = found
    chosen = [7, 0, 20]
    same, again, _ = regions(detector, PICTURE, 36, boxes[chosen])[0]
    assert np.array_equal(same, boxes[chosen])
    np.testing.assert_allclose(again, features[chosen], rtol=1e-4, atol=1e-5)
    # A single box: without hardware for bf16, a processor takes long.
    _, half, _ = regions(detector, PICTURE, 36, boxes[[7]], "bf16")[0]
    difference = np.abs(half - again[:1]).max()
    assert 0 < difference < 0.01 * np.abs(again).max()
