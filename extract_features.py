"""extract_features.py: from pictures to a feature store
======================================================

Where this stands

    picture (3, H, W) --backbone--> map (c, H/s, W/s) --RPN--> proposals (P, 4)
                                        |                          |
                                        +------RoI pooling <-------+
                                                    |  (P, c, 14, 14)
                                              head, mean over the bins
                                                    |
                     features (P, F) --linear--> class probabilities (P, C)
                                                    |  keep the R best
        feature store: boxes (R, 4), features (R, F) of every picture; the linear layer once

    P proposals, R regions kept, F region feature, C region classes (background is class 0)

Switch-BERT reads pictures as *regions*: boxes that a detector found, each with the mean of the
detector's features inside it. The paper uses 36 regions of a Faster R-CNN with a ResNet-101 that
was trained on Visual Genome [supp. 2]. Its published weights run here, in torchvision:

    python extract_features.py images/ -o data/features --detector vg --weights pytorch_model.bin
    python extract_features.py dataset_flickr30k.json -o data/features --weights pytorch_model.bin
    python extract_features.py images/ -o data/refer/features-gt --boxes instances.json ...
    python extract_features.py show data/features images/391895.jpg -o regions.png

    data/features: 6 of 6 pictures, 36 regions of 2048: up to 0.01 GB to write
    data/features: 6 pictures extracted, 0 failed

IMAGES is a folder, a picture, a text file with a path a line (and behind a tab an id), or a JSON
file of COCO or of Karpathy's splits. Whatever ends it, the same command goes on where it stopped.

Map of the file

    1. Detectors             build_detector: "vg", "coco", "toy", and their weights
    2. Visual Genome         Anderson's Faster R-CNN out of torchvision's parts
    3. The toy detector      a small one, and its training on drawn scenes from scratch
    4. Regions               which boxes of a picture are kept, and what is stored of them
    5. Pictures and boxes    what to extract: files, lists, published splits, given boxes
    6. Extraction            a store from pictures, by one process or several
    7. A store of scenes     what `train.py` calls when there is no other data
    8. Command line          extract, show

Departures from the paper: A13 (which regions are the best 36), D1.

DEVIATION D1: the toy world's detector is small and trained here; it keeps 8 regions, not 36, since
a scene has 6 things at most.
"""

import argparse
import hashlib
import math
import os
import sys
import time
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torchvision.models import resnet101
from torchvision.models.detection import (FasterRCNN, FasterRCNN_ResNet50_FPN_V2_Weights,
    fasterrcnn_resnet50_fpn_v2)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, box_iou, roi_pool
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from data import (HELD_OUT_SCENES, SCENE_PIXELS, TOY_CLASSES, BadInput, FeatureStore, Scene,
    canonical_id, expecting, open_text, read_class_names, read_json, write_whole)

# --- 1. Detectors ---------------------------------------------------------------------------------


def build_detector(name, weights=None, classes=None):
    """A torchvision detector that `regions` can read, in evaluation mode.

    name: "vg" (Visual Genome, ResNet-101 C4, C = 1601, F = 2048), "coco" (torchvision's published
    ResNet-50 FPN, C = 91, F = 1024) or "toy" (C = 49, F = 128). weights: for "vg" Hugging Face's
    unc-nlp/frcnn-vg-finetuned, its pytorch_model.bin; for the others a state dict by torch.save.
    Without a file "coco" downloads its own, and the others have random weights. classes: a file
    with the 1,600 names of "vg", one a line, which its weights do not hold. Raises BadInput.

    What a store says of the detector is its attribute `about`.
    """
    if name not in DETECTORS:
        raise BadInput(f"detector {name!r}: expected " + ", ".join(DETECTORS))
    build, names, convert = DETECTORS[name]
    model = build(published=True) if name == "coco" and weights is None else build()
    if classes:
        names = ["background", *read_class_names(classes)]
        expected = model.roi_heads.box_predictor.cls_score.out_features
        if len(names) != expected:
            raise BadInput(f"{classes}: expected {expected - 1} names, found {len(names) - 1}")
    if weights is not None:
        load_strictly(model, weights, name, convert)
    model.confidence = 0.2 if name == "toy" else None
    model.about = dict(detector=name, class_names=list(names),
        weights=Path(weights).name if weights else str(COCO_WEIGHTS) if name == "coco" else None,
        weights_sha256=sha256(weights) if weights else None)
    return model.eval()


def load_strictly(model, path, name, convert):
    """Load a state dict of which nothing may be missing, and nothing left over."""
    try:
        found = convert(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever torch's reader makes of a file that is something else
        raise BadInput(f"{path}: not the weights of the {name} detector "
            f"({(str(error) or repr(error)).splitlines()[0]})") from error
    expected = model.state_dict()
    for problem, keys in (("lacks", expected.keys() - found), ("also has", found.keys() - expected),
            ("has other shapes of", [k for k in expected.keys() & found.keys()
                if found[k].shape != expected[k].shape])):
        if keys:
            raise BadInput(f"{path}: not the weights of the {name} detector: it {problem} "
                + ", ".join(sorted(keys)[:3]) + f" ({len(keys)} in all)")
    model.load_state_dict(found)


def sha256(path):
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


COCO_WEIGHTS = FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1


def _coco_detector(published=False):
    return fasterrcnn_resnet50_fpn_v2(weights=COCO_WEIGHTS if published else None,
        weights_backbone=None, rpn_post_nms_top_n_test=300)


# --- 2. Visual Genome -----------------------------------------------------------------------------
#
# The detector of Anderson et al. [2018, the paper's reference 1], trained in Caffe on the 1,600
# object classes of Visual Genome; detectron2 and Hugging Face have ports of it. It is a Faster
# R-CNN from before feature pyramids, "C4": the first four blocks of a ResNet-101 see the picture
# once, at stride 16, and the fifth sees every proposal by itself:
#
#     picture (3, 600, 1000)  BGR 0..255 minus its mean
#         conv1, layer1-3 --> map (1024, 38, 63)
#                                 |-- RPN: 12 anchors a cell --> 300 proposals
#                                 +-- RoIPool --> (300, 1024, 14, 14)
#                                                     layer4 --> (300, 2048, 14, 14)
#                                                     mean   --> features (300, 2048)
#
# torchvision has the parts, but its defaults are of another time. Each difference below changes
# every feature; RoIAlign in place of RoIPool alone, by 40 %.


class VGTransform(nn.Module):
    """Pictures (3, H, W) in [0, 1], RGB -> what the network was trained on: BGR in 0..255 minus the
    mean, the short side 600 pixels, the long side at most 1000.

    Sides are rounded to the nearest pixel (torchvision's own transform cuts off), and nothing is
    padded: the zeros of a padded border would leak into the features next to it.
    """

    mean = (102.9801, 115.9465, 122.7717)  # blue, green, red
    min_size, max_size = 600, 1000

    def forward(self, images, targets=None):
        """(ImageList, targets); several images must come out in one size."""
        prepared = []
        for image in images:
            short = min(image.shape[1:])
            size = [self.min_size / short * side if side > short else self.min_size
                for side in image.shape[1:]]
            shrink = min(1, self.max_size / max(size))
            size = [max(1, int(side * shrink + 0.5)) for side in size]
            image = 255 * image.flip(0) - image.new_tensor(self.mean)[:, None, None]
            prepared.append(nn.functional.interpolate(
                image[None], size, mode="bilinear", align_corners=False)[0])
        return ImageList(torch.stack(prepared), [p.shape[1:] for p in prepared]), targets


class VGAnchors(nn.Module):
    """The 12 anchors (4 scales x 3 ratios) of every cell of the map, 16 pixels apart.

    They come with the weights: the ports disagree about half a pixel and about their order, and a
    head knows its anchors only by their number.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("cells", torch.zeros(12, 4))  # around the point (0, 0) of the picture

    def forward(self, images, maps):
        """For each image (H W 12, 4), row by row of the map."""
        y, x = (16 * torch.arange(n, device=self.cells.device) for n in maps[0].shape[-2:])
        y, x = torch.meshgrid(y, x, indexing="ij")  # (H, W)
        shift = torch.stack([x, y, x, y], dim=-1).view(-1, 1, 4)  # (H W, 1, 4)
        anchors = (shift + self.cells).view(-1, 4)  # (H W 12, 4)
        return [anchors] * len(images.tensors)


class C4RoIPool(nn.Module):
    """(P, 1024, 14, 14): the maximum in each of 14 x 14 bins of a box. RoIPool rounds bins to whole
    cells of the map; RoIAlign, which came later, interpolates between them.
    """

    def forward(self, maps, boxes, sizes):
        """maps {"0": (B, 1024, H, W)}, boxes B x (n, 4) in pixels of the prepared images."""
        return roi_pool(maps["0"], boxes, output_size=14, spatial_scale=1 / 16)


class Res5Head(nn.Module):
    """RoI maps (P, 1024, 14, 14) -> features (P, 2048): layer4 and the mean over its 14 x 14.

    In chunks of 32 proposals: what lies between the layers would take gigabytes for all 300.
    """

    chunk = 32

    def __init__(self, layer4):
        super().__init__()
        self.layer4 = layer4

    def forward(self, pooled):
        """(P, 2048)"""
        parts = [self.layer4(part).mean(dim=(2, 3)) for part in pooled.split(self.chunk)]
        return torch.cat(parts)


class Predictor(nn.Module):
    """Region feature (P, F) -> class logits (P, C) and a box correction for each class (P, 4 C)."""

    def __init__(self, feature_size, num_classes):
        super().__init__()
        self.cls_score = nn.Linear(feature_size, num_classes)
        self.bbox_pred = nn.Linear(feature_size, 4 * num_classes)

    def forward(self, x):
        """Both, as a tuple."""
        return self.cls_score(x), self.bbox_pred(x)


def _vg_detector():
    # layer4 keeps its 14 x 14: stride 1, and dilation 2 in its place.
    net = resnet101(norm_layer=FrozenBatchNorm2d,
        replace_stride_with_dilation=[False, False, True])
    net.layer4[0].conv2.dilation = net.layer4[0].conv2.padding = (2, 2)  # torchvision: only 1 and 2
    net.maxpool = nn.MaxPool2d(3, stride=2, padding=0, ceil_mode=True)  # Caffe's
    for layer in (net.layer2, net.layer3):  # Caffe's blocks stride in their first convolution
        layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    backbone = nn.Sequential(OrderedDict((name, getattr(net, name)) for name in
        ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")))
    head = RPNHead(1024, num_anchors=12)
    head.conv = nn.Sequential(nn.Conv2d(1024, 512, 3, padding=1), nn.ReLU())
    head.cls_logits, head.bbox_pred = nn.Conv2d(512, 12, 1), nn.Conv2d(512, 48, 1)
    # 6,000 best anchors -> NMS .7 -> 300 proposals. What only training uses is torchvision's.
    rpn = RegionProposalNetwork(VGAnchors(), head, 0.7, 0.3, 256, 0.5,
        pre_nms_top_n=dict(training=12000, testing=6000),
        post_nms_top_n=dict(training=2000, testing=300), nms_thresh=0.7)
    roi_heads = RoIHeads(C4RoIPool(), Res5Head(net.layer4), Predictor(2048, 1601), 0.5, 0.5, 512,
        0.25, bbox_reg_weights=None, score_thresh=0.05, nms_thresh=0.5, detections_per_img=100)
    return GeneralizedRCNN(backbone, rpn, roi_heads, VGTransform())


# Hugging Face's names -> torchvision's, replaced one after the other.
VG_NAMES = {"backbone.stem.conv1.norm.": "backbone.bn1.", "backbone.stem.": "backbone.",
    "res2.": "layer1.", "res3.": "layer2.", "res4.": "layer3.", "roi_heads.res5.":
    "roi_heads.box_head.layer4.", "conv1.norm.": "bn1.", "conv2.norm.": "bn2.",
    "conv3.norm.": "bn3.", "shortcut.norm.": "downsample.1.", "shortcut.": "downsample.0.",
    "proposal_generator.rpn_head.conv.": "rpn.head.conv.0.",
    "proposal_generator.rpn_head.objectness_logits.": "rpn.head.cls_logits.",
    "proposal_generator.rpn_head.anchor_deltas.": "rpn.head.bbox_pred.",
    "proposal_generator.anchor_generator.cell_anchors.0": "rpn.anchor_generator.cells"}
# The attribute head ("red", "wooden"), which nothing here reads, and what is no weight.
VG_UNUSED = ("num_batches_tracked", "pixel_mean", "pixel_std", "box_predictor.cls_embedding.",
    "box_predictor.fc_attr.", "box_predictor.attr_score.")


def convert_vg_weights(published):
    """torchvision's state dict of the detector from Hugging Face's.

    There the background is class 1600, the last; here it is class 0. The background has no box
    correction there, and one of zeros here.
    """
    converted = {}
    for name, value in published.items():
        if any(unused in name for unused in VG_UNUSED):
            continue
        for theirs, ours in VG_NAMES.items():
            name = name.replace(theirs, ours)
        if "box_predictor.cls_score" in name:
            value = value.roll(1, dims=0)  # (1601, ...)
        elif "box_predictor.bbox_pred" in name:
            value = torch.cat([torch.zeros_like(value[:4]), value])  # (4 * 1601, ...)
        converted[name] = value
    return converted


# --- 3. The toy detector --------------------------------------------------------------------------


def _block(inputs, outputs, stride):
    shortcut = nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride, shortcut)


class MeanPoolHead(nn.Sequential):
    """RoI map (P, c, 7, 7) -> the region feature (P, F): one more convolution, and its mean."""

    def __init__(self, inputs, outputs):
        super().__init__(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(outputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _toy_detector(feature_size=128):
    backbone = nn.Sequential(
        OrderedDict(stem=nn.Conv2d(3, 32, 5, stride=2, padding=2, bias=False),
            norm=nn.BatchNorm2d(32), relu=nn.ReLU(), layer1=_block(32, 32, stride=2),
            layer2=_block(32, 64, stride=2))
    )  # stride 8 in all
    backbone.out_channels = 64
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(sizes=((20, 36),), aspect_ratios=((1.0,),)),
        # sampling_ratio 1: one point a bin instead of four. At 16-pixel things it loses nothing,
        # and the backward pass of RoIAlign, 38 % of a step at ratio 2, becomes small.
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=7, sampling_ratio=1),
        box_head=MeanPoolHead(64, feature_size),
        box_predictor=Predictor(feature_size, len(TOY_CLASSES)),
        min_size=SCENE_PIXELS,
        max_size=SCENE_PIXELS,
        rpn_nms_thresh=0.5,
        rpn_pre_nms_top_n_train=100,
        rpn_post_nms_top_n_train=40,
        rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_test=16,
        rpn_batch_size_per_image=64,
        box_batch_size_per_image=16,
    )


def train_toy_detector(scenes, images, iterations=900, batch=8, lr=4e-3, seed=0):
    """A toy detector trained from random weights on these scenes; images: uint8 (N, 3, 128, 128).

    BatchNorm stays in training mode, which a batch of 8 pictures of 128 x 128 is enough for: the
    pictures are all alike. (Detectors usually freeze it, having pretrained weights to freeze.)
    """
    torch.manual_seed(seed)
    # channels_last: the order in memory that CPU convolutions want, a fifth faster here.
    model = build_detector("toy").train().to(memory_format=torch.channels_last)
    targets = [toy_targets(scene) for scene in scenes]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=iterations, pct_start=0.1)
    epochs = math.ceil(iterations * batch / len(scenes))
    order = torch.cat([torch.randperm(len(scenes)) for _ in range(epochs)])[: iterations * batch]
    for chosen in tqdm(order.split(batch), desc="training the detector", leave=False, disable=None):
        losses = model([images[i] / 255 for i in chosen], [targets[i] for i in chosen])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def toy_targets(scene):
    """torchvision's form of what is in a scene: boxes (n, 4) in pixels and labels (n,)."""
    labels = [TOY_CLASSES.index(f"{t['colour']} {t['shape']}") for t in scene.things]
    return {"boxes": torch.tensor([t.box for t in scene.things], dtype=torch.float32),
        "labels": torch.tensor(labels)}


# name: (the model, its class names where they are known, what makes its state dict of a file's)
DETECTORS = {
    "vg": (_vg_detector, (), convert_vg_weights),
    "coco": (_coco_detector, ("background", *COCO_WEIGHTS.meta["categories"][1:]), dict),
    "toy": (_toy_detector, TOY_CLASSES, dict)}

# --- 4. Regions -----------------------------------------------------------------------------------

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@torch.no_grad()
def regions(model, images, num_regions, boxes=None, precision="fp32"):
    """The best regions of some pictures: a list of (boxes (n, 4), features (n, F), probs (n, C)),
    n <= R.

    images: float tensors (3, H, W) in [0, 1]. boxes: None, or for each picture the (n, 4) whose
    features are wanted, all of them and in this order. Boxes are x1, y1, x2, y2 in the pictures'
    own pixels, best first. A feature is that of the proposal: no box is corrected after pooling.

    precision: of the convolutions. Of given boxes bf16 changes a feature by less than 1 % of the
    largest one, fp16 by less than .2 %. Give one picture at a time if they differ in size: a batch
    is padded, and a border of zeros leaks into the features beside it.
    """
    weight = model.roi_heads.box_predictor.cls_score.weight
    device = weight.device
    with torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32"):
        prepared, _ = model.transform([image.to(device) for image in images])
        maps = model.backbone(prepared.tensors)
        maps = {"0": maps} if torch.is_tensor(maps) else maps  # (B, c, H/s, W/s), one or several
        scales = [torch.tensor([w / image.shape[2], h / image.shape[1]] * 2, device=device)
            for image, (h, w) in zip(images, prepared.image_sizes)]
        if boxes is None:
            proposals, _ = model.rpn(prepared, maps)  # B x (P, 4)
        else:
            proposals = [b.to(device) * scale for b, scale in zip(boxes, scales)]
        pooled = model.roi_heads.box_roi_pool(maps, proposals, prepared.image_sizes)
        features = model.roi_heads.box_head(pooled).to(weight.dtype)  # (B P, F)
    probs = model.roi_heads.box_predictor(features)[0].softmax(dim=-1)  # (B P, C)
    counts, found = [len(p) for p in proposals], []
    for i, (p, f, q) in enumerate(zip(proposals, features.split(counts), probs.split(counts))):
        if boxes is None:
            kept = select_regions(p, q, num_regions, model.confidence)
            found.append((p[kept] / scales[i], f[kept], q[kept]))
        else:
            found.append((boxes[i].to(device), f, q))
    return found


def select_regions(boxes, probs, most, confidence=None, overlap=0.3):
    """Anderson's choice of regions: indices (n,), best first, n <= most. ASSUMPTION A13.

    In every foreground class the proposals compete: one that overlaps a better one (IoU > .3) is
    struck from that class. A proposal then ranks by its best class in which it survived. So of ten
    boxes around one red star only one ranks high, while a shirt and the man in it, two classes,
    both stay. confidence: keep only those that rank above it, one at least.
    """
    rank = surviving_scores(boxes, probs[:, 1:], overlap).amax(dim=1)  # (P,)
    rank, order = rank.sort(descending=True, stable=True)
    if confidence is not None:
        most = min(most, max(1, int((rank > confidence).sum())))
    return order[:most]


def surviving_scores(boxes, scores, overlap):
    """(P, C) scores, but 0 where a better box of the same class overlaps with IoU > overlap.

    Non-maximum suppression of all classes in one pass: its k-th step looks at the k-th best box of
    every class at once, and if that is still alive, strikes its rivals. (A rival that ranks higher
    was struck before, or it would have struck this box.) torchvision's batched_nms, which gets
    300 x 1,600 boxes here, takes five times as long.
    """
    rivals = (box_iou(boxes, boxes) > overlap).fill_diagonal_(False)  # (P, P)
    alive = torch.ones_like(scores, dtype=torch.bool)
    for best in scores.argsort(dim=0, descending=True, stable=True):  # (C,), one box a class
        alive &= ~(rivals[:, best] & alive.gather(0, best[None]))
    return scores * alive


def picture_regions(model, path, num_regions):
    """A picture file's (PIL image, boxes (n, 4), features (n, F), probs (n, C)), as numpy."""
    image = open_picture(path)
    found = regions(model, [pil_to_tensor(image) / 255], num_regions)[0]
    return image, *(values.cpu().numpy() for values in found)


# --- 5. Pictures and boxes ------------------------------------------------------------------------

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def open_picture(path):
    """A PIL image in RGB, upright, whatever the file holds: grey, palette, CMYK, 16 bits. Raises
    BadInput for what is no picture, or is cut off.
    """
    try:
        image = Image.open(path)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel: `convert` would clip instead of scale
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        image = image.convert("RGB")
    except Exception as error:  # Pillow's readers raise whatever they stumble over
        raise BadInput(f"{path}: cannot be read as a picture ({error})") from error
    if max(image.size) > 30 * min(image.size):
        raise BadInput(f"{path}: a strip of {image.width} x {image.height} pixels, of which a "
            "detector would see nothing")
    return image


def find_pictures(source, split=None):
    """[(image id, path)] of a folder (recursive), a picture, a list file or a published JSON file.

    A list has a path a line, and behind a tab an id if it is not the file's name. A JSON file is
    COCO's (captions, instances, image info) or Karpathy's, of which `split` may name one; its
    pictures are looked for by name in its folder and below. Paths of pictures that are not there
    are in the list as well: they are reported as failed.
    """
    source = Path(source)
    if split and source.suffix.lower() != ".json":
        raise BadInput(f"{source}: --split {split}: only JSON files have splits")
    if source.is_dir():
        files = _files_below(source)
        pictures = [(canonical_id(p.name), p) for p in files if p.suffix.lower() in SUFFIXES]
        if len(files) > len(pictures):
            print(f"{source}: {len(files) - len(pictures)} files are no pictures by their names")
    elif source.suffix.lower() == ".json":
        pictures = _published_pictures(source, split)
    elif source.suffix.lower() in SUFFIXES:
        pictures = [(canonical_id(source.name), source)]
    else:
        with open_text(source) as file:
            rows = [line.rstrip("\r\n").split("\t") for line in file if line.strip()]
        strange = next((row for row in rows if len(row) > 2 or "" in row), None)
        if strange:
            raise BadInput(f"{source}: expected a path a line, and behind a tab an id, found "
                f"{strange!r:.80}")
        pictures = [(canonical_id(row[-1]), source.parent / row[0]) for row in rows]
    if not pictures:
        raise BadInput(f"{source}: no pictures here; expected {', '.join(SUFFIXES)}")
    (image_id, n), = Counter(i for i, _ in pictures).most_common(1)
    if n > 1:
        twice = " and ".join(str(p) for i, p in pictures if i == image_id)
        raise BadInput(f"{source}: {twice} have the same id, {image_id}; give a list file with a "
            "path and an id a line, a tab between them")
    return pictures


def _files_below(folder):
    # Through links to other folders as well, which Path.rglob does not follow.
    return sorted(Path(at) / name for at, _, names in os.walk(folder, followlinks=True)
        for name in names)


def _published_pictures(source, split):
    there, pictures, splits = defaultdict(list), [], set()
    for path in _files_below(source.parent):
        there[path.name].append(path)
    images = read_json(source, dict).get("images")
    for number, image in enumerate(images if isinstance(images, list) else []):
        with expecting("file_name (COCO) or filename (Karpathy's splits)", source, "image", number):
            name = image["file_name"] if "file_name" in image else image["filename"]
            # Captions, questions and boxes go by COCO's ids, whatever its files are called.
            image_id = canonical_id(image.get("cocoid", image.get("id", name)))
            part = "train" if image.get("split") == "restval" else image.get("split")
            direct = source.parent / image.get("filepath", "") / name
        splits.add(part)
        found = [direct] if direct.is_file() else there[direct.name]
        found = [p for p in found if p.parts[-2] == image.get("filepath", p.parts[-2])] or found
        if len(found) > 1:
            raise BadInput(f"{source}: image {number}: {found[0]} or {found[1]}? give a list file "
                "with a path and an id a line, a tab between them")
        if split in (None, part):
            pictures.append((image_id, found[0] if found else direct))
    if splits and not pictures:
        raise BadInput(f"{source}: --split {split}: found {', '.join(sorted(map(str, splits)))}")
    return pictures


def read_boxes(path):
    """({image id: (n, 4) float32, x1 y1 x2 y2 in pixels}, whether they were detected) of a JSON
    file.

    Three forms, told apart by what is in them: MAttNet's detections, a list with box [x, y, w, h],
    image_id and score: the best first; annotations with bbox [x, y, w, h], as COCO's and RefCOCO's
    instances.json; or one's own, {"391895": [[x1, y1, x2, y2], ...]}.
    """
    content, boxes = read_json(path), {}
    detected = isinstance(content, list)
    with expecting("detections with image_id, box and score, annotations with image_id and bbox, "
            'or {"id": [[x1, y1, x2, y2]]}', path, "one of its", f"{len(content)} entries"):
        if detected:
            content = sorted(content, key=lambda d: -d["score"])  # stable: ties as in the file
            rows = [(d["image_id"], d["box"]) for d in content]
        elif "annotations" in content:
            rows = [(a["image_id"], a["bbox"]) for a in content["annotations"]]
        else:
            rows = [(i, [x, y, x2 - x, y2 - y]) for i, each in content.items()
                for x, y, x2, y2 in each]
        for image_id, box in rows:
            x, y, w, h = map(float, box)
            if not math.isfinite(x + y + w + h):
                raise ValueError(f"image {image_id}: {box}")
            boxes.setdefault(canonical_id(image_id), []).append([x, y, x + w, y + h])
    return {i: np.array(each, np.float32) for i, each in boxes.items()}, detected


class PictureFiles(torch.utils.data.Dataset):
    """The pictures of some rows, opened in loading processes: (row, uint8 (3, H, W) or a reason)"""

    def __init__(self, rows, pictures):
        self.rows, self.pictures = rows, pictures

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        try:
            return row, pil_to_tensor(open_picture(self.pictures[row][1]))
        except BadInput as error:
            return row, str(error)


# --- 6. Extraction --------------------------------------------------------------------------------


def extract(args):
    """A feature store of all these pictures, from the flags; goes on where it was stopped."""
    available = torch.cuda.device_count()
    if available and args.gpus > available:
        raise BadInput(f"--gpus {args.gpus}: this machine has {available}")
    pictures = find_pictures(args.images, args.split)
    given, detected = read_boxes(args.boxes) if args.boxes else ({}, True)
    if args.boxes:
        without = len(pictures) - len(pictures := [p for p in pictures if p[0] in given])
        if not pictures:
            raise BadInput(f"{args.boxes}: boxes of image {next(iter(given), None)!r} and others, "
                f"but none of the {without:,} pictures of {args.images}; do the ids agree?")
        print(f"{args.boxes}: boxes for {len(pictures):,} pictures; {without:,} others left out")
    if args.regions is None:  # the paper's 36, the toy world's 8; of true boxes none is left out
        counts = [] if detected else [len(given[i]) for i, _ in pictures]
        args.regions = max(counts, default=TOY_REGIONS if args.detector == "toy" else 36)
    model = build_detector(args.detector, args.weights, args.classes)
    if args.detector == "coco":
        print("note: a detector trained on COCO has seen the pictures that RefCOCO+ tests on; its "
            "features make referring results unfairly good")
    writer = open_store(args, pictures, model)
    rows = writer.pending()
    size = sum(array.nbytes for array in writer.arrays.values()) * len(rows) / len(pictures)
    print(f"{args.out}: {len(rows):,} of {len(pictures):,} pictures, {args.regions} regions of "
        f"{writer.meta['feature_size']}: up to {size / 1e9:.2f} GB to write", flush=True)
    work = (args, pictures, given, rows)
    if args.gpus > 1:
        torch.multiprocessing.spawn(extract_part, work, nprocs=args.gpus)
    else:
        extract_part(0, *work, model)
    store = writer.finish()
    failed = int((store.counts == 0).sum())
    print(f"{args.out}: {len(store) - failed:,} pictures extracted, {failed:,} failed" + (
        f": see {args.out / 'failed.txt'}; to try again, remove the store" if failed else ""))
    if failed == len(store):
        raise BadInput(f"{args.out}: not one picture could be extracted")
    return store


def open_store(args, pictures, model):
    """The writer of the store that these flags and this detector mean."""
    return FeatureStore.create(args.out, [i for i, _ in pictures], args.regions,
        **about(model), precision=args.precision,
        selection="given boxes" if args.boxes else "Anderson: NMS .3 in every class, best score",
        boxes=sha256(args.boxes) if args.boxes else None)


def about(model):
    """What every store says of its detector, and the class head (data.py, section 3)."""
    head = model.roi_heads.box_predictor.cls_score
    low, high = model.transform.min_size, model.transform.max_size
    return dict(model.about, feature_size=head.in_features,
        class_head=[p.detach().cpu().numpy() for p in (head.weight, head.bias)],
        box_format="x1 y1 x2 y2, pixels of the upright picture", dtype="float16",
        input_size=[low[0] if isinstance(low, tuple) else low, high],
        versions={m.__name__: m.__version__ for m in (torch, torchvision, np)})


def extract_part(rank, args, pictures, given, rows, model=None):
    """Extract every args.gpus-th of these rows, from the rank-th on.

    One picture at a time, so that its features are the same whoever extracts it, and whenever.
    """
    cuda = torch.cuda.is_available()
    if args.gpus > 1 and not cuda:
        torch.set_num_threads(max(1, torch.get_num_threads() // args.gpus))
    model = model or build_detector(args.detector, args.weights, args.classes)
    model.to(torch.device("cuda", rank) if cuda else "cpu")
    writer = open_store(args, pictures, model)
    files = PictureFiles(rows[rank :: args.gpus], pictures)
    loader = torch.utils.data.DataLoader(files, batch_size=None, num_workers=args.workers)
    for row, image in tqdm(loader, desc="extracting", unit="picture", leave=False,
            disable=None if rank == 0 else True):
        try:
            if isinstance(image, str):
                raise BadInput(image)
            extract_picture(model, writer, row, image, args, given.get(pictures[row][0]))
        except BadInput as error:
            writer.fail(row, str(error))


def extract_picture(model, writer, row, image, args, given):
    """Write the regions of one picture, uint8 (3, H, W)."""
    height, width = image.shape[1:]
    if given is not None:
        if (given[:, :2] >= [width, height]).any() or (given[:, 2:] < 0).any():
            raise BadInput(f"a given box lies beside the picture of {width} x {height} pixels; is "
                "it of another size?")
        given = [torch.from_numpy(given[: args.regions].clip(0, [width, height] * 2)).float()]
    image = image.to(next(model.parameters()).device) / 255  # a quarter of the bytes travel
    boxes, features, _ = regions(model, [image], args.regions, given, args.precision)[0]
    writer.write(row, features.cpu().numpy(), boxes.cpu().numpy(), (width, height))


# --- 7. A store of scenes -------------------------------------------------------------------------

TOY_REGIONS = 8  # R: a scene has 6 things at most, and a detector is never quite right


def draw_scenes(numbers):
    """uint8 (N, 3, 128, 128)"""
    return torch.stack(
        [pil_to_tensor(Scene(n).draw())
            for n in tqdm(numbers, desc="drawing scenes", leave=False, disable=None)]
    )


def toy_detector(weights, numbers):
    """The toy detector of file `weights`; if there is none, trained on these scenes and written
    there.
    """
    if not weights.exists():
        started = time.time()
        model = train_toy_detector([Scene(n) for n in numbers], draw_scenes(numbers))
        held_out = range(HELD_OUT_SCENES, HELD_OUT_SCENES + 200)
        quality = detection_quality(model, held_out)
        weights.parent.mkdir(parents=True, exist_ok=True)
        write_whole(weights, lambda f: torch.save(model.state_dict(), f), mode="wb")
        print(f"detector: trained in {time.time() - started:.0f} s; "
            f"things in {len(held_out)} held-out "
            "scenes " + ", ".join(f"{v:.3f} {k}" for k, v in quality.items()), flush=True)
    return build_detector("toy", weights).to(memory_format=torch.channels_last)


def detection_quality(model, numbers):
    """How well regions cover the things of these scenes: a dict of three shares of all things.

    A thing is found if a kept region overlaps it with IoU >= .5 (or .75), and named if the
    best-ranked region that does so has its class.
    """
    found, found_well, named, total = 0, 0, 0, 0
    for number, (boxes, _, probs) in zip(numbers, scene_regions(model, numbers)):
        targets = toy_targets(Scene(number))
        iou = box_iou(targets["boxes"], boxes)  # (things, n)
        first = (iou >= 0.5).float().argmax(dim=1)
        hit = iou.amax(dim=1) >= 0.5
        named += (hit & (probs[first, 1:].argmax(dim=1) + 1 == targets["labels"])).sum().item()
        found, found_well = (found + hit.sum().item(),
            found_well + (iou.amax(dim=1) >= 0.75).sum().item())
        total += len(hit)
    return {"found at IoU .5": found / total, "at .75": found_well / total, "named": named / total}


def scene_regions(model, numbers, batch=16):
    """Yields the regions of each scene. All scenes have one size, so a batch changes no feature."""
    for start in range(0, len(numbers), batch):
        images = [pil_to_tensor(Scene(n).draw()) / 255 for n in numbers[start : start + batch]]
        yield from regions(model, images, TOY_REGIONS)


def extract_scenes(model, numbers, folder, batch=16):
    """Write the regions of these scenes to a feature store, or what of it is still missing."""
    writer = FeatureStore.create(folder, numbers, TOY_REGIONS, **about(model))
    pending = set(writer.pending())
    # Whole batches, also where a part of one is there: the same pictures give the same bits.
    starts = [s for s in range(0, len(numbers), batch) if pending & {*range(s, s + batch)}]
    for start in tqdm(starts, desc="extracting regions", leave=False, disable=None):
        rows = range(start, min(start + batch, len(numbers)))
        for row, (boxes, features, _) in zip(
                rows, scene_regions(model, [numbers[row] for row in rows], batch)):
            if row in pending:
                writer.write(
                    row, features.numpy(), boxes.numpy(), (SCENE_PIXELS, SCENE_PIXELS))
    return writer.finish()


# --- 8. Command line ------------------------------------------------------------------------------


def show(folder, which):
    """A picture (PIL) of an image's regions: boxes with class names and scores. which: a picture
    file whose name gives the id, or an id alone: its boxes are then drawn on grey.
    """
    store, path = FeatureStore(folder), Path(which)
    row = store.row(which)
    if row is None:
        raise BadInput(f"{folder}: has no features of an image {canonical_id(which)!r}")
    record, probs = store[row], store.class_probs(row)
    if path.is_file():
        image = open_picture(path)
        if image.size != record["size"]:
            raise BadInput(f"{path}: is {image.size[0]} x {image.size[1]} pixels, but the store's "
                f"image is {record['size'][0]} x {record['size'][1]}")
    elif store.detector == "toy" and "selection" not in store.meta:  # of extract_scenes
        image = Scene(int(store.ids[row])).draw()
    else:
        image = Image.new("RGB", record["size"], "grey")
    labels = [""] * len(record["boxes"])
    if probs is not None:
        best = probs[:, 1:].argmax(axis=1) + 1  # not the background
        names = store.class_names or [f"class {i}" for i in range(store.num_region_classes)]
        labels = [f"{names[c]} {p[c]:.2f}" for c, p in zip(best, probs)]
    return draw_regions(image, record["boxes"], labels)


def draw_regions(image, boxes, labels, side=1000):
    """A copy of a picture, its longer side `side` pixels, with boxes (n, 4) and their labels."""
    scale = side / max(image.size)
    image = image.resize([max(1, round(s * scale)) for s in image.size])
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for i in reversed(range(len(boxes))):  # the best ones last, on top
        x1, y1, x2, y2 = (float(c) * scale for c in boxes[i])
        colour = f"hsl({137 * i % 360}, 90%, 45%)"  # 137 degrees: neighbours never look alike
        draw.rectangle([x1, y1, x2, y2], outline=colour, width=2)
        if labels[i]:
            place = (max(0, x1), max(0, y1 - 17))
            draw.rectangle(draw.textbbox(place, labels[i], font=font), fill=colour)
            draw.text(place, labels[i], "white", font=font)
    return image


def parse_args(argv=None):
    """The settings of an extraction, or of a look at a store."""
    argv = sys.argv[1:] if argv is None else argv
    p = argparse.ArgumentParser(description="Extract the regions of pictures into a feature store; "
        "`show STORE ID -o regions.png` draws those of one image.")
    if argv[:1] == ["show"]:
        p.add_argument("command")
        p.add_argument("store", type=Path, help="a feature store")
        p.add_argument("which", help="a picture file, or an image's id")
        p.add_argument("-o", "--out", type=Path, default=Path("regions.png"))
        return p.parse_args(argv)
    p.add_argument("images", help="folder, list file, or JSON file of COCO or Karpathy's splits")
    p.add_argument("-o", "--out", type=Path, required=True, help="the store to write")
    p.add_argument("--detector", choices=list(DETECTORS), default="vg")
    p.add_argument("--weights", type=Path, help="the detector's; coco downloads its own without")
    p.add_argument("--classes", help="vg: class names, one a line, without background")
    p.add_argument("--boxes", type=Path, help="JSON file of the boxes whose features are wanted")
    p.add_argument("--regions", type=int, help="most regions a picture; default: 36, toy 8, and "
        "with true boxes as many as there are")
    p.add_argument("--split", help="of a JSON file with splits: train, val or test")
    p.add_argument("--gpus", type=int, default=1, help="processes, one a GPU; without GPUs on CPU")
    p.add_argument("--workers", type=int, default=4 if torch.cuda.is_available() else 0,
        help="processes that open pictures, for each GPU")
    p.add_argument("--precision", choices=list(PRECISIONS), default="fp32")
    args = p.parse_args(argv)
    for flag, least in (("regions", 1), ("gpus", 1), ("workers", 0)):
        if (value := getattr(args, flag)) is not None and value < least:
            p.error(f"--{flag} {value}: expected {least} at least")
    if args.weights is None and args.detector != "coco":
        p.error(f"--detector {args.detector} needs --weights FILE")
    return args


def main(argv=None):
    """Run, and say in one sentence what is wrong with the input if something is."""
    args = parse_args(argv)
    try:
        if "which" in args:
            image = show(args.store, args.which)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(args.out, lambda f: image.save(f, "PNG"), mode="wb")
            print(args.out)
        else:
            extract(args)
    except (BadInput, OSError) as error:  # OSError: rights, disks, the download of coco's weights
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")


if __name__ == "__main__":
    main()
