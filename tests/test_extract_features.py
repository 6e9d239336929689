"""What extract_features.py promises: the choice of regions, the toy detector, pictures of every
kind, given boxes, stores that survive interruptions, and a look at a store.
"""

import json
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torchvision.ops import box_iou, nms
from torchvision.transforms.functional import pil_to_tensor

import extract_features
from data import HELD_OUT_SCENES, TOY_CLASSES, BadInput, FeatureStore, Scene, StoreWriter, run
from extract_features import (TOY_REGIONS, build_detector, draw_regions, draw_scenes,
    extract_scenes, main, open_picture, picture_regions, read_boxes, regions, select_regions,
    toy_detector, toy_targets, train_toy_detector)


def test_three_regions_by_hand():
    """Classes are background, star and ring. A (row 2) is the best star. B (row 1) overlaps A by
    90 of 100 pixels, so it is no star; but it is the best ring, which strikes A from the rings. C
    (row 0) is alone. So they rank by A's .6 as a star, B's .3 as a ring, and C's .2 as a star.
    """
    boxes = torch.tensor([[20.0, 0, 30, 10], [0, 0, 10, 9], [0, 0, 10, 10]])
    probs = torch.tensor([[0.8, 0.2, 0.0], [0.2, 0.5, 0.3], [0.3, 0.6, 0.1]])

    def chosen(most, confidence):
        return select_regions(boxes, probs, most, confidence).tolist()

    assert chosen(most=3, confidence=0.0) == [2, 1, 0]
    assert chosen(most=2, confidence=0.0) == [2, 1]
    assert chosen(most=3, confidence=0.25) == [2, 1]
    assert chosen(most=3, confidence=0.9) == [2]  # the best one stays, however unsure


def select_slowly(boxes, probs, most, confidence):
    """Anderson's rule, class by class."""
    best = torch.zeros(len(boxes))
    for scores in probs.T[1:]:
        kept = nms(boxes, scores, 0.3)
        best[kept] = best[kept].maximum(scores[kept])
    order = best.argsort(descending=True, stable=True)
    sure = int((best >= confidence).sum())
    return order[: min(most, max(1, sure))].tolist()


@pytest.mark.parametrize("most, confidence", [(8, 0.2), (20, 0), (30, 0.9)])
def test_regions_are_chosen_by_andersons_rule(most, confidence):
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        corner = torch.rand(20, 2, generator=generator) * 60
        size = 10 + torch.rand(20, 2, generator=generator) * 40
        boxes = torch.cat([corner, corner + size], dim=1)
        logits = 4 * torch.randn(20, 6, generator=generator)
        probs = logits.softmax(dim=1)
        chosen = select_regions(boxes, probs, most, confidence).tolist()
        assert chosen == select_slowly(boxes, probs, most, confidence)


# --- What the tests below share -------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The toy detector's, random: what it finds is beside the point here."""
    path = tmp_path_factory.mktemp("weights") / "toy.pt"
    torch.manual_seed(0)
    torch.save(build_detector("toy").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def detector(weights):
    return build_detector("toy", weights)


def noise(seed, size=(90, 60)):
    """A picture of random pixels."""
    width, height = size
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def batch_of(image):
    """float (1, 3, H, W): a picture as a detector reads it."""
    return pil_to_tensor(image)[None] / 255


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of five sound pictures of 90 x 60 pixels, ids 0 to 4, and one that is cut off."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(5):
        noise(i).save(folder / f"COCO_train2014_{i:012d}.png")
    (folder / "zz_cut.png").write_bytes(noise(0).tobytes())
    return folder


def flags(images, out, weights, *more):
    """The arguments of an extraction by the toy detector."""
    words = [images, "-o", out, "--detector", "toy", "--weights", weights, "--workers", 0]
    return [str(word) for word in words + list(more)]


@pytest.fixture(scope="module")
def undisturbed(weights, pictures, tmp_path_factory):
    """The store that one process makes of these pictures, in one go."""
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    main(flags(pictures, store, weights))
    return store


def content(folder):
    """{file name: bytes} of a store."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "features.npy" in files
    return files


# --- The toy detector -----------------------------------------------------------------------------


def test_the_targets_of_a_scene_are_its_things():
    things = Scene(5).things
    targets = toy_targets(Scene(5))
    assert [tuple(box) for box in targets["boxes"].tolist()] == [t.box for t in things]
    names = [f"{t.colour} {t.shape}" for t in things]
    assert [TOY_CLASSES[label] for label in targets["labels"]] == names


@torch.no_grad()
def loss_after(iterations):
    """The summed loss of a detector on the 16 scenes that it was trained on."""
    scenes = range(16)
    with torch.enable_grad():
        model = train_toy_detector(scenes, iterations, batch=4)
    images = list(draw_scenes(scenes) / 255)
    targets = [toy_targets(Scene(number)) for number in scenes]
    return sum(model(images, targets).values()).item()


def test_a_few_steps_of_training_lower_the_loss():
    assert loss_after(25) < 0.6 * loss_after(1)


@pytest.mark.slow
def test_the_toy_detector_finds_and_names_the_things_of_held_out_scenes(tmp_path, capsys):
    """A thing is found by a region with IoU >= .5, and named if the best of these has its class."""
    model = toy_detector(tmp_path / "detector.pt", range(4000))
    assert re.fullmatch(r"detector: trained in \d+ s\n", capsys.readouterr().out)
    things = 0
    found = 0
    named = 0
    for number in range(HELD_OUT_SCENES, HELD_OUT_SCENES + 200):
        targets = toy_targets(Scene(number))
        boxes, _, probs = regions(model, draw_scenes([number]) / 255, TOY_REGIONS)[0]
        overlaps = box_iou(targets["boxes"], torch.from_numpy(boxes)).numpy()
        classes = 1 + probs[:, 1:].argmax(axis=1)
        for label, overlap in zip(targets["labels"], overlaps):
            near = overlap >= 0.5
            things += 1
            found += int(near.any())
            named += int(near.any() and classes[near.argmax()] == label)
    assert found / things > 0.99
    assert named / things > 0.97


# --- Pictures and boxes ---------------------------------------------------------------------------

GREY = np.arange(60, dtype=np.uint8).reshape(6, 10)
RGB = Image.fromarray(np.dstack([GREY, GREY, GREY]))
FIFTY = GREY.clip(max=50)
# File, what is stored in it, grey pixels that are to be seen.
FORMATS = [
    ("grey.png", GREY, GREY),
    ("bits16.png", GREY.astype(np.uint16) * 256 + 99, GREY),
    ("bit.png", GREY > 30, 255 * (GREY > 30)),
    ("rgba.png", np.dstack([GREY] * 4), GREY),
    ("palette.gif", RGB.quantize(60), GREY),
    ("ink.tif", RGB.convert("CMYK"), GREY),
    ("float1.tif", np.float32(GREY / 255), GREY),
    ("resampled.tif", np.float32(GREY / 50), GREY * 5.1),  # 0 to 1, and up to 1.18
    ("float255.tif", np.float32(GREY), GREY),
    ("float256.tif", FIFTY * np.float32(5.12), FIFTY * 5.12),
    ("int255.tif", np.int32(GREY) + 200, GREY + 200.0),
    ("int.tif", np.int32(GREY) * 1000, GREY * (255 / 59))]  # the brightest is white


@pytest.mark.parametrize("name, stored, seen", FORMATS)
def test_pictures_of_every_format_are_opened_upright_and_in_colour(tmp_path, name, stored, seen):
    """Also after EXIF orientation 6: the camera's top row is the right-hand side of the scene."""
    image = stored
    if isinstance(stored, np.ndarray):
        image = Image.fromarray(stored)
    image.save(tmp_path / name)
    if name.endswith("png"):
        exif = Image.Exif()
        exif[0x0112] = 6
        turned = image.transpose(Image.Transpose.ROTATE_90)
        turned.save(tmp_path / f"turned-{name}", exif=exif)
    expected = np.minimum(seen, 255)[..., None]  # the same in red, green and blue
    for path in tmp_path.iterdir():
        opened = open_picture(path)
        assert opened.mode == "RGB"
        assert np.abs(np.float32(opened) - expected).max() <= 1


@pytest.mark.parametrize("pixels", [[[-0.1, 1]], [[0, np.nan]], [[0, np.inf]]])
def test_pixels_whose_range_is_unknown_are_refused(tmp_path, pixels):
    Image.fromarray(np.float32(pixels)).save(tmp_path / "a.tif")
    with pytest.raises(BadInput, match="a.tif: .*pixels below 0, or not numbers"):
        open_picture(tmp_path / "a.tif")


def test_a_sound_picture_whose_exif_block_is_broken_stays_as_it_lies(tmp_path):
    """Its width is a text; its orientation would turn it."""
    width = struct.pack("<HHI4s", 0x0100, 2, 4, b"abc\0")
    orientation = struct.pack("<HHI4s", 0x0112, 3, 1, b"\6\0\0\0")
    header = b"Exif\0\0" + struct.pack("<2sHIH", b"II", 42, 8, 2)
    exif = header + width + orientation + bytes(4)
    Image.fromarray(GREY).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(open_picture(tmp_path / "a.png"))[..., 0], GREY)


def test_a_sound_picture_with_two_megabytes_of_notes_is_opened(tmp_path):
    notes = PngImagePlugin.PngInfo()
    notes.add_text("software", "x" * 2_000_000, zip=True)
    Image.fromarray(GREY).save(tmp_path / "a.png", pnginfo=notes)
    assert np.array_equal(np.asarray(open_picture(tmp_path / "a.png"))[..., 0], GREY)


def test_boxes_belong_to_the_picture_that_is_named_in_the_file(tmp_path):
    """Annotation tools count images from 1; COCO's image_id is the number in file_name."""
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps({
        "images": [
            {"id": 1, "file_name": "000000000003.png"}, {"id": 9, "file_name": "COCO_x_9.jpg"}],
        "annotations": [
            {"image_id": 1, "bbox": [1, 2, 3, 4]}, {"image_id": 9, "bbox": [9, 2, 3, 4]}]}))
    boxes = {image_id: each.tolist() for image_id, each in read_boxes(file).items()}
    assert boxes == {"3": [[1, 2, 4, 6]], "9": [[9, 2, 12, 6]]}


def test_what_is_no_picture_costs_itself_and_nothing_else(tmp_path, weights, capsys):
    """Of a folder, of those below it, and of those that it links to."""
    folder = tmp_path / "[images]"
    linked = tmp_path / "other"
    store = tmp_path / "store"
    folder.mkdir()
    (linked / "deep").mkdir(parents=True)
    (folder / "link").symlink_to(linked, target_is_directory=True)
    sound = linked / "deep" / "b.JPG"
    noise(1, (400, 300)).save(sound, "JPEG")
    noise(0).save(os.fsencode(folder) + b"/caf\xe9.png")  # a name that is not UTF-8
    (folder / "cut.jpg").write_bytes(sound.read_bytes()[:30_000])
    noise(2, (1, 500)).save(folder / "thin.png")
    Image.new("1", (20_000, 10_000)).save(folder / "huge.png")  # 200 million pixels
    noise(3).save(folder / "torn.png")
    torn = bytearray((folder / "torn.png").read_bytes())
    torn[5000:5050] = bytes(50)  # in the middle; its end is there
    (folder / "torn.png").write_bytes(torn)
    noise(4).save(folder / "._a.png")  # hidden, as macOS leaves them on foreign disks
    main(flags(folder, store, weights))
    said = capsys.readouterr().out
    assert f"2 of 6 pictures extracted; {store}/failed.txt lists the others" in said
    lines = (store / "failed.txt").read_text().splitlines()
    reasons = dict(line.split("\t") for line in lines)
    assert list(reasons) == ["cut", "huge", "thin", "torn"]
    assert re.search(r"cut\..*not a picture that can be read", reasons["cut"])
    assert re.search(r"huge\..*not a picture that can be read", reasons["huge"])
    assert re.search(r"torn\..*not a picture that can be read", reasons["torn"])
    assert "a strip of (1, 500) pixels" in reasons["thin"]
    opened = FeatureStore(store)
    assert opened.row("cut") is None
    assert opened[opened.row("b")]["size"] == (400, 300)


def test_the_same_command_tries_failed_pictures_again(tmp_path, weights, capsys):
    """The disk, not the picture, may have been at fault."""
    folder = tmp_path / "images"
    store = tmp_path / "store"
    folder.mkdir()
    noise(1).save(folder / "a.png")
    (folder / "b.png").touch()
    (folder / "c.png").touch()
    main(flags(folder, store, weights))
    before = np.array(FeatureStore(store)[0]["features"])
    noise(2).save(folder / "b.png")
    main(flags(folder, store, weights))
    said = capsys.readouterr().out
    assert f"{store}: 2 of 3 pictures to extract" in said
    assert f"{store}: 2 of 3 pictures extracted" in said
    failed = (store / "failed.txt").read_text()
    assert [line.split("\t")[0] for line in failed.splitlines()] == ["c"]
    opened = FeatureStore(store)
    assert np.array_equal(opened[0]["features"], before)
    assert opened.row("b") == 1


# --- What is refused ------------------------------------------------------------------------------

BOXES = "images --boxes b.json"
WEIGHTS = "images --weights w.pt"
VG = "images --detector vg --weights"
MISSING = r" \(.* is missing\)$"
VG_HELP = ("download pytorch_model.bin from https://huggingface.co/unc-nlp/frcnn-vg-finetuned "
    "and name it with --weights")


@pytest.mark.parametrize("command, file, text, problem", [
    (BOXES, "b.json", "{", "b.json: not "),
    (BOXES, "b.json", "5", "b.json: not "),
    (BOXES, "b.json", '[{"image_id": 3}]', "b.json: not "),
    (BOXES, "b.json", '[{"image_id": 3, "box": [NaN, 5, 5, 20]}]', "b.json: not "),
    (BOXES, "b.json", '[{"image_id": 3, "box": [1e39, 5, 5, 20]}]', "b.json: not "),
    (BOXES, "b.json", "[" * 100_000, "b.json: not "),
    (BOXES, "b.json", "[]", "b.json: images: 0 of 0 found in images"),
    (BOXES, None, "", "b.json: not .*" + MISSING),
    ("images", None, "", "0 of 1 pictures extracted; for example, images/1.jpg: not a picture"),
    ("gone.jpg", None, "", "gone.jpg: expected a picture or a folder of pictures, found none"),
    ("images/empty", None, "", "images/empty: expected a picture or a folder of pictures"),
    ("images", "images/1.png", "", "'1' is the id of two images"),
    (WEIGHTS, None, "", "w.pt: not the weights of the toy detector; train.py .*" + MISSING),
    (WEIGHTS, "w.pt", {"x": torch.zeros(1)}, "w.pt: not the weights.*Missing"),
    (WEIGHTS, "w.pt", "version https://git-lfs.github.com", "w.pt: not the weights"),
    (f"{VG}=", None, "", f"--weights: the vg detector needs its weights; {VG_HELP}$"),
    (f"{VG} v.bin", None, "", f"v.bin: not the weights of the vg detector; {VG_HELP}{MISSING}"),
    (f"{VG} v.bin", "v.bin", "x", f"v.bin: not the weights of the vg detector; {VG_HELP} \\("),
    ("images --classes n.txt", "n.txt", "one\ntwo\n", "n.txt: not 48 class names.*found 2"),
    ("images --classes n.txt", None, "", "n.txt: not 48 class names, one per line" + MISSING),
    ("images --regions 0", None, "", r"--regions: invalid 1\.\.\.1e\+09 value: '0'")])
def test_what_cannot_be_extracted_is_refused_in_one_sentence_and_leaves_nothing(
        tmp_path, monkeypatch, capsys, weights, command, file, text, problem):
    """No store and no folder, not even an empty one."""
    monkeypatch.chdir(tmp_path)
    Path("images/empty").mkdir(parents=True)
    Path("images/1.jpg").touch()
    if isinstance(text, dict):
        torch.save(text, file)
    elif file:
        Path(file).write_text(text)
    before = set(tmp_path.rglob("*"))
    images, *more = command.split()
    with pytest.raises(SystemExit) as end:
        run(lambda _: main(flags(images, "new/store", weights, *more)))
    said = " ".join(capsys.readouterr().err.split())
    assert end.value.code in (1, 2)
    assert re.search(problem, said), said
    assert "Errno" not in said
    assert set(tmp_path.rglob("*")) == before


def test_pictures_and_store_have_a_folder_each(tmp_path, weights):
    """A store's folder is left out where pictures are searched: no run could go on."""
    noise(1).save(tmp_path / "a.png")
    (tmp_path / "photos").mkdir()
    for images in (tmp_path, tmp_path / "photos"):
        with pytest.raises(BadInput, match="the pictures are there"):
            main(flags(images, tmp_path / "x/..", weights))


def test_processes_that_torchrun_started_are_refused(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(extract_features, "WORLD_SIZE", 2)
    with pytest.raises(BadInput, match="without torchrun; --gpus N starts the others"):
        main(flags(tmp_path, tmp_path / "store", weights))


def test_a_missing_picture_or_store_is_called_missing(detector, tmp_path):
    with pytest.raises(BadInput, match="a.jpg: not a picture that can be read" + MISSING):
        picture_regions(detector, tmp_path / "a.jpg", 8)
    with pytest.raises(BadInput, match="gone: not a feature store; .* writes one" + MISSING):
        draw_regions(tmp_path / "gone", "3")


def test_a_failed_command_keeps_what_was_there_before(tmp_path, weights, pictures):
    cut = tmp_path / "cut.jpg"
    cut.touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.txt").touch()
    for out in (folder, folder / "new"):
        with pytest.raises(BadInput, match="0 of 1 pictures extracted"):
            main(flags(cut, out, weights))
        assert [path.name for path in folder.glob("[!.]*")] == ["mine.txt"]
    main(flags(pictures, folder, weights))
    before = content(folder)
    with pytest.raises(BadInput, match="holds a feature store of other images"):
        main(flags(cut, folder, weights))
    assert content(folder) == before


def test_a_store_that_an_earlier_run_began_keeps_its_reasons(tmp_path, weights, detector):
    """So a command that is repeated says again why it failed."""
    cut = tmp_path / "cut.jpg"
    cut.touch()
    FeatureStore.create(tmp_path / "store", [cut], num_regions=36, precision="fp32",
        boxes_file=None, **detector.about)
    for _ in range(2):
        with pytest.raises(BadInput, match="for example, .*cut.jpg: not a picture"):
            main(flags(cut, tmp_path / "store", weights))


# --- Extraction -----------------------------------------------------------------------------------


def test_features_of_given_boxes_are_stored_in_their_order(
        tmp_path, weights, detector, pictures, capsys):
    """Pictures without boxes are left out. A box is cut where it leaves its picture, of 90 x 60, by
    more than a pixel, which is rounding; a box that lies outside fails its picture.
    """
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps({"annotations": [
        {"image_id": 3, "bbox": [10, 20, 30.5, 15]}, {"image_id": 3, "bbox": [-0.5, 0, 90.5, 60.5]},
        {"image_id": 3, "bbox": [1, 1, 95, 9]}, {"image_id": 2, "bbox": [90, 1, 9, 9]}]}))
    main(flags(pictures, tmp_path / "store", weights, "--boxes", file))
    store = FeatureStore(tmp_path / "store")
    assert len(store) == 2
    without = len(list(pictures.iterdir())) - 2
    assert f"left out: {without} pictures without boxes" in capsys.readouterr().out
    assert store.num_regions == 3
    given = np.float32([[10, 20, 40.5, 35], [-0.5, 0, 90, 60.5], [1, 1, 90, 10]])
    _, features, _ = regions(detector, batch_of(noise(3)), 9, given)[0]
    record = store[store.row("3")]
    assert np.array_equal(record["boxes"], given)
    assert np.array_equal(record["features"], features.astype(np.float16))
    failed = (tmp_path / "store" / "failed.txt").read_text()
    assert re.fullmatch(r"2\t.*a box outside its picture of \(90, 60\) pixels.*\n", failed)


def interrupt(monkeypatch, stop, call):
    """call(), interrupted half-way through the write of row `stop`."""
    write_row = StoreWriter.write

    def write(writer, row, features, boxes, size):
        if row == stop:
            writer.arrays["features"][row, :1] = 7
            raise KeyboardInterrupt
        write_row(writer, row, features, boxes, size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StoreWriter, "write", write)
        call()


def test_a_store_of_scenes_that_was_interrupted_goes_on_to_the_same_bytes(
        detector, tmp_path, monkeypatch):
    """In whole batches of 16, whatever is missing."""
    numbers = list(range(40, 60))
    extract_scenes(detector, numbers, tmp_path / "whole")
    parts = tmp_path / "parts"
    interrupt(monkeypatch, 6, lambda: extract_scenes(detector, numbers, parts))
    batches = []

    def draw(batch):
        batches.append(batch)
        return draw_scenes(batch)

    monkeypatch.setattr(extract_features, "draw_scenes", draw)
    extract_scenes(detector, numbers, parts)
    assert batches == [numbers[:16], numbers[16:]]
    assert content(tmp_path / "whole") == content(parts)


def test_a_store_of_scenes_has_the_boxes_and_classes_of_the_detector(detector, tmp_path):
    numbers = list(range(40, 60))
    store = extract_scenes(detector, numbers, tmp_path / "store")
    assert store.num_region_classes == 49
    assert store.class_names[0] == "background"
    assert set(store.counts) == {1}  # with random weights no class reaches 20 %
    for row in (0, 19):
        boxes, _, _ = regions(detector, draw_scenes([numbers[row]]) / 255, 8)[0]
        np.testing.assert_allclose(store[row]["boxes"], boxes, rtol=1e-3, atol=1e-3)


def test_a_scene_that_cannot_be_stored_stops_the_extraction(detector, tmp_path, monkeypatch):
    """No scene is unusable, so the detector is."""
    box = np.float32([[1, 1, 9, 9]])
    nan = np.full((1, 128), np.nan)
    monkeypatch.setattr(extract_features, "regions", lambda *_: [(box, nan, None)])
    with pytest.raises(BadInput, match="image 7: .* NaN"):
        extract_scenes(detector, [7], tmp_path / "bad")


def test_pictures_in_two_runs_make_the_same_bytes(
        weights, pictures, undisturbed, tmp_path, monkeypatch):
    argv = flags(pictures, tmp_path / "store", weights)
    interrupt(monkeypatch, 2, lambda: main(argv))
    main(argv)
    assert content(tmp_path / "store") == content(undisturbed)


def test_pictures_in_two_processes_make_the_same_bytes(
        weights, pictures, undisturbed, tmp_path, monkeypatch):
    """Also if the second process starts when the first one has ended."""
    store = tmp_path / "store"
    argv = flags(pictures, store, weights, "--gpus", 2)
    pending = []

    def children(count):
        for rank in range(count):
            with monkeypatch.context() as patch:
                patch.setattr(extract_features, "RANK", rank)
                patch.setattr(extract_features, "WORLD_SIZE", count)
                main(argv)
            meta = json.loads((store / "store.json").read_text())
            assert not meta["complete"]  # the parent finishes it
            counts = np.load(store / "counts.npy")
            pending.append((counts < 0).sum())

    monkeypatch.setattr(extract_features, "start_processes", children)
    main(argv)
    assert pending == [3, 0]
    assert content(store) == content(undisturbed)


def written(store):
    """How many rows a store has so far. store.json comes last: then all its arrays are whole."""
    if not (store / "store.json").exists():
        return 0
    return (np.load(store / "counts.npy") >= 0).sum()


@pytest.mark.slow
@pytest.mark.parametrize("end, sign, status, more", [
    (os.kill, signal.SIGKILL, -9, []),
    (os.killpg, signal.SIGINT, 130, []),
    (os.killpg, signal.SIGTERM, 130, []),
    (os.kill, signal.SIGTERM, 130, ["--gpus", "2"])])
def test_two_processes_go_on_where_another_one_was_stopped(
        weights, tmp_path, end, sign, status, more):
    """Its loading process, in the same group, does not report that it was killed."""
    images = tmp_path / "images"
    store = tmp_path / "store"
    images.mkdir()
    for i in range(200):
        noise(i).save(images / f"{i}.png")
    main(flags(images, tmp_path / "whole", weights))
    command = [sys.executable, extract_features.__file__]
    command += flags(images, store, weights, "--workers", 1)
    one_thread = dict(os.environ, OMP_NUM_THREADS="1")
    process = subprocess.Popen(command + more, env=one_thread, start_new_session=True,
        stderr=subprocess.PIPE, text=True)
    while written(store) < 60:
        assert process.poll() is None
    end(process.pid, sign)
    _, said = process.communicate(timeout=50)
    assert process.returncode == status
    assert "out of memory" not in said
    # It can also complain that nobody takes its last picture.
    assert status < 0 or said.splitlines()[-1].startswith("stopped; repeat the command")
    subprocess.run(command + ["--gpus", "2"], check=True, env=one_thread)
    assert content(tmp_path / "whole") == content(store)


def test_a_store_may_go_on_with_the_same_weights_under_another_name(
        weights, pictures, undisturbed, tmp_path):
    (tmp_path / "renamed.pt").write_bytes(weights.read_bytes())
    main(flags(pictures, undisturbed, tmp_path / "renamed.pt"))


def test_a_store_records_what_makes_its_features_and_refuses_other_settings(
        weights, pictures, undisturbed, tmp_path):
    changed = torch.load(weights, weights_only=True)
    changed["roi_heads.box_predictor.cls_score.bias"] += 1
    torch.save(changed, tmp_path / "other.pt")
    with pytest.raises(BadInput, match="differs in .*class_bias"):
        main(flags(pictures, undisturbed, tmp_path / "other.pt"))
    with pytest.raises(BadInput, match="differs in .*precision"):
        main(flags(pictures, undisturbed, weights, "--precision", "bf16"))


def test_every_flag_of_an_extraction_has_its_effect(tmp_path, weights, detector, pictures):
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps([
        {"image_id": 3, "box": [1, 1, 9, 9], "score": 0.2},
        {"image_id": 3, "box": [10, 20, 30.5, 15], "score": 0.9}]))
    names = tmp_path / "names.txt"
    names.write_text("".join(f"thing {i}\n" for i in range(48)))
    main(flags(pictures, tmp_path / "store", weights, "--precision", "bf16", "--workers", 1,
        "--regions", 1, "--boxes", boxes, "--classes", names))
    store = FeatureStore(tmp_path / "store")
    assert len(store) == 1
    assert store.class_names[1] == "thing 0"
    assert store.num_regions == 1
    assert store.meta["boxes_file"] == "boxes.json"
    surest = np.float32([[10, 20, 40.5, 35]])
    _, half, _ = regions(detector, batch_of(noise(3)), 1, surest, "bf16")[0]
    _, whole, _ = regions(detector, batch_of(noise(3)), 1, surest, "fp32")[0]
    assert np.array_equal(store[0]["features"], half.astype(np.float16))
    assert not np.array_equal(half, whole)


def test_boxes_are_exact_in_lower_precision(detector, monkeypatch):
    """bf16 has 8 bits: from 512 on its numbers lie 4 apart, and 899 becomes 900."""
    monkeypatch.setattr(detector.transform, "min_size", (600,))
    monkeypatch.setattr(detector.transform, "max_size", 899)
    image = batch_of(noise(3, (1798, 1200)))
    boxes, _, _ = regions(detector, image, 16, None, "bf16")[0]
    halved = torch.from_numpy(boxes / 2)  # in the pixels that the detector sees
    rounded = halved.bfloat16().float()
    assert not torch.allclose(rounded, halved, atol=1e-4, rtol=0)
    assert (boxes <= [1798.01, 1200.01, 1798.01, 1200.01]).all()


# --- A look at a store ----------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: the arguments (image, boxes, labels, colours) of torchvision's function."""
    calls = []
    draw = extract_features.draw_bounding_boxes

    def record(*args):
        calls.append(args)
        return draw(*args)

    monkeypatch.setattr(extract_features, "draw_bounding_boxes", record)
    return calls


def dimmed(image, size):
    """A picture as it is drawn below its boxes."""
    return pil_to_tensor(image.resize(size)) // 2


def test_show_writes_a_picture_of_1000_pixels(undisturbed, tmp_path):
    main(["show", str(undisturbed), "3", "-o", str(tmp_path / "r.png")])
    assert Image.open(tmp_path / "r.png").size == (1000, 666)
    with pytest.raises(BadInput, match="has no features of an image '77'"):
        draw_regions(undisturbed, "77")


def test_show_draws_a_picture_or_a_scene_or_grey(undisturbed, detector, pictures, tmp_path, drawn):
    draw_regions(undisturbed, pictures / "COCO_train2014_000000000003.png")
    assert torch.equal(drawn[-1][0], dimmed(noise(3), (500, 333)))
    draw_regions(undisturbed, "3")
    grey = Image.new("RGB", (90, 60), "grey")
    assert torch.equal(drawn[-1][0], dimmed(grey, (500, 333)))
    extract_scenes(detector, [7], tmp_path / "scenes")
    draw_regions(tmp_path / "scenes", "7")
    image, _, labels, _ = drawn[-1]
    assert torch.equal(image, dimmed(Scene(7).draw(4), (500, 500)))
    assert labels[0].rsplit(" ", 1)[0] in TOY_CLASSES[1:]


def test_show_labels_each_box_with_its_best_class(store, drawn):
    """The best region comes last, on top; the background is no class."""
    draw_regions(store.folder, "3")
    _, boxes, labels, _ = drawn.pop()
    np.testing.assert_allclose(boxes.flip(0), store[3]["boxes"] * 500 / 100, rtol=1e-6)
    things = store.class_probs(3)[:, 1:]
    expected = [f"class {1 + p.argmax()} {p.max():.2f}" for p in things]
    assert labels[::-1] == expected


def test_show_draws_boxes_alone_where_a_store_has_no_classes(tmp_path, drawn):
    writer = FeatureStore.create(tmp_path, ["a"], num_regions=1, feature_size=2)
    writer.write(0, np.ones((1, 2)), np.float32([[1, 1, 5, 5]]), (9, 9))
    draw_regions(writer.finish().folder, "a")
    _, _, labels, _ = drawn.pop()
    assert labels is None
