r"""extract_features.py: from pictures to a feature store
======================================================

Where this stands

    extract_features.py --writes--> feature store --read by--> data.py --batches--> train.py

A detector proposes boxes, computes a feature for each of them, and the best ones are kept:

    picture (3, H, W) --backbone--> map (c, H/s, W/s) --RPN--> proposals (P, 4)
                                        |                          |
                                        +------RoI pooling <-------+
                                                    |  (P, c, 14, 14)
                                              head, mean over the bins
                                                    |
                     features (P, F) --linear--> class probabilities (P, C)
                                                    |  keep the R best
        feature store: boxes (R, 4), features (R, F) of every picture; the linear layer once

Letters: H, W height and width of a picture, s stride and c channels of the map, P proposals,
R regions kept, F region feature, C region classes (the background is class 0), B pictures of
a batch.

Map of the file (* = read these first)

    1. Detectors             build_detector: "vg" or "toy", and their weights
    2. Visual Genome         the paper's detector, rebuilt from torchvision's parts
    3. The toy detector      a small one, trained from scratch on drawn scenes
    4. Regions             * which boxes of a picture are kept, and their features
    5. Pictures and boxes    what is extracted: picture files, given boxes
    6. Extraction          * filling a store, from scenes or from pictures
    7. Machine room          empty stores, drawing, flags, command line

    $ python extract_features.py images/ -o data/features --weights pytorch_model.bin
    data/features: 6 of 6 pictures to extract
    data/features: 6 of 6 pictures extracted

    $ python extract_features.py images/ -o data/refer/features-gt --boxes instances.json ...
    $ python extract_features.py show data/features images/391895.jpg -o regions.png

The paper uses 36 regions of a Faster R-CNN with a ResNet-101, trained on Visual Genome
[supp. 2]. Which 36 it keeps is ASSUMPTION A13, in section 4. DEVIATION D1: the toy world has
a small detector, trained here. It keeps 1 to 8 regions: a scene has at most 6 things, and two
more allow for wrong detections.
"""

import argparse
import contextlib
import math
import re
import time
from collections import OrderedDict, defaultdict
from pathlib import Path

# Before torch: data.py sets a variable that torch reads on import.
from data import (COUNT, NATURAL, RANK, SCENE_PIXELS, TOY_CLASSES, BadInput,
    FeatureStore, Scene, WORLD_SIZE, canonical_id, device, encode_ids, files_below, flag,
    load_ahead, only_run_in, picture_names, progress, read_json, reading, run, save_png, say,
    say_found, start_processes, write_whole)

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import nn
from torchvision.models import detection, resnet
from torchvision.ops import (Conv2dNormActivation, FrozenBatchNorm2d, MultiScaleRoIAlign,
    box_iou, roi_pool)
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

# --- 1. Detectors ---------------------------------------------------------------------------
# Two networks, built from torchvision's parts. Section 3 ends with the table DETECTORS.

# Where to get a detector's weights. Messages that they are missing or wrong say so.
WEIGHTS_ADVICE = {"vg": "download pytorch_model.bin from "
    "https://huggingface.co/unc-nlp/frcnn-vg-finetuned and name it with --weights",
    "toy": "train.py writes them to runs/world/detector.pt, the file to name with --weights"}


def build_detector(name, weights=None, classes=None):
    """A detector for `regions`, in evaluation mode.

    name: "vg" (Visual Genome, ResNet-101 C4, C = 1601, F = 2048) or "toy" (C = 49, F = 128).
    weights: for "vg", pytorch_model.bin of Hugging Face's unc-nlp/frcnn-vg-finetuned; for
    "toy", a state dict; None leaves the weights random. classes: a file of class names, one
    per line, without the background.

    `model.about` goes into every store. It includes the last layer, so that the class
    probabilities of a region can be computed from its stored feature.
    """
    if name not in DETECTORS:
        raise BadInput(f"detector {name!r}: expected {', '.join(DETECTORS)}")
    build, class_names = DETECTORS[name]
    model = build().eval()
    if weights:
        # All keys and shapes must be the model's: a missing layer would stay random, and every
        # feature would be wrong.
        with reading(weights, f"the weights of the {name} detector; {WEIGHTS_ADVICE[name]}"):
            state = torch.load(weights, map_location="cpu", weights_only=True)
            if name == "vg":
                state = convert_vg_weights(state)
            model.load_state_dict(state)
    head = model.roi_heads.box_predictor.cls_score
    if classes:
        count = head.out_features - 1
        with reading(classes, f"{count} class names, one per line"):
            lines = Path(classes).read_text("utf-8-sig").strip().split("\n")
            if len(lines) != count:
                raise ValueError(f"found {len(lines)}")
        class_names = ["background"] + lines
    model.about = dict(detector=name, class_names=class_names,
        feature_size=head.in_features, weights=Path(weights or "").name,
        class_head=[parameter.detach().numpy() for parameter in head.parameters()])
    return model


# --- 2. Visual Genome -----------------------------------------------------------------------
# The detector of Anderson et al. [2018, the paper's reference 1], trained in Caffe on the
# 1,600 object classes of Visual Genome. The first four blocks of a ResNet-101 map the picture
# once, (3, 600, 1000) -> (1024, 38, 63). The fifth block processes each of 300 proposals,
# (1024, 14, 14) -> (2048, 14, 14), and the mean over the bins is the feature. torchvision has
# all the parts, but with later defaults. Each difference below changes every feature;
# RoIAlign instead of RoIPool would change it by 40 %.


class VGTransform(nn.Module):
    """RGB in [0, 1] becomes BGR in 0..255 minus its mean. The short side becomes 600 pixels,
    but the long one at most 1000.
    """

    min_size = 600
    max_size = 1000

    def forward(self, images):
        """(ImageList, None) of pictures of one size; torchvision returns targets second."""
        batch = torch.stack(images)  # (B, 3, H, W)
        sides = batch.shape[2:]
        # Two factors, as published: their product would round some halves the other way.
        enlarge = self.min_size / min(sides)
        shrink = min(1, self.max_size / (enlarge * max(sides)))
        resized = [max(1, int(enlarge * side * shrink + 0.5)) for side in sides]
        blue_green_red = batch.new_tensor([102.9801, 115.9465, 122.7717])
        batch = 255 * batch.flip(1) - blue_green_red[:, None, None]
        batch = nn.functional.interpolate(batch, resized, mode="bilinear")
        return detection.image_list.ImageList(batch, [resized] * len(batch)), None


class VGAnchors(detection.rpn.AnchorGenerator):
    """The 12 anchors (4 scales x 3 ratios) of every cell of the map, 16 pixels apart.

    `cells` (12, 4) are the anchors around the point (0, 0). They are loaded with the weights:
    ports differ in their order and by half a pixel, and the RPN's head knows an anchor only by
    its index.
    """

    def forward(self, images, maps):
        """For each image (12 h w, 4), row by row of its map of h x w cells."""
        self.cell_anchors = [self.cells]
        anchors = self.grid_anchors([maps[0].shape[-2:]], [(16, 16)])
        return anchors * len(images.tensors)


class C4RoIPool(nn.Module):
    """The maximum in each of 14 x 14 bins of a box, rounded to whole cells of the map."""

    def forward(self, maps, boxes, sizes):
        """(P, 1024, 14, 14) from maps {"0": (B, 1024, h, w)} and boxes B x (n, 4)."""
        return roi_pool(maps["0"], boxes, 14, spatial_scale=1 / 16)


class Res5Head(nn.ModuleDict):
    """Features (P, 2048): layer4, then the mean over the bins."""

    def forward(self, pooled):
        """pooled (P, 1024, 14, 14), 32 proposals at a time: 300 would take gigabytes."""
        chunks = pooled.split(32)
        return torch.cat([self.layer4(chunk).mean(dim=(2, 3)) for chunk in chunks])


def vg_detector():
    """Visual Genome's detector with random weights: Caffe's ResNet-101, split before layer4."""
    # layer4 keeps 14 x 14 bins: it dilates by 2 where it would have a stride of 2.
    net = resnet.resnet101(norm_layer=FrozenBatchNorm2d,
        replace_stride_with_dilation=[False, False, True])
    # torchvision dilates only the blocks after the first.
    net.layer4[0].conv2 = resnet.conv3x3(512, 512, dilation=2)
    net.maxpool = nn.MaxPool2d(3, stride=2, ceil_mode=True)  # as in Caffe
    for layer in (net.layer2, net.layer3):
        block = layer[0]
        block.conv1.stride = 2  # Caffe's blocks stride in their first convolution
        block.conv2.stride = 1
    backbone = nn.Sequential(OrderedDict(net.named_children()))[:7]  # conv1 to layer3
    backbone.out_channels = 1024
    anchors = VGAnchors()
    anchors.register_buffer("cells", torch.zeros(12, 4))
    # torchvision's RPN head has one width throughout; Caffe's goes from 1024 to 512.
    rpn_head = detection.rpn.RPNHead(512, num_anchors=12)
    rpn_head.conv = Conv2dNormActivation(1024, 512, norm_layer=None)
    # The 6,000 best anchors -> NMS at IoU .7 -> 300 proposals.
    model = detection.FasterRCNN(backbone, rpn_anchor_generator=anchors, rpn_head=rpn_head,
        rpn_pre_nms_top_n_test=6000, rpn_post_nms_top_n_test=300, box_score_thresh=0.0,
        box_head=Res5Head({"layer4": net.layer4}),
        box_predictor=nn.ModuleDict({"cls_score": nn.Linear(2048, 1601)}))
    model.transform = VGTransform()
    model.roi_heads.box_roi_pool = C4RoIPool()
    return model


# Hugging Face's names -> torchvision's, replaced in this order.
VG_NAMES = {"backbone.stem.": "backbone.", "res2.": "layer1.", "res3.": "layer2.",
    "res4.": "layer3.", "roi_heads.res5.": "roi_heads.box_head.layer4.",
    "conv1.norm.": "bn1.", "conv2.norm.": "bn2.", "conv3.norm.": "bn3.",
    "shortcut.norm.": "downsample.1.", "shortcut.": "downsample.0.",
    "proposal_generator.rpn_head.conv.": "rpn.head.conv.0.",
    "proposal_generator.rpn_head.objectness_logits.": "rpn.head.cls_logits.",
    "proposal_generator.rpn_head.anchor_deltas.": "rpn.head.bbox_pred.",
    "proposal_generator.anchor_generator.cell_anchors.0": "rpn.anchor_generator.cells"}


def convert_vg_weights(published):
    """torchvision's state dict from Hugging Face's, where the background is the last class."""
    converted = {}
    for name, value in published.items():
        # Not needed: the final box regression, attributes ("red", "wooden"), the pixels' mean.
        if re.search("bbox_pred|cls_embedding|fc_attr|attr_score|pixel_", name):
            continue
        for theirs, ours in VG_NAMES.items():
            name = name.replace(theirs, ours)
        if "cls_score" in name:
            value = value.roll(1, dims=0)  # (1601, ...): the background is now the first
        converted[name] = value
    return converted


# --- 3. The toy detector --------------------------------------------------------------------
# A Faster R-CNN of 300,000 weights for pictures of 128 x 128 pixels, so that the toy world
# needs no download. It trains in half a minute, and then finds 99 % of the things in held-out
# scenes at IoU .5.

TOY_REGIONS = 8  # R: a scene has at most 6 things; two more allow for wrong detections


def residual_block(inputs, outputs):
    """A block of ResNet-18 at stride 2."""
    shortcut = Conv2dNormActivation(inputs, outputs, 1, stride=2, activation_layer=None)
    return resnet.BasicBlock(inputs, outputs, 2, shortcut)


def toy_network():
    """The toy detector with random weights: stride 8, anchors of 20 and 36 pixels, F = 128."""
    stem, norm, relu = Conv2dNormActivation(3, 32, 5, stride=2)
    backbone = nn.Sequential(OrderedDict(stem=stem, norm=norm, relu=relu,
        layer1=residual_block(32, 32), layer2=residual_block(32, 64)))
    backbone.out_channels = 64
    anchors = detection.rpn.AnchorGenerator(sizes=((20, 36),), aspect_ratios=((1.0,),))
    # One sample per bin instead of four, 5 x 5 bins instead of 7 x 7: faster, no worse.
    roi_align = MultiScaleRoIAlign(["0"], output_size=5, sampling_ratio=1)
    # (P, 64, 5, 5) -> (P, 128): one more convolution, then the mean over its bins.
    box_head = Conv2dNormActivation(64, 128, stride=2)
    box_head.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    classifier = detection.faster_rcnn.FastRCNNPredictor(128, len(TOY_CLASSES))
    return detection.FasterRCNN(backbone, min_size=SCENE_PIXELS, max_size=SCENE_PIXELS,
        rpn_anchor_generator=anchors,
        box_roi_pool=roi_align, box_head=box_head, box_predictor=classifier,
        rpn_pre_nms_top_n_train=100, rpn_post_nms_top_n_train=40, rpn_nms_thresh=0.5,
        rpn_pre_nms_top_n_test=100, rpn_post_nms_top_n_test=16,
        rpn_batch_size_per_image=64, box_batch_size_per_image=16, box_score_thresh=0.2)


def train_toy_detector(numbers, iterations=900, batch=8):
    """Train a toy detector from scratch on these scenes; it is returned in training mode."""
    torch.manual_seed(0)
    # channels_last: the memory order that CPU convolutions prefer, a fifth faster here.
    model = toy_network().to(memory_format=torch.channels_last)
    images = draw_scenes(numbers)
    targets = [toy_targets(Scene(number)) for number in numbers]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, iterations, pct_start=0.1)
    epochs = math.ceil(iterations * batch / len(numbers))
    order = torch.cat([torch.randperm(len(numbers)) for _ in range(epochs)])
    batches = order.split(batch)[:iterations]
    for chosen in progress(batches, "training the detector"):
        pictures = list(images[chosen] / 255)  # 8 x (3, 128, 128)
        losses = model(pictures, [targets[i] for i in chosen])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()
    return model


def toy_targets(scene):
    """The things of a scene as torchvision's targets: boxes (n, 4) in pixels, labels (n,)."""
    boxes = [thing.box for thing in scene.things]
    labels = [TOY_CLASSES.index(thing.named("colour shape")) for thing in scene.things]
    return {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)}


def draw_scenes(numbers):
    """The pictures of N scenes: uint8 (N, 3, 128, 128)."""
    return torch.stack([pil_to_tensor(Scene(number).draw()) for number in numbers])


def toy_detector(weights, numbers):
    """The toy detector in the file `weights`, a Path. If there is no such file, a detector is
    trained on these scenes and written there.
    """
    if not weights.exists():
        started = time.time()
        model = train_toy_detector(numbers)
        write_whole(weights, lambda file: torch.save(model.state_dict(), file))
        say(f"detector: trained in {time.time() - started:.0f} s")
    return build_detector("toy", weights).to(memory_format=torch.channels_last)


# name: (function that builds the network, class names if they are known)
DETECTORS = {"vg": (vg_detector, ()), "toy": (toy_network, TOY_CLASSES)}

# --- 4. Regions -----------------------------------------------------------------------------
# The parts of the detector are called one by one: as a whole it returns no features, and it
# moves the boxes after their features have been computed.


@torch.no_grad()
def regions(model, images, num_regions, boxes=None, precision="fp32"):
    """The best regions of B pictures: B x [boxes (n, 4), features (n, F), probs (n, C)], with
    n <= R = num_regions, as numpy arrays, the best region first.

    images: float (B, 3, H, W) in [0, 1]. All have one size: if some were padded to the size of
    others, the zeros would leak into nearby features. boxes: None, or the boxes (n, 4) to pool,
    of a single picture; the first R are kept. precision: that of the convolutions; "bf16"
    changes a feature by less than 1 % of the largest one.

    Boxes are x1, y1, x2, y2 in pixels of the picture. They are those that were pooled: the
    detector's final correction is not applied.
    """
    images = images.to(next(model.parameters()).device)
    reduced = torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16")
    prepared, _ = model.transform(list(images))
    with reduced:
        feature_map = model.backbone(prepared.tensors)  # (B, c, H/s, W/s)
    # Boxes are computed in fp32: bf16 would round them to 4 pixels, even out of the picture.
    maps = {"0": feature_map.float()}
    _, _, height, width = images.shape
    prepared_height, prepared_width = prepared.image_sizes[0]
    scale = images.new_tensor([prepared_width / width, prepared_height / height] * 2)
    # The same boxes twice: proposals in pixels of `prepared`, picture_boxes in the picture's.
    if boxes is None:
        proposals, _ = model.rpn(prepared, maps)  # B x (P, 4)
        picture_boxes = [proposal / scale for proposal in proposals]
    else:
        picture_boxes = [images.new_tensor(boxes[:num_regions])]
        proposals = [picture_boxes[0] * scale]
    pooled = model.roi_heads.box_roi_pool(maps, proposals, prepared.image_sizes)
    with reduced:
        features = model.roi_heads.box_head(pooled).float()  # (B P, F)
    probs = model.roi_heads.box_predictor.cls_score(features).softmax(dim=-1)  # (B P, C)
    counts = [len(proposal) for proposal in proposals]
    found = zip(picture_boxes, features.split(counts), probs.split(counts))
    confidence = model.roi_heads.score_thresh
    results = []
    for proposal, values in zip(proposals, found):  # values: (P, 4), (P, F), (P, C)
        kept = slice(None)
        if boxes is None:
            kept = select_regions(proposal, values[2], num_regions, confidence)
        results.append([value[kept].cpu().numpy() for value in values])
    return results


def select_regions(boxes, probs, most, confidence):
    """Anderson's choice of regions: indices (n,), best first, n <= most. ASSUMPTION A13.

    boxes (P, 4), probs (P, C). Each foreground class has its own non-maximum suppression: a
    proposal that overlaps a better one (IoU > .3) is struck from that class. It then ranks by
    its best score among the classes in which it survives. So of ten boxes around one red star
    only one ranks high, while a shirt and the man who wears it, two classes, both stay.
    confidence: the lowest score to keep; the best region always stays.

    One loop serves all classes and is five times as fast as batched_nms: step k takes the
    k-th best box of every class and, if it is still alive, strikes its rivals.
    """
    scores = probs[:, 1:]  # (P, C - 1), without the background
    rivals = (box_iou(boxes, boxes) > 0.3).fill_diagonal_(False)  # (P, P)
    alive = torch.ones_like(scores, dtype=torch.bool)
    for best in scores.argsort(dim=0, descending=True, stable=True):  # one box per class
        strikes = alive.gather(0, best[None])  # (1, C - 1)
        alive &= ~(rivals[:, best] & strikes)
    rank, order = (scores * alive).amax(dim=1).sort(descending=True, stable=True)  # (P,)
    sure = rank >= confidence
    sure[:1] = True
    return order[sure][:most]


def picture_regions(model, path, num_regions):
    """A picture file's [PIL image, boxes (n, 4), features (n, F), probs (n, C)]."""
    image = open_picture(path)
    images = pil_to_tensor(image)[None] / 255  # (1, 3, H, W)
    return [image] + regions(model, images, num_regions)[0]


# --- 5. Pictures and boxes ------------------------------------------------------------------
# A picture's name is its id, which links it to its captions. If a picture cannot be used, it
# is recorded as failed, and the others go on.

# Cameras and editors leave notes of many megabytes in a PNG; Pillow would refuse the picture.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def open_picture(path):
    """A PIL image, RGB and upright, from a file in grey, palette, CMYK, EXIF-rotated, or with
    16 or 32 bits per pixel, integers or floats.
    """
    with reading(path, "a picture that can be read"):
        image = Image.open(path)
        image.load()  # a damaged picture fails here, but a second time it would open, partly blank
        # If its EXIF block is broken, the picture stays as it lies.
        with contextlib.suppress(Exception):
            image = ImageOps.exif_transpose(image)
        if "16" in image.mode:  # bits per pixel: `convert` would clip, not scale
            pixels = np.asarray(image) // 256
            image = Image.fromarray(np.uint8(pixels))
        elif image.mode in "IF":
            image = Image.fromarray(scale_pixels(np.asarray(image, float)))
        image = image.convert("RGB")
    if max(image.size) > 30 * min(image.size):
        raise BadInput(f"{path}: a strip of {image.size} pixels, too thin for a detector")
    return image


def scale_pixels(pixels):
    """uint8 pixels from 32-bit integers or floats. No file tells their range: it may be 0 to 1 or
    0 to 255, and resampling may overshoot it by 30 %. Otherwise the brightest pixel is white.
    """
    brightest = pixels.max()
    if not 0 <= pixels.min() <= brightest < np.inf:
        raise ValueError("pixels below 0, or not numbers")
    white = brightest
    if brightest <= 1.3:
        white = 1
    elif brightest <= 1.3 * 255:
        white = 255
    # uint8 rounds down. With 255.999, all 256 values have equal shares, and white is 255.
    return np.uint8((pixels / white).clip(max=1) * 255.999)


def read_boxes(path):
    """{image id: boxes (n, 4) float32, x1 y1 x2 y2 in pixels} of a JSON file.

    Detections like MAttNet's: a list of {image_id, box [x, y, w, h], score}; the boxes are
    sorted by score, the highest first. COCO's and RefCOCO's instances.json: annotations with
    {image_id, bbox}; they keep their order.
    """
    what = "detections (image_id, box, score) or annotations (image_id, bbox)"
    boxes = defaultdict(list)
    with reading(path, what) as at:
        content = read_json(path)
        if isinstance(content, list):
            content = {"annotations": content}
        name = picture_names(content)
        records = enumerate(content["annotations"])
        surest = sorted(records, key=lambda item: -item[1].get("score", 0))  # stable
        for at.entry, record in surest:
            x, y, w, h = record.get("box") or record["bbox"]
            # With a NaN, RoI pooling would read foreign memory. (A comparison with a NaN is
            # False.)
            if not math.hypot(x, y, w, h) < 1e6:
                raise ValueError(f"a box of {[x, y, w, h]}")
            image_id = canonical_id(name(record["image_id"]))
            boxes[image_id].append([x, y, x + w, y + h])
    return {image_id: np.float32(listed) for image_id, listed in boxes.items()}


def clip_boxes(boxes, size):
    """Boxes (n, 4) cut to a picture of size (W, H) where they leave it by more than a pixel;
    less is rounding. BadInput for a box that lies outside altogether.
    """
    if (boxes[:, :2] >= size).any() or (boxes[:, 2:] <= 0).any():
        raise BadInput(f"a box outside its picture of {size} pixels")
    inside = boxes.clip(0, size + size)  # x by W, y by H, twice
    return np.where(abs(boxes - inside) > 1, inside, boxes)


# --- 6. Extraction --------------------------------------------------------------------------
# A store is filled in blocks of 16 scenes, or picture by picture. An interrupted extraction
# goes on with the pending rows, and ends with the same bits.


def extract_scenes(model, numbers, folder):
    """A feature store of these scenes; an interrupted one is continued.

    Pitfall: a batch of another size rounds differently. So a block of 16 scenes is always
    computed whole, even if some of its rows have been written already.
    """
    writer = FeatureStore.create(folder, numbers, TOY_REGIONS, **model.about)
    blocks = sorted({row - row % 16 for row in writer.pending()})
    for first in progress(blocks, "extracting"):
        images = draw_scenes(numbers[first : first + 16]) / 255
        results = regions(model, images, TOY_REGIONS)
        for row, (boxes, features, _) in enumerate(results, first):
            writer.write(row, features, boxes, (SCENE_PIXELS, SCENE_PIXELS))
    return writer.finish()


def fill(writer, model, paths, boxes, args):
    """Extract this process's share of the pending pictures; --gpus processes share them.

    args: the settings. boxes: None, or {id: given boxes}. A process that starts late sees fewer
    pending rows, so the number of a row, not its place among those, decides who extracts it.
    """
    rows = [row for row in writer.pending() if row % args.gpus == RANK]
    loader = load_ahead(paths, [[row] for row in rows], load_picture, args.workers)
    most = writer.meta["num_regions"]
    for row, image in zip(rows, progress(loader, "extracting")):
        try:
            if isinstance(image, BadInput):
                raise image
            _, _, height, width = image.shape
            size = (width, height)
            given = None
            if boxes:
                given = clip_boxes(boxes[canonical_id(paths[row])], size)
            kept, features, _ = regions(model, image / 255, most, given, args.precision)[0]
            writer.write(row, features, kept, size)
        except BadInput as error:
            writer.fail(row, error)


def load_picture(paths):
    """The one picture of a batch, uint8 (1, 3, H, W), or the BadInput that it caused."""
    try:
        return pil_to_tensor(open_picture(paths[0]))[None]
    except BadInput as error:
        return error


def extract(args):
    """Fill a store with pictures, or with those that an interrupted run left.

    With --gpus, the first process starts others, which come here too, and completes the store.
    """
    if args.gpus < WORLD_SIZE:
        raise BadInput("start one process, without torchrun; --gpus N starts the others")
    if not args.weights:
        raise BadInput(f"--weights: the {args.detector} detector needs its weights; "
            f"{WEIGHTS_ADVICE[args.detector]}")
    if args.images.resolve().is_relative_to(args.out.resolve()):
        raise BadInput(f"--out {args.out}: the pictures are there; choose another folder")
    paths = files_below(args.images)
    if not paths:
        raise BadInput(f"{args.images}: expected a picture or a folder of pictures, found none")
    boxes = None
    most = 36
    if args.boxes:
        boxes = read_boxes(args.boxes)
        ids = encode_ids(boxes)
        known = encode_ids(paths)
        if WORLD_SIZE == 1:  # the processes of --gpus start after this check
            say_found(f"{args.boxes}: images", ids, np.isin(ids, known), args.images, known)
        wanted = [path for path in paths if canonical_id(path) in boxes]
        if WORLD_SIZE == 1 and len(wanted) < len(paths):
            say(f"left out: {len(paths) - len(wanted):,} pictures without boxes")
        paths = wanted
        most = max(len(boxes[canonical_id(path)]) for path in paths)
    model = build_detector(args.detector, args.weights, args.classes)
    with output_folder(args.out):
        writer = FeatureStore.create(args.out, paths, args.regions or most,
            precision=args.precision, boxes_file=args.boxes and args.boxes.name, **model.about)
        if WORLD_SIZE == 1:
            writer.retry()
            say(f"{args.out}: {len(writer.pending()):,} of {len(paths):,} pictures to extract")
        if args.gpus > WORLD_SIZE:
            start_processes(args.gpus)
        else:
            model.to(device())
            fill(writer, model, paths, boxes, args)
        if WORLD_SIZE == 1:
            report(writer.finish())


def report(store):
    """Say how many pictures a finished store has. BadInput, with one reason, if it has none."""
    extracted = (store.counts > 0).sum()
    result = f"{store.folder}: {extracted:,} of {len(store):,} pictures extracted"
    failed = store.folder / "failed.txt"
    if not extracted:
        reason = re.split("[\t\n]", failed.read_text("utf-8"))[1]
        raise BadInput(f"{result}; for example, {reason}")
    if extracted < len(store):
        result += f"; {failed} lists the others; the same command tries them again"
    say(result)


# --- 7. Machine room ------------------------------------------------------------------------


@contextlib.contextmanager
def output_folder(folder):
    """Lock the folder of a store during a block. A store that the block has begun, but into which
    no picture was extracted, is removed.
    """
    if WORLD_SIZE > 1:  # the first process, which has started this one, holds the lock
        yield
        return
    known = set(folder.glob("*"))
    with only_run_in(folder):
        try:
            yield
        finally:
            new = set(folder.glob("[!.]*")) - known
            counts = folder / "counts.npy"
            if counts in new and np.load(counts).max() < 1:
                for path in new:
                    with contextlib.suppress(OSError):  # Windows keeps files that are mapped
                        path.unlink()


def stored_picture(folder, which):
    """(store, row, PIL image) of an image in a feature store.

    which: a picture file whose name is the id; or an id alone: then a scene is drawn, and any
    other picture is grey.
    """
    store = FeatureStore(folder)
    row = store.row(which)
    if row is None:
        raise BadInput(f"{folder}: has no features of an image {canonical_id(which)!r}")
    image = Image.new("RGB", store[row]["size"], "grey")
    if Path(which).is_file():
        image = open_picture(which)
    elif store.meta["detector"] == "toy" and "precision" not in store.meta:
        # Only extract_scenes stores no precision.
        image = Scene(int(store.ids[row])).draw(scale=4)  # smooth shapes, for people
    return store, row, image


def draw_regions(folder, which):
    """A dimmed PIL image, its longer side 1000 pixels, with an image's boxes and classes: do
    boxes, names and picture fit together? folder, which: see stored_picture.
    """
    store, row, image = stored_picture(folder, which)
    record = store[row]
    # Letters are ten pixels high, so all is drawn at 500 pixels, then enlarged. The order is
    # reversed: the best region comes last, on top.
    dimmed = pil_to_tensor(ImageOps.contain(image, (500, 500))) // 2
    boxes = record["boxes"][::-1] * 500 / max(record["size"])
    labels = None
    if store.num_region_classes:
        names = store.class_names or [f"class {c}" for c in range(store.num_region_classes)]
        probs = store.class_probs(row)[::-1, 1:]  # without the background
        labels = [f"{names[1 + p.argmax()]} {p.max():.2f}" for p in probs]
    # 137 degrees around the colour wheel each time, the golden angle: neighbours never look
    # alike, however many boxes there are.
    colours = [f"hsl({137 * i % 360}, 90%, 75%)" for i in range(len(boxes))]
    drawn = draw_bounding_boxes(dimmed, torch.tensor(boxes), labels, colours[::-1])
    return ImageOps.scale(to_pil_image(drawn), 2)


def parse_args(argv):
    """The settings of an extraction, or of `show`."""
    parser = argparse.ArgumentParser(description="Extract the regions of pictures into a "
        "feature store; `show STORE ID -o regions.png` draws those of one image.")
    add = parser.add_argument
    if argv[:1] == ["show"]:
        add("command")
        add("store", help="a feature store")
        add("which", help="a picture file, or an image's id")
        add("-o", "--out", default="regions.png", help="the picture to write")
        return parser.parse_args(argv)
    add("images", type=Path, help="a picture, or a folder")
    add("-o", "--out", type=Path, required=True, help="the store to write")
    add("--detector", choices=DETECTORS, default="vg")
    add("--weights", help="file with the detector's weights (required)")
    add("--classes", help="vg: file with class names, one per line, without background")
    add("--boxes", type=Path, help="JSON file with the boxes whose features are wanted")
    flag(parser, "--regions", COUNT, "maximum per picture (default: 36; with --boxes all)")
    flag(parser, "--gpus", COUNT, "processes, one per GPU, or on the CPU (default: 1)", 1)
    flag(parser, "--workers", NATURAL, "processes per GPU that open pictures (default: 2)", 2)
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    return parser.parse_args(argv)


def main(argv):
    """Extract pictures, or show a store."""
    args = parse_args(argv)
    if "which" in args:
        save_png(args.out, draw_regions(args.store, args.which))
        print(args.out)
    else:
        extract(args)


if __name__ == "__main__":
    run(main)
