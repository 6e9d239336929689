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

Map of the file (* = read these first)

    1. Detectors             build_detector: "vg", "toy", and their weights
    2. Visual Genome         the paper's, with published weights, built from torchvision's parts
    3. Toy detector          a small one, trained from scratch on drawn scenes
    4. Regions             * which boxes of a picture are kept, and their features
    5. Pictures and boxes    what to extract: folders, given boxes
    6. Extraction          * filling a store, from scenes or from pictures
    7. Command line          extract, show

    $ python extract_features.py images/ -o data/features --weights pytorch_model.bin
    data/features: 6 of 6 pictures to extract
    data/features: 6 of 6 pictures extracted

    $ python extract_features.py images/ -o data/refer/features-gt --boxes instances.json ...
    $ python extract_features.py show data/features images/391895.jpg -o regions.png

The paper uses 36 regions from a Faster R-CNN with a ResNet-101, trained on Visual Genome [supp. 2].
ASSUMPTION A13 (which 36) is in section 4. DEVIATION D1: the toy world's detector is small and
trained here. It keeps 1 to 8 regions: a scene has at most 6 things.
"""

import argparse
import contextlib
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
from PIL import Image, ImageOps, PngImagePlugin
from torch import nn
from torchvision.models import detection, resnet
from torchvision.ops import (Conv2dNormActivation, FrozenBatchNorm2d, MultiScaleRoIAlign, box_iou,
    roi_pool)
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

from data import (COUNT, NATURAL, PICTURES, RANK, SCENE_PIXELS, TOY_CLASSES, BadInput,
    FeatureStore, Scene, WORLD_SIZE, canonical_id, encode_ids, files_below, flag, load_ahead,
    only_run_in, picture_names, progress, read_json, reading, run, save_png, say, say_found,
    start_processes, write_whole)

# --- 1. Detectors ---------------------------------------------------------------------------------
# Two networks, of torchvision's parts. The table DETECTORS is at the end of section 3.


def build_detector(name, weights=None, classes=None):
    """A detector for `regions`, in evaluation mode.

    name: "vg" (Visual Genome, ResNet-101 C4, C = 1601, F = 2048) or "toy" (C = 49, F = 128).
    weights: for "vg" pytorch_model.bin of Hugging Face's unc-nlp/frcnn-vg-finetuned, for "toy" a
    state dict; None: random. classes: a file of names, one per line, without background.
    `model.about` goes into a store: the last layer too, with which a region's class probabilities
    follow from its feature.
    """
    if name not in DETECTORS:
        raise BadInput(f"detector {name!r}: expected {', '.join(DETECTORS)}")
    build, names = DETECTORS[name]
    model = build().eval()
    if weights:
        load_weights(model, name, weights)
    head = model.roi_heads.box_predictor.cls_score
    if classes:
        with reading(classes, f"{head.out_features - 1} class names, one per line"):
            names = ["background", *Path(classes).read_text("utf-8-sig").strip().split("\n")]
            if len(names) != head.out_features:
                raise ValueError(f"found {len(names) - 1}")
    model.confidence = 0.2 if name == "toy" else 0.0  # see select_regions
    model.about = dict(detector=name, class_names=names, feature_size=head.in_features,
        weights=Path(weights or "").name,
        class_head=[parameter.detach().numpy() for parameter in head.parameters()])
    return model


def load_weights(model, name, path):
    """Load a file into a detector. BadInput unless its keys and shapes are the model's: a missing
    layer would stay random, and every feature would be wrong.
    """
    with reading(path, f"the weights of the {name} detector"):
        weights = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(convert_vg_weights(weights) if name == "vg" else weights)


# --- 2. Visual Genome -----------------------------------------------------------------------------
# The detector of Anderson et al. [2018, the paper's reference 1], trained in Caffe on the 1,600
# object classes of Visual Genome. The first four blocks of a ResNet-101 map the picture once,
# (3, 600, 1000) -> (1024, 38, 63). The fifth processes each of 300 proposals, (1024, 14, 14) ->
# (2048, 14, 14); the mean over the bins is the feature. torchvision has the parts, but with later
# defaults. Each difference below changes every feature; RoIAlign instead of RoIPool, by 40 %.


class VGTransform(nn.Module):
    """RGB in [0, 1] -> BGR in 0..255 minus its mean, short side 600 pixels, long one up to 1000."""

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

    `cells` (12, 4) are those around the point (0, 0), loaded with the weights: ports differ by half
    a pixel and in the order, and the RPN's head knows an anchor only by its index.
    """

    def forward(self, images, maps):
        """For each image (12 h w, 4), row by row of its map of h x w cells."""
        self.cell_anchors = [self.cells]
        return self.grid_anchors([maps[0].shape[-2:]], [(16, 16)]) * len(images.tensors)


class C4RoIPool(nn.Module):
    """The maximum in each of 14 x 14 bins of a box, rounded to whole cells of the map."""

    def forward(self, maps, boxes, sizes):
        """(P, 1024, 14, 14) from maps {"0": (B, 1024, h, w)} and boxes B x (n, 4)."""
        return roi_pool(maps["0"], boxes, output_size=14, spatial_scale=1 / 16)


class Res5Head(nn.ModuleDict):
    """Features (P, 2048): layer4, then the mean over the bins. 300 at once would take gigabytes."""

    def forward(self, pooled):
        """pooled (P, 1024, 14, 14), in chunks of 32 proposals."""
        return torch.cat([self.layer4(part).mean(dim=(2, 3)) for part in pooled.split(32)])


def vg_detector():
    """Visual Genome's detector with random weights: Caffe's ResNet-101, split before layer4."""
    # layer4 keeps 14 x 14: dilation 2 instead of stride 2.
    net = resnet.resnet101(norm_layer=FrozenBatchNorm2d,
        replace_stride_with_dilation=[False, False, True])
    net.layer4[0].conv2.dilation = (2, 2)  # torchvision dilates only the blocks after the first
    net.layer4[0].conv2.padding = (2, 2)
    net.maxpool = nn.MaxPool2d(3, stride=2, ceil_mode=True)  # Caffe's
    for layer in (net.layer2, net.layer3):  # Caffe's blocks stride in their first convolution
        layer[0].conv1.stride = (2, 2)
        layer[0].conv2.stride = (1, 1)
    backbone = nn.Sequential(OrderedDict(net.named_children()))[:7]  # conv1 to layer3
    backbone.out_channels = 1024
    anchors = VGAnchors()
    head = detection.rpn.RPNHead(512, num_anchors=12)
    anchors.register_buffer("cells", torch.zeros(12, 4))
    head.conv = Conv2dNormActivation(1024, 512, norm_layer=None)
    # The 6,000 best anchors -> NMS at IoU .7 -> 300 proposals.
    model = detection.FasterRCNN(backbone, rpn_anchor_generator=anchors, rpn_head=head,
        rpn_pre_nms_top_n_test=6000, rpn_post_nms_top_n_test=300,
        box_head=Res5Head(dict(layer4=net.layer4)),
        box_predictor=nn.ModuleDict(dict(cls_score=nn.Linear(2048, 1601))))
    model.transform = VGTransform()
    model.roi_heads.box_roi_pool = C4RoIPool()
    return model


# Hugging Face's names -> torchvision's, replaced in this order.
VG_NAMES = {"backbone.stem.": "backbone.", "res2.": "layer1.", "res3.": "layer2.",
    "res4.": "layer3.", "roi_heads.res5.": "roi_heads.box_head.layer4.", "conv1.norm.": "bn1.",
    "conv2.norm.": "bn2.", "conv3.norm.": "bn3.", "shortcut.norm.": "downsample.1.",
    "shortcut.": "downsample.0.", "proposal_generator.rpn_head.conv.": "rpn.head.conv.0.",
    "proposal_generator.rpn_head.objectness_logits.": "rpn.head.cls_logits.",
    "proposal_generator.rpn_head.anchor_deltas.": "rpn.head.bbox_pred.",
    "proposal_generator.anchor_generator.cell_anchors.0": "rpn.anchor_generator.cells"}
# Not needed: the final box regression, the attribute head ("red", "wooden"), and no weights at all.
VG_UNUSED = "bbox_pred cls_embedding fc_attr attr_score num_batches_tracked pixel_".split()


def convert_vg_weights(published):
    """torchvision's state dict from Hugging Face's, where the background is the last class."""
    converted = {}
    for name, value in published.items():
        if any(unused in name for unused in VG_UNUSED):
            continue
        for theirs, ours in VG_NAMES.items():
            name = name.replace(theirs, ours)
        if "cls_score" in name:
            value = value.roll(1, dims=0)  # (1601, ...), now the first
        converted[name] = value
    return converted


# --- 3. Toy detector ------------------------------------------------------------------------------
# A Faster R-CNN of 300,000 weights for pictures of 128 x 128, so that the toy world needs no
# download. Trained in half a minute, it finds 99 % of the things in held-out scenes at IoU .5.

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
    return detection.FasterRCNN(backbone, min_size=SCENE_PIXELS, max_size=SCENE_PIXELS,
        rpn_anchor_generator=detection.rpn.AnchorGenerator(((20, 36),), aspect_ratios=((1.0,),)),
        # One sample per bin instead of four, 5 x 5 bins instead of 7 x 7: faster, and no worse.
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=5, sampling_ratio=1),
        # (P, 64, 5, 5) -> (P, 128): one more convolution, then the mean over its bins.
        box_head=nn.Sequential(*Conv2dNormActivation(64, 128, stride=2), nn.AdaptiveAvgPool2d(1),
            nn.Flatten()),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(128, len(TOY_CLASSES)),
        rpn_pre_nms_top_n_train=100, rpn_post_nms_top_n_train=40, rpn_nms_thresh=0.5,
        rpn_pre_nms_top_n_test=100, rpn_post_nms_top_n_test=16,
        rpn_batch_size_per_image=64, box_batch_size_per_image=16)


def train_toy_detector(numbers, iterations=900, batch=8):
    """A toy detector trained from scratch on these scenes, in training mode."""
    torch.manual_seed(0)
    # channels_last: the memory order that CPU convolutions prefer, a fifth faster here.
    model = toy_network().to(memory_format=torch.channels_last)
    images = draw_scenes(numbers)
    targets = [toy_targets(Scene(n)) for n in numbers]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, iterations, pct_start=0.1)
    epochs = math.ceil(iterations * batch / len(numbers))
    order = torch.cat([torch.randperm(len(numbers)) for _ in range(epochs)])
    for chosen in progress(order.split(batch)[:iterations], "training the detector"):
        losses = model([images[i] / 255 for i in chosen], [targets[i] for i in chosen])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()
    return model


def toy_targets(scene):
    """The things of a scene as torchvision's targets: boxes (n, 4) in pixels and labels (n,)."""
    return {"boxes": torch.tensor([t.box for t in scene.things]).float(),
        "labels": torch.tensor([TOY_CLASSES.index(f"{t.colour} {t.shape}") for t in scene.things])}


def draw_scenes(numbers):
    """The pictures of N scenes: uint8 (N, 3, 128, 128)."""
    return torch.stack([pil_to_tensor(Scene(n).draw()) for n in numbers])


def toy_detector(weights, numbers):
    """The toy detector in file `weights`, a Path; if there is none, trained on these scenes."""
    if not weights.exists():
        started = time.time()
        model = train_toy_detector(numbers)
        weights.parent.mkdir(parents=True, exist_ok=True)
        write_whole(weights, lambda file: torch.save(model.state_dict(), file), mode="wb")
        say(f"detector: trained in {time.time() - started:.0f} s")
    return build_detector("toy", weights).to(memory_format=torch.channels_last)


# name: (function that builds it, class names if known)
DETECTORS = {"vg": (vg_detector, ()), "toy": (toy_network, TOY_CLASSES)}

# --- 4. Regions -----------------------------------------------------------------------------------
# The detector's parts, called one by one: as a whole it returns no features, and moves the boxes.


@torch.no_grad()
def regions(model, images, num_regions, boxes=None, precision="fp32"):
    """The best regions of B pictures: B x [boxes (n, 4), features (n, F), probs (n, C)], n <= R.

    images: float (B, 3, H, W) in [0, 1], of one size: in a padded one, the border of zeros would
    leak into nearby features. boxes: None, or those (n, 4) of a single picture whose features are
    wanted; the first R are kept. precision: of the convolutions; "bf16" changes a feature by less
    than 1 % of the largest one. The results are numpy arrays, the best region first; boxes are x1,
    y1, x2, y2 in pixels of the picture, as they were pooled: none is corrected.
    """
    images = images.to(next(model.parameters()).device)
    lower = torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16")
    prepared, _ = model.transform(list(images))
    with lower:
        features = model.backbone(prepared.tensors)  # (B, c, H/s, W/s)
    # Boxes are computed in fp32: bf16 would round to 4 pixels, perhaps to outside of the picture.
    maps = {"0": features.float()}
    h, w = prepared.image_sizes[0]
    height, width = images.shape[2:]
    scale = images.new_tensor([w / width, h / height] * 2)
    if boxes is None:
        proposals, _ = model.rpn(prepared, maps)  # B x (P, 4), in pixels of `prepared`
        places = [proposal / scale for proposal in proposals]
    else:
        places = [images.new_tensor(boxes[:num_regions])]
        proposals = [places[0] * scale]
    pooled = model.roi_heads.box_roi_pool(maps, proposals, prepared.image_sizes)
    with lower:
        features = model.roi_heads.box_head(pooled).float()  # (B P, F)
    probs = model.roi_heads.box_predictor.cls_score(features).softmax(dim=-1)  # (B P, C)
    counts = [len(place) for place in places]
    found = []
    for proposal, *values in zip(proposals, places, features.split(counts), probs.split(counts)):
        kept = slice(None)
        if boxes is None:
            kept = select_regions(proposal, values[2], num_regions, model.confidence)
        found.append([value[kept].cpu().numpy() for value in values])
    return found


def select_regions(boxes, probs, most, confidence):
    """Anderson's choice of regions: indices (n,), best first, n <= most. ASSUMPTION A13.

    Non-maximum suppression per foreground class: a proposal that overlaps a better one (IoU > .3)
    is struck from that class. It then ranks by its best score among the classes where it survives.
    So of ten boxes around one red star only one ranks high, while a shirt and the man in it, two
    classes, both stay. confidence: lowest score to keep; the best region always stays.

    One pass for all classes, five times as fast as batched_nms: step k takes the k-th best box of
    every class and, if it is still alive, strikes its rivals.
    """
    scores = probs[:, 1:]  # (P, C - 1), without the background
    rivals = (box_iou(boxes, boxes) > 0.3).fill_diagonal_(False)  # (P, P)
    alive = torch.ones_like(scores, dtype=torch.bool)
    for best in scores.argsort(dim=0, descending=True, stable=True):  # one box per class
        alive &= ~(rivals[:, best] & alive.gather(0, best[None]))
    rank, order = (scores * alive).amax(dim=1).sort(descending=True, stable=True)  # (P,)
    sure = rank >= confidence
    sure[:1] = True
    return order[sure][:most]


def picture_regions(model, path, num_regions):
    """A picture file's (PIL image, boxes (n, 4), features (n, F), probs (n, C)), as numpy."""
    image = open_picture(path)
    return image, *regions(model, pil_to_tensor(image)[None] / 255, num_regions)[0]


# --- 5. Pictures and boxes ------------------------------------------------------------------------
# A picture's name is its id, which links it to its captions. An unusable picture fails alone.

# Cameras and editors leave notes of many megabytes in a PNG; Pillow would refuse the picture.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def open_picture(path):
    """A PIL image, RGB and upright, from a file in grey, palette, CMYK, EXIF-rotated, or with 16 or
    32 bits per pixel, integers or floats.
    """
    with reading(path, "a picture that can be read"):
        image = Image.open(path)
        with contextlib.suppress(Exception):  # a broken EXIF block: the picture stays as it lies
            image = ImageOps.exif_transpose(image)
        if "16" in image.mode:  # bits per pixel: `convert` would clip, not scale
            image = Image.fromarray(np.uint8(np.asarray(image) // 256))
        elif image.mode in "IF":  # 32 bits, integers or floats, of a range that no file tells
            pixels = np.asarray(image, float)
            top = pixels.max()
            if not 0 <= pixels.min() <= top < np.inf:
                raise ValueError("pixels below 0, or not numbers")
            # 0 to 1, 0 to 255, each with what resampling adds; else the brightest pixel is white.
            white = 1 if top <= 1.3 else 255 if top <= 1.3 * 255 else top
            image = Image.fromarray(np.uint8((pixels / white).clip(max=1) * 255.999))
        image = image.convert("RGB")
    if max(image.size) > 30 * min(image.size):
        raise BadInput(f"{path}: a strip of {image.size} pixels, too thin for a detector")
    return image


def read_boxes(path):
    """{image id: boxes (n, 4) float32, x1 y1 x2 y2 in pixels} of a JSON file.

    Detections like MAttNet's: a list of {image_id, box [x, y, w, h], score}; highest score first.
    COCO's and RefCOCO's instances.json: annotations with {image_id, bbox}, in their order.
    """
    content = read_json(path)
    if isinstance(content, list):
        content = {"annotations": content}
    boxes = defaultdict(list)
    with reading(path, "detections (image_id, box, score) or annotations (image_id, bbox)") as at:
        name = picture_names(content)
        records = enumerate(content["annotations"])
        surest = sorted(records, key=lambda item: -item[1].get("score", 0))  # stable
        for at.entry, record in surest:
            x, y, w, h = record.get("box") or record["bbox"]
            if not math.hypot(x, y, w, h) < 1e6:  # also NaN: RoI pooling would index memory with it
                raise ValueError(f"a box of {[x, y, w, h]}")
            boxes[canonical_id(name(record["image_id"]))].append([x, y, x + w, y + h])
    return {image_id: np.float32(each) for image_id, each in boxes.items()}


def clip_boxes(boxes, size):
    """Boxes (n, 4) cut to a picture of size (W, H) where they leave it by more than a pixel, which
    is rounding. BadInput for a box that lies outside altogether.
    """
    if (boxes[:, :2] >= size).any() or (boxes[:, 2:] <= 0).any():
        raise BadInput(f"a box outside its picture of {size} pixels")
    inside = boxes.clip(0, size + size)  # x by W, y by H, twice
    return np.where(abs(boxes - inside) > 1, inside, boxes)


# --- 6. Extraction --------------------------------------------------------------------------------
# A store is filled in blocks of rows: 16 scenes of one size, or one picture. What was interrupted
# goes on with the pending ones, to the same bits. Pitfall: a batch of another size rounds
# differently. So a block is always computed whole, even if some of its rows are already written.


def fill(writer, model, sources, load, batch, boxes=None, precision="fp32", workers=0, gpus=1):
    """Extract this process's share of the pending rows, one of `gpus`.

    load(sources of a block): its pictures, uint8 (B, 3, H, W), or BadInput. boxes: None, or {id:
    given boxes}. A process that starts late sees fewer pending blocks: so their numbers decide.
    """
    numbers = sorted({row // batch for row in writer.pending()})
    blocks = [range(len(sources))[batch * n : batch * (n + 1)] for n in numbers if n % gpus == RANK]
    loader = load_ahead(sources, blocks, load, workers)
    for rows, images in zip(blocks, progress(loader, "extracting")):
        try:
            if isinstance(images, BadInput):
                raise images
            size = (images.shape[3], images.shape[2])
            given = boxes and clip_boxes(boxes[canonical_id(sources[rows[0]])], size)
            found = regions(model, images / 255, writer.meta["num_regions"], given, precision)
            for row, (places, features, _) in zip(rows, found):
                writer.write(row, features, places, size)
        except BadInput as error:
            if batch > 1:  # a scene is sound: the detector is not
                raise
            writer.fail(rows[0], str(error))


def extract_scenes(model, numbers, folder):
    """A feature store of these scenes; continues an interrupted one."""
    writer = FeatureStore.create(folder, numbers, TOY_REGIONS, **model.about)
    fill(writer, model, numbers, draw_scenes, batch=16)
    return writer.finish()


def load_picture(paths):
    """A block of one picture, uint8 (1, 3, H, W), or the BadInput that it caused."""
    try:
        return pil_to_tensor(open_picture(paths[0]))[None]
    except BadInput as error:
        return error


def extract(args):
    """Fill a store with pictures, or with those that an interrupted run left.

    With --gpus, the first process starts others, which come here too, and completes the store.
    """
    boxes = None
    most = 36
    paths = [args.images] if args.images.is_file() else files_below(args.images, PICTURES)
    if not paths:
        raise BadInput(f"{args.images}: found no pictures")
    if args.boxes:
        boxes = read_boxes(args.boxes)
        ids = encode_ids(boxes)
        known = encode_ids(paths)
        say_found(f"{args.boxes}: images", ids, np.isin(ids, known), args.images, known)
        paths = [path for path in paths if canonical_id(path) in boxes]
        most = max(map(len, boxes.values()))
    model = build_detector(args.detector, args.weights, args.classes)
    writer = FeatureStore.create(args.out, paths, args.regions or most, precision=args.precision,
        boxes_file=args.boxes and args.boxes.name, **model.about)
    total = len(paths)
    if WORLD_SIZE == 1:
        say(f"{args.out}: {len(writer.pending()):,} of {total:,} pictures to extract")
    if args.gpus > WORLD_SIZE:
        start_processes(args.gpus)
    else:
        if torch.cuda.is_available():
            model.to(f"cuda:{RANK}")
        elif torch.backends.mps.is_available():
            model.to("mps")
        fill(writer, model, paths, load_picture, 1, boxes, args.precision, args.workers, args.gpus)
    if WORLD_SIZE == 1:
        extracted = (writer.finish().counts > 0).sum()
        result = f"{args.out}: {extracted:,} of {total:,} pictures extracted"
        if extracted < total:
            result += f"; {args.out}/failed.txt lists the others; to try again, remove the store"
        if not extracted:
            raise BadInput(result)
        say(result)


# --- 7. Command line ------------------------------------------------------------------------------
# `show` draws a store's regions of one image: do boxes, names and picture fit together?


def stored_picture(folder, which):
    """(store, row, PIL image) of an image in a feature store.

    which: a picture file whose name gives the id, or an id: a scene is drawn, others are grey.
    """
    store = FeatureStore(folder)
    row = store.row(which)
    if row is None:
        raise BadInput(f"{folder}: has no features of an image {canonical_id(which)!r}")
    image = Image.new("RGB", store[row]["size"], "grey")
    if Path(which).is_file():
        image = open_picture(which)
    elif store.meta["detector"] == "toy" and "precision" not in store.meta:  # of extract_scenes
        image = Scene(int(store.ids[row])).draw(scale=4)  # smooth shapes, for people
    return store, row, image


def show(folder, which):
    """A dimmed PIL image, its longer side 1000 pixels, with an image's boxes and classes; folder,
    which: see stored_picture. Letters are ten pixels high, so all is drawn small, then enlarged.
    """
    store, row, image = stored_picture(folder, which)
    record = store[row]
    names = store.class_names or [f"class {c}" for c in range(store.num_region_classes)]
    labels = None
    if store.num_region_classes:
        sure = store.class_probs(row)[::-1, 1:]  # without the background
        labels = [f"{names[1 + p.argmax()]} {p.max():.2f}" for p in sure]
    boxes = record["boxes"][::-1] * 500 / max(record["size"])  # the best comes last, on top
    # 137 degrees around the colour wheel each time, the golden angle: neighbours never look alike,
    # however many boxes there are.
    colours = [f"hsl({137 * i % 360}, 90%, 75%)" for i in range(len(boxes))][::-1]
    image = pil_to_tensor(ImageOps.contain(image, (500, 500))) // 2
    drawn = draw_bounding_boxes(image, torch.from_numpy(boxes), labels, colours)
    return ImageOps.scale(to_pil_image(drawn), 2)


def parse_args(argv=None):
    """The settings of an extraction, or of `show`."""
    argv = argv or sys.argv[1:]
    p = argparse.ArgumentParser(description="Extract the regions of pictures into a feature store; "
        "`show STORE ID -o regions.png` draws those of one image.")
    add = p.add_argument
    if argv[:1] == ["show"]:
        add("command")
        add("store", help="a feature store")
        add("which", help="a picture file, or an image's id")
        add("-o", "--out", default="regions.png", help="the picture to write")
        return p.parse_args(argv)
    add("images", type=Path, help="a picture, or a folder")
    add("-o", "--out", type=Path, required=True, help="the store to write")
    add("--detector", choices=DETECTORS, default="vg")
    add("--weights", required=True, help="file with the detector's weights")
    add("--classes", help="vg: file with class names, one per line, without background")
    add("--boxes", type=Path, help="JSON file with the boxes whose features are wanted")
    flag(p, "--regions", COUNT, None, "maximum per picture (default: 36; with --boxes all)")
    flag(p, "--gpus", COUNT, 1, "processes, one per GPU, or on the CPU (default: 1)")
    flag(p, "--workers", NATURAL, 2, "processes per GPU that open pictures (default: 2)")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    return p.parse_args(argv)


def main(argv=None):
    """Extract pictures, or show a store."""
    args = parse_args(argv)
    if "which" in args:
        save_png(args.out, show(args.store, args.which))
        print(args.out)
        return
    # The processes that `extract` starts find the store locked by the first.
    with only_run_in(args.out) if WORLD_SIZE == 1 else contextlib.nullcontext():
        extract(args)


if __name__ == "__main__":
    run(main)
