"""extract_features.py: from pictures to a feature store
======================================================

Where this stands

    picture (3, H, W) --backbone--> map (c, H/s, W/s) --RPN--> proposals (P, 4)
                                        |                          |
                                        +------RoI pooling <-------+
                                                    |  (P, c, 7, 7)
                                              head, mean over the 7 x 7
                                                    |
                     features (P, F) --linear--> class probabilities (P, C)
                                                    |  keep the R best
        feature store: boxes (R, 4), features (R, F), class_probs (R, C) of every picture

    P proposals, R regions kept, F region feature, C region classes (background is class 0)

Switch-BERT reads pictures as *regions*: boxes that a detector found, each with the mean of the
detector's features inside it. The paper uses 36 regions of a Faster R-CNN trained on Visual Genome
[supp. 2]. This script is the only one that knows torchvision.

Map of the file

    1. The toy detector      a small Faster R-CNN, and its training on drawn scenes from scratch
    2. Regions               which boxes of a picture are kept, and what is stored of them
    3. A store of scenes     what `train.py` calls when there is no other data

`python train.py` runs these steps where it finds no other data, in about two minutes on two CPU
cores, and prints how good the detector is on scenes that it was not trained on:

    detector: trained in 86 s; things in 200 held-out scenes 1.000 found at IoU .5, ...

DEVIATION D1: the toy world's detector is small and trained here; it keeps 8 regions, not 36, since
a scene has 6 things at most.
"""

import math
import time
from collections import OrderedDict

import torch
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.resnet import BasicBlock
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from data import (HELD_OUT_SCENES, SCENE_PIXELS, TOY_CLASSES, BadInput, FeatureStore, Scene,
    write_whole)

# --- 1. The toy detector --------------------------------------------------------------------------


def _block(inputs, outputs, stride):
    shortcut = nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride, shortcut)


class MeanPoolHead(nn.Sequential):
    """RoI map (P, c, 7, 7) -> the region feature (P, F): one more convolution, and its mean."""

    def __init__(self, inputs, outputs):
        super().__init__(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(outputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Predictor(nn.Module):
    """Region feature (P, F) -> class logits (P, C) and a box correction for each class (P, 4 C)."""

    def __init__(self, feature_size, num_classes):
        super().__init__()
        self.cls_score = nn.Linear(feature_size, num_classes)
        self.bbox_pred = nn.Linear(feature_size, 4 * num_classes)

    def forward(self, x):
        return self.cls_score(x), self.bbox_pred(x)


def build_detector(name, weights=None):
    """A torchvision detector that `regions` can read, in evaluation mode.

    name: "toy". weights: a file that torch.save wrote of its state dict, or None for random
    weights. Raises BadInput for an unknown name or weights of another detector.
    """
    if name != "toy":
        raise BadInput(f"detector {name!r}: expected 'toy'")
    model = _toy_detector()
    if weights is not None:
        try:
            model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        except Exception as error:
            raise BadInput(
                f"{weights}: not the weights of the {name} detector ({str(error).splitlines()[0]})"
            ) from error
    return model.eval()


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
    model = _toy_detector().train().to(memory_format=torch.channels_last)
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


# --- 2. Regions -----------------------------------------------------------------------------------


@torch.no_grad()
def regions(model, images, num_regions):
    """The best regions of some pictures: a list of (boxes (n, 4), features (n, F), probs (n, C)), n
    <= R.

    images: float tensors (3, H, W) in [0, 1]. Boxes are x1, y1, x2, y2 in their pixels, best first.
    """
    prepared, _ = model.transform(images)
    maps = {"0": model.backbone(prepared.tensors)}  # (B, c, H/s, W/s)
    proposals, _ = model.rpn(prepared, maps)  # B x (P, 4)
    pooled = model.roi_heads.box_roi_pool(maps, proposals, prepared.image_sizes)  # (B P, c, 7, 7)
    features = model.roi_heads.box_head(pooled)  # (B P, F)
    probs = model.roi_heads.box_predictor(features)[0].softmax(dim=-1)  # (B P, C)
    counts = [len(p) for p in proposals]
    found = []
    for image, size, boxes, f, p in zip(
            images, prepared.image_sizes, proposals, features.split(counts), probs.split(counts)):
        kept = select_regions(boxes, p, num_regions)
        (h, w), (height, width) = size, image.shape[1:]  # as the detector saw it, as it is
        boxes = boxes[kept] * boxes.new_tensor([width / w, height / h, width / w, height / h])
        found.append((boxes, f[kept], p[kept]))
    return found


def picture_regions(model, path, num_regions):
    """A picture file's (PIL image, boxes (n, 4), features (n, F)), as numpy. Raises BadInput."""
    try:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as a picture ({error})") from error
    boxes, features, _ = regions(model, [pil_to_tensor(image) / 255], num_regions)[0]
    return image, boxes.numpy(), features.numpy()


def select_regions(boxes, probs, most, least=1, confidence=0.2, overlap=0.3):
    """Anderson's choice of regions: indices (n,), best first, least <= n <= most. [paper's
    reference 1]

    In every foreground class the proposals compete: one that overlaps a better one (IoU > .3) is
    struck from that class. A proposal then ranks by its best class in which it survived. So of ten
    boxes around one red star only one ranks high, while a shirt and the man in it, two classes,
    both stay. Kept are those that rank above `confidence`, but `least` at least and `most` at most.
    """
    scores = probs[:, 1:]  # (P, C-1), no background
    num_boxes, num_classes = scores.shape
    classes = torch.arange(num_classes, device=boxes.device).repeat(num_boxes)  # (P (C-1),)
    survivors = torchvision.ops.batched_nms(
        boxes.repeat_interleave(num_classes, dim=0), scores.flatten(), classes, overlap)
    rank = torch.zeros_like(scores).flatten()
    rank[survivors] = scores.flatten()[survivors]
    rank, order = rank.view_as(scores).amax(dim=1).sort(descending=True, stable=True)  # (P,)
    return order[: min(most, max(least, int((rank > confidence).sum())))]


# --- 3. A store of scenes -------------------------------------------------------------------------

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
        iou = torchvision.ops.box_iou(targets["boxes"], boxes)  # (things, n)
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


def extract_scenes(model, numbers, folder):
    """Write the regions of these scenes to a feature store, or what of it is still missing."""
    writer = FeatureStore.create(folder, numbers, TOY_REGIONS,
        model.roi_heads.box_predictor.cls_score.in_features, len(TOY_CLASSES), TOY_CLASSES,
        detector="toy", torchvision=torchvision.__version__)
    pending, size = writer.pending(), (SCENE_PIXELS, SCENE_PIXELS)
    found = scene_regions(model, [numbers[row] for row in pending])
    for row, (boxes, features, probs) in zip(
            tqdm(pending, desc="extracting regions", leave=False, disable=None), found):
        writer.write(row, features.numpy(), boxes.numpy(), size, probs.numpy())
    return writer.finish()
