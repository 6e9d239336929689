r"""extract_features.py: from pictures to a feature store
======================================================

Where this stands

    extract_features.py --writes--> feature store --read by--> data.py --batches--> train.py

A detector proposes boxes and computes a feature for each; the best ones are kept:

    picture (3, H, W) --backbone--> map (c, H/s, W/s) --RPN--> proposals (P, 4)
                                        |                          |
                                        +------RoI pooling <-------+
                                                    |  (P, c, 14, 14)
                                              head, mean over the bins
                                                    |
                     features (P, F) --linear--> class probabilities (P, C)
                                                    |  keep the R best
        feature store: boxes (R, 4), features (R, F) of every picture; the linear layer once

Letters: H, W height and width of a picture, s stride and c channels of the map, P proposals, R
regions kept, F region feature, C region classes (background is class 0), B pictures of a batch.

The paper uses 36 regions from a Faster R-CNN with a ResNet-101, trained on Visual Genome [supp. 2].
Its published weights run here, in torchvision.

Map of the file (* = read these first)

    1. Detectors             build_detector: "vg", "coco", "toy", and their weights
    2. Visual Genome         Anderson's Faster R-CNN, built from torchvision's parts
    3. Toy detector          a small one, trained from scratch on drawn scenes
    4. Regions             * which boxes of a picture are kept, and their features
    5. Pictures and boxes    what to extract: folders, lists, given boxes
    6. Extraction          * filling a store, from scenes or from pictures
    7. Command line          extract, show

    $ python extract_features.py images/ -o data/features --weights pytorch_model.bin
    data/features: 6 of 6 pictures to extract
    data/features: 6 of 6 pictures extracted

    $ python extract_features.py images/ -o data/refer/features-gt --boxes instances.json ...
    $ python extract_features.py show data/features images/391895.jpg -o regions.png

The first argument is a folder, a picture, or a text file with a path per line (optionally a tab and
an id). The same command continues an interrupted extraction.

ASSUMPTION A13 (which regions are the best 36) is in section 4. DEVIATION D1: the toy world's
detector is small and trained here. It keeps 1 to 8 regions, not 36: a scene has at most 6 things.
"""

import argparse
import glob
import hashlib
import math
import os
import sys
import time
from collections import OrderedDict, defaultdict
from pathlib import Path

# Operators that Apple's GPU lacks run on the CPU instead. torch reads this on import.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torchvision.models import detection, resnet
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, box_iou, roi_pool
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

from data import (COUNT, NATURAL, RANK, SCENE_PIXELS, TOY_CLASSES, BadInput, FeatureStore, Scene,
    WORLD_SIZE, canonical_id, flag, only_run_in, open_text, progress, read_json,
    reading, run, save_png, start_processes, write_whole)

# --- 1. Detectors ---------------------------------------------------------------------------------
#
# Three networks, each built from torchvision's parts: transform, backbone, rpn and roi_heads.
# Section 4 calls these parts one by one. The table DETECTORS is at the end of section 3.


def build_detector(name, weights=None, classes=None):
    """A detector for `regions`, in evaluation mode.

    name: "vg" (Visual Genome, ResNet-101 C4, C = 1601, F = 2048), "coco" (torchvision's published
    ResNet-50 FPN, C = 91, F = 1024) or "toy" (C = 49, F = 128). weights: for "vg" the file
    pytorch_model.bin of Hugging Face's unc-nlp/frcnn-vg-finetuned, for the others a state dict.
    Without a file "coco" downloads its own; the others stay random. classes: a file with one name
    per line, without background: the weights of "vg" come without names. Raises BadInput.

    `model.about` is what a store records of it: arguments of FeatureStore.create. They include the
    last layer: with it, a region's class probabilities follow from its feature.
    """
    if name not in DETECTORS:
        raise BadInput(f"detector {name!r}: expected {', '.join(DETECTORS)}")
    build, names, convert = DETECTORS[name]
    model = build().eval()
    if weights or name == "coco":
        load_weights(model, weights, name, convert)
    head = model.roi_heads.box_predictor.cls_score
    if classes:
        names = ["background", *read_class_names(classes)]
        if len(names) != head.out_features:
            raise BadInput(f"{classes}: found {len(names) - 1} names, not {head.out_features - 1}")
    model.confidence = 0.2 if name == "toy" else 0.0  # see select_regions
    model.about = dict(detector=name, class_names=list(names), feature_size=head.in_features,
        weights=Path(weights or "").name, weights_sha256=sha256(weights),
        class_head=[parameter.detach().numpy() for parameter in head.parameters()],
        box_format="x1 y1 x2 y2, pixels of the upright picture",
        versions={m.__name__: m.__version__ for m in (torch, torchvision, np)})
    return model


def read_class_names(path):
    """Names from a file with one per line, such as Visual Genome's objects_vocab.txt."""
    with reading(path, "a list of class names"), open_text(path) as file:
        return [line.strip() for line in file if line.strip()]


def load_weights(model, path, name, convert):
    """Load a file, or COCO's download; BadInput unless keys and shapes are the model's."""
    form = f"the weights of the {name} detector; --weights takes a file of them"
    with reading(path or COCO_WEIGHTS.url, form):
        if path:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        else:
            weights = COCO_WEIGHTS.get_state_dict(check_hash=True)
        try:
            model.load_state_dict(convert(weights))
        except RuntimeError as error:  # it lists the keys, one per line
            raise ValueError(" ".join(str(error).split())) from error


def sha256(path):
    """Hexadecimal SHA-256 of a file, or None if path is None."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None


COCO_WEIGHTS = detection.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1


def coco_detector():
    """torchvision's detector with random weights; 300 proposals, as in vg_detector."""
    return detection.fasterrcnn_resnet50_fpn_v2(weights_backbone=None, rpn_post_nms_top_n_test=300)


# --- 2. Visual Genome -----------------------------------------------------------------------------
#
# The detector of Anderson et al. [2018, the paper's reference 1], trained in Caffe on the 1,600
# object classes of Visual Genome; detectron2 and Hugging Face have ports of it. It is a Faster
# R-CNN from before feature pyramids, "C4": the first four blocks of a ResNet-101 map the picture
# once, (3, 600, 1000) -> (1024, 38, 63). The fifth block processes each of 300 proposals
# separately, (1024, 14, 14) -> (2048, 14, 14); the mean over the bins is the feature.
#
# torchvision has the parts, but with later defaults. Each difference below changes every feature;
# RoIAlign instead of RoIPool alone, by 40 %.


class VGTransform(nn.Module):
    """Pictures (3, H, W), RGB in [0, 1] -> the network's input: BGR in 0..255 minus the mean, the
    short side 600 pixels, or less if the long side would exceed 1000, rounded to whole pixels.
    """

    mean = (102.9801, 115.9465, 122.7717)  # blue, green, red
    min_size = 600
    max_size = 1000

    def forward(self, images):
        """(ImageList, None) of pictures of one size; torchvision returns targets second."""
        batch = torch.stack(images)  # (B, 3, H, W)
        sides = batch.shape[2:]
        # Two factors, as published: their product would round some halves the other way.
        scale = self.min_size / min(sides)
        shrink = min(1, self.max_size / (scale * max(sides)))
        sides = [max(1, int(scale * side * shrink + 0.5)) for side in sides]
        batch = 255 * batch.flip(1) - batch.new_tensor(self.mean)[:, None, None]
        batch = nn.functional.interpolate(batch, sides, mode="bilinear")
        return detection.image_list.ImageList(batch, [batch.shape[2:]] * len(batch)), None


class VGAnchors(detection.rpn.AnchorGenerator):
    """The 12 anchors (4 scales x 3 ratios) of every cell of the map, 16 pixels apart.

    They are loaded with the weights: ports differ by half a pixel and in the order of anchors, and
    the RPN's head identifies an anchor only by its index.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("cells", torch.zeros(12, 4))  # around the point (0, 0) of the picture

    def forward(self, images, maps):
        """For each image (12 h w, 4), row by row of its map of h x w cells."""
        self.cell_anchors = [self.cells]
        return self.grid_anchors([maps[0].shape[-2:]], [(16, 16)]) * len(images.tensors)


class C4RoIPool(nn.Module):
    """The maximum in each of 14 x 14 bins of a box: (P, 1024, 14, 14). RoIPool rounds bins to whole
    cells of the map; the later RoIAlign interpolates between cells.
    """

    def forward(self, maps, boxes, sizes):
        """maps {"0": (B, 1024, h, w)}, boxes B x (n, 4) in pixels of the prepared images."""
        return roi_pool(maps["0"], boxes, output_size=14, spatial_scale=1 / 16)


class Res5Head(nn.Module):
    """RoI maps (P, 1024, 14, 14) -> features (P, 2048): layer4, then the mean over 14 x 14 bins.

    In chunks of 32 proposals: activations for all 300 would take gigabytes.
    """

    def __init__(self, layer4):
        super().__init__()
        self.layer4 = layer4

    def forward(self, pooled):
        return torch.cat([self.layer4(part).mean(dim=(2, 3)) for part in pooled.split(32)])


def vg_detector():
    """Visual Genome's detector with random weights: Caffe's ResNet-101, split before layer4."""
    # layer4 keeps 14 x 14: dilation 2 instead of stride 2.
    net = resnet.resnet101(norm_layer=FrozenBatchNorm2d,
        replace_stride_with_dilation=[False, False, True])
    net.layer4[0].conv2.dilation = (2, 2)  # torchvision dilates only the blocks after the first
    net.layer4[0].conv2.padding = (2, 2)
    net.maxpool = nn.MaxPool2d(3, stride=2, padding=0, ceil_mode=True)  # Caffe's
    for layer in (net.layer2, net.layer3):  # Caffe's blocks stride in their first convolution
        layer[0].conv1.stride = (2, 2)
        layer[0].conv2.stride = (1, 1)
    backbone = nn.Sequential(OrderedDict(list(net.named_children())[:7]))  # conv1 to layer3
    head = detection.rpn.RPNHead(512, num_anchors=12)
    head.conv = nn.Sequential(nn.Conv2d(1024, 512, 3, padding=1), nn.ReLU())
    # The 6,000 best anchors -> NMS at IoU .7 -> 300 proposals. The other numbers serve training.
    rpn = detection.rpn.RegionProposalNetwork(VGAnchors(), head, 0.7, 0.3, 256, 0.5,
        pre_nms_top_n=dict(testing=6000), post_nms_top_n=dict(testing=300), nms_thresh=0.7)
    roi_heads = nn.ModuleDict(dict(box_roi_pool=C4RoIPool(), box_head=Res5Head(net.layer4),
        box_predictor=nn.ModuleDict(dict(cls_score=nn.Linear(2048, 1601)))))
    return detection.generalized_rcnn.GeneralizedRCNN(backbone, rpn, roi_heads, VGTransform())


# Hugging Face's names -> torchvision's, replaced in this order.
VG_NAMES = {"backbone.stem.": "backbone.", "res2.": "layer1.", "res3.": "layer2.",
    "res4.": "layer3.", "roi_heads.res5.": "roi_heads.box_head.layer4.", "conv1.norm.": "bn1.",
    "conv2.norm.": "bn2.", "conv3.norm.": "bn3.", "shortcut.norm.": "downsample.1.",
    "shortcut.": "downsample.0.", "proposal_generator.rpn_head.conv.": "rpn.head.conv.0.",
    "proposal_generator.rpn_head.objectness_logits.": "rpn.head.cls_logits.",
    "proposal_generator.rpn_head.anchor_deltas.": "rpn.head.bbox_pred.",
    "proposal_generator.anchor_generator.cell_anchors.0": "rpn.anchor_generator.cells"}
# Not needed here: the final box regression, the attribute head ("red", "wooden"), and entries that
# are no weights.
VG_UNUSED = ("box_predictor.bbox_pred.", "box_predictor.cls_embedding.", "box_predictor.fc_attr.",
    "box_predictor.attr_score.", "num_batches_tracked", "pixel_mean", "pixel_std")


def convert_vg_weights(published):
    """torchvision's state dict of the detector from Hugging Face's.

    Theirs has the background as class 1600, the last; here it is class 0.
    """
    converted = {}
    for name, value in published.items():
        if any(unused in name for unused in VG_UNUSED):
            continue
        for theirs, ours in VG_NAMES.items():
            name = name.replace(theirs, ours)
        if "cls_score" in name:
            value = value.roll(1, dims=0)  # (1601, ...)
        converted[name] = value
    return converted


# --- 3. Toy detector ------------------------------------------------------------------------------
#
# A Faster R-CNN of 300,000 weights for pictures of 128 x 128, so that the toy world needs no
# download. Trained in half a minute, it finds 99 % of the things in held-out scenes at IoU .5.

TOY_REGIONS = 8  # R: a scene has at most 6 things; two more allow for wrong detections


def residual_block(inputs, outputs):
    """A block of ResNet-18 at stride 2."""
    shortcut = nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs))
    return resnet.BasicBlock(inputs, outputs, 2, shortcut)


def toy_network():
    """The toy detector with random weights: stride 8, anchors of 20 and 36 pixels, F = 128."""
    backbone = nn.Sequential(OrderedDict(
        stem=nn.Conv2d(3, 32, 5, stride=2, padding=2, bias=False), norm=nn.BatchNorm2d(32),
        relu=nn.ReLU(), layer1=residual_block(32, 32), layer2=residual_block(32, 64)))
    backbone.out_channels = 64
    anchors = detection.rpn.AnchorGenerator(sizes=((20, 36),), aspect_ratios=((1.0,),))
    # One sample per bin instead of four, 5 x 5 bins instead of 7 x 7: faster, and no worse.
    pool = MultiScaleRoIAlign(["0"], output_size=5, sampling_ratio=1)
    # (P, 64, 5, 5) -> (P, 128): one more convolution, then the mean over its bins.
    box_head = nn.Sequential(nn.Conv2d(64, 128, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    predictor = detection.faster_rcnn.FastRCNNPredictor(128, len(TOY_CLASSES))
    return detection.FasterRCNN(backbone, rpn_anchor_generator=anchors, box_roi_pool=pool,
        box_head=box_head, box_predictor=predictor,
        min_size=SCENE_PIXELS, max_size=SCENE_PIXELS, rpn_nms_thresh=0.5,
        rpn_pre_nms_top_n_train=100, rpn_post_nms_top_n_train=40,
        rpn_pre_nms_top_n_test=100, rpn_post_nms_top_n_test=16,
        rpn_batch_size_per_image=64, box_batch_size_per_image=16)


def train_toy_detector(scenes, images, iterations=900, batch=8, lr=4e-3):
    """A toy detector trained from scratch on these scenes; images: uint8 (N, 3, 128, 128).

    BatchNorm is trained too: there are no pretrained statistics to freeze.
    """
    torch.manual_seed(0)
    # channels_last: the memory order that CPU convolutions prefer, a fifth faster here.
    model = build_detector("toy").train().to(memory_format=torch.channels_last)
    targets = [toy_targets(scene) for scene in scenes]
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, iterations, pct_start=0.1)
    epochs = math.ceil(iterations * batch / len(scenes))
    order = torch.cat([torch.randperm(len(scenes)) for _ in range(epochs)])[: iterations * batch]
    for chosen in progress(order.split(batch), "training the detector"):
        losses = model([images[i] / 255 for i in chosen], [targets[i] for i in chosen])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def toy_targets(scene):
    """The things of a scene as torchvision's targets: boxes (n, 4) in pixels and labels (n,)."""
    labels = [TOY_CLASSES.index(f"{t.colour} {t.shape}") for t in scene.things]
    boxes = torch.tensor([t.box for t in scene.things], dtype=torch.float32)
    return {"boxes": boxes, "labels": torch.tensor(labels)}


def draw_scenes(numbers):
    """The pictures of N scenes: uint8 (N, 3, 128, 128)."""
    return torch.stack([pil_to_tensor(Scene(n).draw()) for n in numbers])


def toy_detector(weights, numbers):
    """The toy detector in file `weights`, a Path; if there is none, trained on these scenes."""
    if not weights.exists():
        started = time.time()
        model = train_toy_detector([Scene(n) for n in numbers], draw_scenes(numbers))
        weights.parent.mkdir(parents=True, exist_ok=True)
        write_whole(weights, lambda file: torch.save(model.state_dict(), file), mode="wb")
        print(f"detector: trained in {time.time() - started:.0f} s", flush=True)
    return build_detector("toy", weights).to(memory_format=torch.channels_last)


# name: (function that builds it, class names if known, conversion of a file to its state dict)
DETECTORS = {
    "vg": (vg_detector, (), convert_vg_weights),
    "coco": (coco_detector, COCO_WEIGHTS.meta["categories"], dict),
    "toy": (toy_network, TOY_CLASSES, dict)}

# --- 4. Regions -----------------------------------------------------------------------------------
#
# The detector's parts, called one by one: its own output would be scores and boxes that are
# corrected after pooling, without the features.

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@torch.no_grad()
def regions(model, images, num_regions, boxes=None, precision="fp32"):
    """The best regions of B pictures: B x [boxes (n, 4), features (n, F), probs (n, C)], n <= R.

    images: float tensors (3, H, W) in [0, 1], all of one size: a smaller one would be padded, and
    its border of zeros would leak into nearby features. boxes: None, or for each picture the (n, 4)
    whose features are wanted; all are kept, in this order. precision: of the convolutions; bf16
    changes a feature by less than 1 % of the largest one, fp16 by less than .2 %.

    The results are numpy arrays, the best region first; boxes are x1, y1, x2, y2 in pixels of the
    picture. They are the proposals that were pooled: no box is corrected.
    """
    device = next(model.parameters()).device
    images = torch.stack(list(images)).to(device)  # (B, 3, H, W)
    with torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32"):
        prepared, _ = model.transform(list(images))
        maps = model.backbone(prepared.tensors)
        maps = {"0": maps} if torch.is_tensor(maps) else maps  # (B, c, H/s, W/s), one or several
        h, w = prepared.image_sizes[0]
        height, width = images.shape[2:]
        scale = torch.tensor([w / width, h / height] * 2, device=device)
        if boxes is None:
            # In bf16 a box would be rounded to 4 pixels, and might end outside of the picture.
            with torch.autocast(device.type, enabled=False):
                exact = {name: each.float() for name, each in maps.items()}
                proposals, _ = model.rpn(prepared, exact)  # B x (P, 4), in pixels of `prepared`
            places = [proposal / scale for proposal in proposals]
        else:
            places = [torch.as_tensor(given, device=device) for given in boxes]
            proposals = [place * scale for place in places]
        pooled = model.roi_heads.box_roi_pool(maps, proposals, prepared.image_sizes)
        features = model.roi_heads.box_head(pooled).float()  # (B P, F)
    probs = model.roi_heads.box_predictor.cls_score(features).softmax(dim=-1)  # (B P, C)
    counts = [len(place) for place in places]
    found = []
    for proposal, *values in zip(proposals, places, features.split(counts), probs.split(counts)):
        if boxes is None:
            kept = select_regions(proposal, values[2], num_regions, model.confidence)
            values = [value[kept] for value in values]
        found.append([value.cpu().numpy() for value in values])
    return found


def select_regions(boxes, probs, most, confidence=0.0):
    """Anderson's choice of regions: indices (n,), best first, n <= most. ASSUMPTION A13.

    Non-maximum suppression per foreground class: a proposal that overlaps a better one (IoU > .3)
    is struck from that class. A proposal then ranks by its best score among the classes where it
    survives. So of ten boxes around one red star only one ranks high, while a shirt and the man in
    it, two classes, both stay. confidence: lowest score to keep; the best region always stays.

    All classes are suppressed in one pass: step k takes the k-th best box of every class at once
    and, if it is still alive, strikes its rivals. (A rival that ranks higher was struck before, or
    it would have struck this box.) torchvision's batched_nms takes five times as long.
    """
    scores = probs[:, 1:]  # (P, C - 1), without the background
    rivals = (box_iou(boxes, boxes) > 0.3).fill_diagonal_(False)  # (P, P)
    alive = torch.ones_like(scores, dtype=torch.bool)
    for best in scores.argsort(dim=0, descending=True, stable=True):  # one box per class
        alive &= ~(rivals[:, best] & alive.gather(0, best[None]))
    rank, order = (scores * alive).amax(dim=1).sort(descending=True, stable=True)  # (P,)
    sure = int((rank >= confidence).sum())
    return order[: max(1, min(most, sure))]


def picture_regions(model, path, num_regions):
    """A picture file's (PIL image, boxes (n, 4), features (n, F), probs (n, C)), as numpy."""
    image = open_picture(path)
    return image, *regions(model, [pil_to_tensor(image) / 255], num_regions)[0]


# --- 5. Pictures and boxes ------------------------------------------------------------------------
#
# What to extract: a list of (image id, path). The id links a picture to its captions, and a store
# holds each id once. An unusable picture fails alone.

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def open_picture(path):
    """A PIL image, RGB and upright, from a file in grey, palette, CMYK, 16 bits or EXIF-rotated.

    Raises BadInput for a file that is no picture, is truncated, or has an aspect ratio above 30.
    """
    with reading(path, "a picture that can be read"):
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I"):  # 16 bits per pixel: `convert` would clip, not scale
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        image = image.convert("RGB")
    if max(image.size) > 30 * min(image.size):
        raise BadInput(f"{path}: a strip of {image.size} pixels, too thin for a detector")
    return image


def find_pictures(source):
    """[(image id, path)] of a folder (and all folders below it), a picture, or a list file.

    Hidden files, such as macOS's '._1.jpg', are left out; links are followed. A list has a path per
    line, relative to its own folder, and optionally a tab and an id; otherwise the id is the name.
    """
    source = Path(source)
    if source.is_dir():
        paths = [source / name for name in glob.glob("**/*", root_dir=source, recursive=True)]
        # Each file once, also where a link leads to its folder a second time.
        paths = sorted({(p.parent.resolve(), p.name): p for p in paths}.values())
        return [(canonical_id(p), p) for p in paths if p.suffix.lower() in SUFFIXES]
    if source.suffix.lower() in SUFFIXES:
        return [(canonical_id(source), source)]
    with reading(source, "a list with a path per line, and perhaps a tab and an id"):
        with open_text(source) as file:
            rows = [line.rstrip("\r\n").partition("\t") for line in file if line.strip()]
    return [(canonical_id(name or path), source.parent / path) for path, _, name in rows]


def read_boxes(path):
    """{image id: boxes (n, 4) float32, x1 y1 x2 y2 in pixels} of a JSON file.

    Detections like MAttNet's: a list of {image_id, box [x, y, w, h], score}; highest score first.
    COCO's and RefCOCO's instances.json: annotations with {image_id, bbox [x, y, w, h]}, in order.
    """
    content = read_json(path)
    boxes = defaultdict(list)
    with reading(path, "a file of boxes; expected a list of detections with image_id, box and "
            "score, or annotations with image_id and bbox") as at:
        records = content if isinstance(content, list) else content["annotations"]
        # A stable sort: without scores, boxes keep their order.
        surest = sorted(enumerate(records), key=lambda item: -item[1].get("score", 0))
        for at.entry, record in surest:
            x, y, w, h = record.get("box") or record["bbox"]
            if not math.hypot(x, y, w, h) < 1e6:  # also NaN: RoI pooling would index memory with it
                raise ValueError(f"a box of {[x, y, w, h]}")
            boxes[canonical_id(record["image_id"])].append([x, y, x + w, y + h])
    return {image_id: np.float32(each) for image_id, each in boxes.items()}


# --- 6. Extraction --------------------------------------------------------------------------------
#
# A store is filled row by row, so an interrupted extraction continues with the pending rows. The
# result is bit for bit that of an undisturbed one. Pitfall: a batch of another size adds in another
# order and rounds differently. Therefore scenes, all of one size, are always in the same batches of
# 16, even if some rows are already written, and pictures are extracted one by one.


def extract_scenes(model, numbers, folder):
    """A feature store of these scenes; continues an interrupted one."""
    writer = FeatureStore.create(folder, numbers, TOY_REGIONS, **model.about)
    starts = sorted({row - row % 16 for row in writer.pending()})
    for start in progress(starts, "extracting"):
        images = draw_scenes(numbers[start : start + 16])
        found = regions(model, images / 255, TOY_REGIONS)
        for row, (boxes, features, _) in enumerate(found, start):
            writer.write(row, features, boxes, (SCENE_PIXELS, SCENE_PIXELS))
    return writer.finish()


def prepare(args):
    """(model, writer, pictures, boxes) from the flags; the same in every process."""
    pictures = find_pictures(args.images)
    boxes = None
    most = 36
    if args.boxes:
        boxes = read_boxes(args.boxes)
        pictures = [p for p in pictures if p[0] in boxes]
        most = max(map(len, boxes.values()), default=0)
    if not pictures:
        raise BadInput(f"{args.images}: found no pictures, or none with an id of --boxes "
            f"{args.boxes}")
    model = build_detector(args.detector, args.weights, args.classes)
    writer = FeatureStore.create(args.out, [p[0] for p in pictures], args.regions or most,
        precision=args.precision, boxes=sha256(args.boxes), **model.about)
    return model, writer, pictures, boxes


def picture_or_error(path):
    """A picture uint8 (3, H, W), or the BadInput that it caused, from a loading process."""
    try:
        return pil_to_tensor(open_picture(path))
    except BadInput as error:
        return error


def extract_part(args, model, writer, pictures, boxes):
    """Extract this process's share of the pending pictures, one of --gpus, on its device.

    The share depends on the row number, not on the place among pending rows: a process that starts
    late sees fewer of those.
    """
    device = "mps" if torch.backends.mps.is_available() else "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{RANK}"
    model.to(device)
    most = writer.meta["num_regions"]
    rows = [row for row in writer.pending() if row % args.gpus == RANK]
    loader = torch.utils.data.DataLoader([pictures[row][1] for row in rows], batch_size=None,
        num_workers=args.workers, collate_fn=picture_or_error)
    images = progress(loader, "extracting")
    for image, row in zip(images, rows):
        try:
            if isinstance(image, BadInput):
                raise image
            given = boxes and [boxes[pictures[row][0]][:most]]
            places, features, _ = regions(model, [image / 255], most, given, args.precision)[0]
            writer.write(row, features, places, (image.shape[2], image.shape[1]))
        except BadInput as error:
            writer.fail(row, str(error))


def extract(args):
    """Fill a feature store with these pictures, or with those that an interrupted run left."""
    with only_run_in(args.out):
        model, writer, pictures, boxes = prepare(args)
        total = len(pictures)
        print(f"{args.out}: {len(writer.pending()):,} of {total:,} pictures to extract", flush=True)
        if args.gpus > 1:
            start_processes(args.gpus)
        else:
            extract_part(args, model, writer, pictures, boxes)
        extracted = int((writer.finish().counts > 0).sum())
    result = f"{args.out}: {extracted:,} of {total:,} pictures extracted"
    if extracted < total:
        result += f"; {args.out}/failed.txt lists the others; to try again, remove the store"
    if not extracted:
        raise BadInput(result)
    print(result)


# --- 7. Command line ------------------------------------------------------------------------------
#
# `show` draws a store's regions of one image: do boxes, names and picture fit together?


def show(folder, which):
    """A PIL image of an image's regions: boxes with class names and probabilities.

    which: a picture file whose name gives the id, or an id alone: then a scene is drawn again, and
    other boxes are shown on grey. Raises BadInput.
    """
    store = FeatureStore(folder)
    row = store.row(which)
    if row is None:
        raise BadInput(f"{folder}: has no features of an image {canonical_id(which)!r}")
    size = store[row]["size"]
    if Path(which).is_file():
        image = open_picture(which)
    elif store.detector == "toy" and "precision" not in store.meta:  # of extract_scenes
        image = Scene(int(store.ids[row])).draw(scale=4)  # smooth shapes, for people
    else:
        image = Image.new("RGB", size, "grey")
    names = dict(enumerate(store.class_names))
    best = store.best_classes(row)
    labels = best and [f"{names.get(c, f'class {c}')} {p:.2f}" for c, p in zip(*best)]
    return draw_regions(image, store[row]["boxes"], size, labels)


def draw_regions(image, boxes, size, labels=None):
    """A dimmed copy of a PIL image, its longer side 1000 pixels, with boxes (n, 4) and labels.

    size: (W, H) of the picture that the boxes refer to; the image may be scaled. torchvision's
    letters are ten pixels high: they are drawn at half size, then enlarged.
    """
    scale = 500 / max(size)
    image = image.resize([max(1, round(s * scale)) for s in size]).point(lambda value: value // 2)
    # 137 degrees around the colour wheel each time: neighbours never look alike.
    colours = [f"hsl({137 * i % 360}, 90%, 75%)" for i in range(len(boxes))]
    boxes = torch.from_numpy(boxes[::-1] * scale)  # the best comes last, on top
    labels = labels and labels[::-1]
    drawn = to_pil_image(draw_bounding_boxes(pil_to_tensor(image), boxes, labels, colours[::-1]))
    return drawn.resize([2 * s for s in drawn.size])


def parse_args(argv=None):
    """The settings of an extraction, or of `show`."""
    argv = sys.argv[1:] if argv is None else argv
    p = argparse.ArgumentParser(description="Extract the regions of pictures into a feature store; "
        "`show STORE ID -o regions.png` draws those of one image.")
    add = p.add_argument
    if argv[:1] == ["show"]:
        add("command")
        add("store", type=Path, help="a feature store")
        add("which", help="a picture file, or an image's id")
        add("-o", "--out", type=Path, default="regions.png", help="the picture to write")
        return p.parse_args(argv)
    add("images", help="folder, picture, or list file")
    add("-o", "--out", type=Path, required=True, help="the store to write")
    add("--detector", choices=DETECTORS, default="vg",
        help="default: vg; coco was trained on pictures that RefCOCO+ tests on")
    add("--weights", help="file with the detector's weights; coco can download its own")
    add("--classes", help="vg: file with class names, one per line, without background")
    add("--boxes", help="JSON file with the boxes whose features are wanted")
    flag(p, "--regions", COUNT, None, "maximum per picture (default: 36; with --boxes all)")
    flag(p, "--gpus", COUNT, 1, "processes, one per GPU, or on the CPU (default: 1)")
    flag(p, "--workers", NATURAL, 2, "processes per GPU that open pictures (default: 2)")
    add("--precision", choices=PRECISIONS, default="fp32")
    args = p.parse_args(argv)
    if args.weights is None and args.detector != "coco":
        p.error(f"--detector {args.detector} needs --weights FILE")
    return args


def main(argv=None):
    """Extract, show a store, or do one process's part of an extraction."""
    args = parse_args(argv)
    if "which" in args:
        save_png(args.out, show(args.store, args.which))
        print(args.out)
    elif WORLD_SIZE > 1:  # a process that `extract` started
        extract_part(args, *prepare(args))
    else:
        extract(args)


if __name__ == "__main__":
    run(main)
