"""What extract_features.py promises: the toy detector, the choice of regions, pictures of every
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
from extract_features import (TOY_REGIONS, build_detector, draw_scenes,
    extract_scenes, main, open_picture, regions, select_regions, show, toy_detector, toy_targets,
    train_toy_detector)


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
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of five sound pictures, ids 0 to 4, and one that is cut off."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(5):
        noise(i).save(folder / f"COCO_train2014_{i:012d}.png")
    (folder / "zz_cut.png").write_bytes(noise(0).tobytes())
    return folder


def flags(images, out, weights, *more):
    return [str(x) for x in (images, "-o", out, "--detector", "toy", "--weights", weights,
        "--workers", 0, *more)]


def same_store(one, two):
    files = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (one, two)]
    return "features.npy" in files[0] and files[0] == files[1]


def select_slowly(boxes, probs, most, confidence):
    """Anderson's rule, class by class."""
    best = torch.zeros(len(boxes))
    for scores in probs.T[1:]:
        kept = nms(boxes, scores, 0.3)
        best[kept] = best[kept].maximum(scores[kept])
    order = best.argsort(descending=True, stable=True)
    return order[: min(most, max(1, (best >= confidence).sum()))].tolist()


@pytest.mark.parametrize("most, confidence", [(8, 0.2), (20, 0), (30, 0.9)])
def test_regions_are_chosen_by_andersons_rule(most, confidence):
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        corner = torch.rand(20, 2, generator=generator) * 60
        size = 10 + torch.rand(20, 2, generator=generator) * 40
        boxes = torch.cat([corner, corner + size], dim=1)
        probs = (4 * torch.randn(20, 6, generator=generator)).softmax(dim=1)
        found = select_regions(boxes, probs, most, confidence).tolist()
        assert found == select_slowly(boxes, probs, most, confidence)


def test_the_targets_of_a_scene_are_its_things():
    things, targets = Scene(5).things, toy_targets(Scene(5))
    assert [tuple(box) for box in targets["boxes"].tolist()] == [t.box for t in things]
    names = [f"{t.colour} {t.shape}" for t in things]
    assert [TOY_CLASSES[label] for label in targets["labels"]] == names


def test_a_few_steps_of_training_lower_the_loss():
    images, targets, losses = draw_scenes(range(16)), [toy_targets(Scene(n)) for n in range(16)], []
    for iterations in (1, 25):
        model = train_toy_detector(range(16), iterations, batch=4)
        with torch.no_grad():
            losses.append(sum(model(list(images / 255), targets).values()).item())
    assert losses[1] < 0.6 * losses[0]


@pytest.mark.slow
def test_the_toy_detector_finds_and_names_the_things_of_held_out_scenes(tmp_path, capsys):
    """A thing is found by a region with IoU >= .5, and named if the best of these has its class."""
    model = toy_detector(tmp_path / "detector.pt", range(4000))
    assert re.fullmatch(r"detector: trained in \d+ s\n", capsys.readouterr().out)
    things = found = named = 0
    for number in range(HELD_OUT_SCENES, HELD_OUT_SCENES + 200):
        targets = toy_targets(Scene(number))
        boxes, _, probs = regions(model, draw_scenes([number]) / 255, TOY_REGIONS)[0]
        overlap = box_iou(targets["boxes"], torch.from_numpy(boxes)).numpy() >= 0.5
        for label, near in zip(targets["labels"], overlap):
            things += 1
            if near.any():
                found += 1
                named += int(probs[near.argmax(), 1:].argmax() + 1 == label)
    assert found / things > 0.99 and named / things > 0.97


GREY = np.arange(60, dtype=np.uint8).reshape(6, 10)
RGB = Image.fromarray(np.dstack([GREY] * 3))
KINDS = [("grey.png", GREY, GREY), ("bits16.png", GREY.astype(np.uint16) * 256 + 99, GREY),
    ("bit.png", GREY > 30, 255 * (GREY > 30)), ("rgba.png", np.dstack([GREY] * 4), GREY),
    ("palette.gif", RGB.quantize(60), GREY), ("ink.tif", RGB.convert("CMYK"), GREY),
    ("float1.tif", np.float32(GREY / 255), GREY), ("float255.tif", np.float32(GREY), GREY),
    ("float256.tif", np.minimum(GREY, 50) * np.float32(5.12), np.minimum(GREY, 50) * 5.12),
    ("int255.tif", np.int32(GREY) + 200, GREY + 200.0),
    ("int.tif", np.int32(GREY) * 1000, GREY * (255 / 59))]  # the brightest is white


@pytest.mark.parametrize("name, stored, seen", KINDS)
def test_pictures_of_every_kind_are_opened_upright_and_in_colour(tmp_path, name, stored, seen):
    """Also after EXIF orientation 6: the camera's top row is the right-hand side of the scene."""
    exif = Image.Exif()
    exif[0x0112] = 6
    seen = np.minimum(seen, 255)
    image = stored if isinstance(stored, Image.Image) else Image.fromarray(stored)
    image.save(tmp_path / name)
    if name.endswith("png"):
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / f"turned-{name}", exif=exif)
    for path in tmp_path.iterdir():
        found = open_picture(path)
        assert found.mode == "RGB" and np.abs(np.float32(found) - seen[..., None]).max() <= 1


@pytest.mark.parametrize("pixels", [[[-0.1, 1]], [[0, np.nan]], [[0, np.inf]]])
def test_pixels_whose_range_is_unknown_are_refused(tmp_path, pixels):
    Image.fromarray(np.float32(pixels)).save(tmp_path / "a.tif")
    with pytest.raises(BadInput, match="a.tif: .*pixels below 0, or not numbers"):
        open_picture(tmp_path / "a.tif")


def test_sound_pictures_with_odd_notes_are_opened(tmp_path):
    """An EXIF width that is a text: it stays as it lies. Two megabytes of text in a PNG."""
    width, orientation = (0x0100, 2, 4, b"abc\0"), (0x0112, 3, 1, b"\6\0\0\0")
    entries = b"".join(struct.pack("<HHI4s", *entry) for entry in (width, orientation))
    exif = b"Exif\0\0" + struct.pack("<2sHIH", b"II", 42, 8, 2) + entries + bytes(4)
    notes = PngImagePlugin.PngInfo()
    notes.add_text("software", "x" * 2_000_000, zip=True)
    Image.fromarray(GREY).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(GREY).save(tmp_path / "b.png", pnginfo=notes)
    for path in tmp_path.iterdir():
        assert np.array_equal(np.asarray(open_picture(path))[..., 0], GREY)


def test_boxes_belong_to_the_picture_that_is_named_in_the_file(tmp_path):
    """Annotation tools count images from 1; COCO's image_id is the number in file_name."""
    images = [{"id": 1, "file_name": "000000000003.png"}, {"id": 9, "file_name": "COCO_x_9.jpg"}]
    boxes = [{"image_id": i, "bbox": [i, 2, 3, 4]} for i in (1, 9)]
    (tmp_path / "b.json").write_text(json.dumps({"images": images, "annotations": boxes}))
    found = extract_features.read_boxes(tmp_path / "b.json")
    assert {name: box.tolist() for name, box in found.items()} == {
        "3": [[1, 2, 4, 6]], "9": [[9, 2, 12, 6]]}


def test_what_is_no_picture_costs_itself_and_nothing_else(tmp_path, weights, capsys):
    """Of a folder, of those below it, and of those that it links to."""
    folder, other, out = tmp_path / "[images]", tmp_path / "other" / "deep", tmp_path / "store"
    folder.mkdir()
    other.mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path / "other", target_is_directory=True)
    noise(1, (400, 300)).save(other / "b.JPG", "JPEG")
    (folder / "cut.jpg").write_bytes((other / "b.JPG").read_bytes()[:30_000])
    noise(2, (1, 500)).save(folder / "thin.png")
    Image.new("1", (20_000, 10_000)).save(folder / "huge.png")  # 200 million pixels
    noise(0).save(os.fsencode(folder) + b"/caf\xe9.png")  # a name that is not UTF-8
    noise(4).save(folder / "._a.png")  # hidden, as macOS leaves them on foreign disks
    main(flags(folder, out, weights))
    said = capsys.readouterr().out
    assert f"2 of 5 pictures extracted; {out}/failed.txt lists the others" in said
    failed = dict(line.split("\t") for line in (out / "failed.txt").read_text().splitlines())
    assert list(failed) == ["cut", "huge", "thin"]
    for name in ("cut", "huge"):
        assert f"{name}." in failed[name] and "not a picture that can be read" in failed[name]
    assert "a strip of (1, 500) pixels" in failed["thin"]
    store = FeatureStore(out)
    assert store.row("cut") is None and store[store.row("b")]["size"] == (400, 300)


NOT_BOXES = ("{", "5", '[{"image_id": 3}]', '[{"image_id": 3, "box": [NaN, 5, 5, 20]}]',
    '[{"image_id": 3, "box": [1e39, 5, 5, 20]}]', "[" * 100_000)


@pytest.mark.parametrize("argv, name, content, problem", [
    *(("images --boxes b.json", "b.json", content, "b.json: not ") for content in NOT_BOXES),
    ("images --boxes b.json", "b.json", "[]", "b.json: images: 0 of 0 found in images"),
    ("images", None, "", "0 of 1 .* extracted; store/failed.txt lists the oth"),
    ("gone", None, "", "gone: found no pictures"),
    ("images --weights w.pt", "w.pt", {"x": torch.zeros(1)}, "w.pt: not the weights.*Missing"),
    ("images --weights w.pt", "w.pt", "version https://git-lfs.github.com", "w.pt: not the weig"),
    ("images --classes n.txt", "n.txt", "one\ntwo\n", "n.txt: not 48 class names.*found 2"),
    ("images --regions 0", None, "", r"--regions: invalid 1\.\.\.1e\+09 value: '0'")])
def test_what_cannot_be_extracted_is_refused_in_one_sentence(
        tmp_path, monkeypatch, capsys, weights, argv, name, content, problem):
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Path("images/1.jpg").touch()
    if isinstance(content, dict):
        torch.save(content, name)
    elif name:
        Path(name).write_text(content)
    source, *more = argv.split()
    with pytest.raises(SystemExit) as end:
        run(lambda: main(flags(source, "store", weights, *more)))
    said = " ".join(capsys.readouterr().err.split())
    assert end.value.code in (1, 2) and re.search(problem, said), said


def test_features_of_given_boxes_are_stored_in_their_order(tmp_path, weights, detector, pictures):
    """Pictures without boxes are left out. A box is cut where it leaves its picture, of 90 x 60, by
    more than a pixel, which is rounding; a box that lies outside fails its picture.
    """
    boxes = {3: [[10, 20, 30.5, 15], [-0.5, 0, 90.5, 60.5], [1, 1, 95, 9]], 2: [[90, 1, 9, 9]]}
    annotations = [dict(image_id=i, bbox=box) for i, each in boxes.items() for box in each]
    (tmp_path / "boxes.json").write_text(json.dumps({"annotations": annotations}))
    main(flags(pictures, tmp_path / "store", weights, "--boxes", tmp_path / "boxes.json"))
    store = FeatureStore(tmp_path / "store")
    assert (len(store), store.num_regions) == (2, 3)
    given = np.float32([[10, 20, 40.5, 35], [-0.5, 0, 90, 60.5], [1, 1, 90, 10]])
    expected = regions(detector, pil_to_tensor(noise(3))[None] / 255, 9, given)[0]
    record = store[store.row("3")]
    assert np.array_equal(record["boxes"], given)
    assert np.array_equal(record["features"], expected[1].astype(np.float16))
    failed = (tmp_path / "store" / "failed.txt").read_text()
    assert re.fullmatch(r"2\t.*a box outside its picture of \(90, 60\) pixels.*\n", failed)


@pytest.fixture(scope="module")
def undisturbed(weights, pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "store"
    main(flags(pictures, out, weights))
    return out


def interrupt(monkeypatch, stop, call, *args):
    """call(*args), interrupted half-way through the write of row `stop`."""
    real = StoreWriter.write

    def write(writer, row, *values):
        if row == stop:
            writer.arrays["features"][row, :1] = 7
            raise KeyboardInterrupt
        real(writer, row, *values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StoreWriter, "write", write)
        call(*args)


def test_a_store_of_scenes_that_was_interrupted_goes_on_to_the_same_bytes(
        detector, tmp_path, monkeypatch):
    numbers, drawn = list(range(40, 60)), []
    store = extract_scenes(detector, numbers, tmp_path / "whole")
    interrupt(monkeypatch, 6, extract_scenes, detector, numbers, tmp_path / "parts")
    monkeypatch.setattr(extract_features, "draw_scenes",
        lambda batch: drawn.append(batch) or draw_scenes(batch))
    extract_scenes(detector, numbers, tmp_path / "parts")
    assert drawn == [numbers[:16], numbers[16:]]  # whole batches, whatever is missing
    assert same_store(tmp_path / "whole", tmp_path / "parts")
    assert store.num_region_classes == 49 and store.class_names[0] == "background"
    assert set(store.counts) == {1}  # with random weights no class reaches 20 %
    for row in (0, 19):
        alone = regions(detector, draw_scenes([numbers[row]]) / 255, 8)[0]
        np.testing.assert_allclose(store[row]["boxes"], alone[0], rtol=1e-3, atol=1e-3)
    nan = np.full((1, 128), np.nan)
    monkeypatch.setattr(extract_features, "regions", lambda *_: [(alone[0], nan, None)])
    with pytest.raises(BadInput, match="image 7: .* NaN"):  # no scene is unusable: the detector is
        extract_scenes(detector, [7], tmp_path / "bad")


def test_pictures_in_two_runs_or_two_processes_make_the_same_bytes(
        weights, pictures, undisturbed, tmp_path, monkeypatch):
    """Also if the second process starts when the first one has ended."""
    argv = flags(pictures, tmp_path / "runs", weights)
    interrupt(monkeypatch, 2, main, argv)
    main(argv)
    argv = flags(pictures, tmp_path / "processes", weights, "--gpus", 2)
    pending = []

    def children(count):
        for rank in range(count):
            with monkeypatch.context() as patch:
                patch.setattr(extract_features, "RANK", rank)
                patch.setattr(extract_features, "WORLD_SIZE", count)
                main(argv)
            whole = json.loads((tmp_path / "processes" / "store.json").read_text())["complete"]
            assert not whole  # the parent finishes it
            pending.append((np.load(tmp_path / "processes" / "counts.npy") < 0).sum())

    monkeypatch.setattr(extract_features, "start_processes", children)
    main(argv)
    assert pending == [3, 0] and same_store(undisturbed, tmp_path / "runs")
    assert same_store(undisturbed, tmp_path / "processes")


@pytest.mark.slow
@pytest.mark.parametrize("end, sign, status, more", [
    (os.kill, signal.SIGKILL, -9, []), (os.killpg, signal.SIGINT, 130, []),
    (os.killpg, signal.SIGTERM, 130, []), (os.kill, signal.SIGTERM, 130, ["--gpus", "2"])])
def test_two_processes_go_on_where_another_one_was_stopped(
        weights, tmp_path, end, sign, status, more):
    """Its loading process, in the same group, does not report that it was killed."""
    images, store = tmp_path / "images", tmp_path / "store"
    images.mkdir()
    for i in range(200):
        noise(i).save(images / f"{i}.png")
    main(flags(images, tmp_path / "whole", weights))
    command = [sys.executable, extract_features.__file__,
        *flags(images, store, weights, "--workers", 1)]
    process = subprocess.Popen([*command, *more], env=dict(os.environ, OMP_NUM_THREADS="1"),
        start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not (store / "store.json").exists() or (np.load(store / "counts.npy") >= 0).sum() < 60:
        assert process.poll() is None  # store.json comes last: all arrays are whole
    end(process.pid, sign)
    said = process.communicate(timeout=50)[1]
    assert process.returncode == status and "out of memory" not in said
    # It can also complain that nobody takes its last picture.
    assert status < 0 or said.splitlines()[-1].startswith("stopped; repeat the command")
    subprocess.run([*command, "--gpus", "2"], check=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert same_store(tmp_path / "whole", store)


def test_a_store_records_what_makes_its_features_and_refuses_other_settings(
        weights, pictures, undisturbed, tmp_path):
    (tmp_path / "renamed.pt").write_bytes(weights.read_bytes())
    main(flags(pictures, undisturbed, tmp_path / "renamed.pt"))  # a name makes no other detector
    changed = torch.load(weights, weights_only=True)
    changed["roi_heads.box_predictor.cls_score.bias"] += 1
    torch.save(changed, other := tmp_path / "other.pt")
    for argv, key in (([other], "class_bias"), ([weights, "--precision", "bf16"], "precision")):
        with pytest.raises(BadInput, match=f"differs in .*{key}"):
            main(flags(pictures, undisturbed, *argv))


def test_every_flag_of_an_extraction_has_its_effect(tmp_path, weights, detector, pictures):
    given = tmp_path / "boxes.json"
    given.write_text(json.dumps([{"image_id": 3, "box": [1, 1, 9, 9], "score": 0.2},
        {"image_id": 3, "box": [10, 20, 30.5, 15], "score": 0.9}]))  # --regions 1: the surest
    (tmp_path / "names.txt").write_text("".join(f"thing {i}\n" for i in range(48)))
    main(flags(pictures, tmp_path / "store", weights, "--precision", "bf16", "--workers", 1,
        "--regions", 1, "--boxes", given, "--classes", tmp_path / "names.txt"))
    store = FeatureStore(tmp_path / "store")
    assert len(store) == 1 and store.class_names[1] == "thing 0" and store.num_regions == 1
    assert store.meta["boxes_file"] == "boxes.json"
    box = np.float32([[10, 20, 40.5, 35]])
    half, whole = (regions(detector, pil_to_tensor(noise(3))[None] / 255, 1, box, p)[0][1]
        for p in ("bf16", "fp32"))
    assert np.array_equal(store[0]["features"], half.astype(np.float16))
    assert not np.array_equal(half, whole)


def test_boxes_are_exact_in_lower_precision(detector, monkeypatch):
    """bf16 has 8 bits: from 512 on its numbers lie 4 apart, and 899 becomes 900."""
    monkeypatch.setattr(detector.transform, "min_size", (600,))
    monkeypatch.setattr(detector.transform, "max_size", 899)
    image = pil_to_tensor(noise(3, (1798, 1200)))[None] / 255
    boxes, _, _ = regions(detector, image, 16, None, "bf16")[0]
    rounded = torch.from_numpy(boxes / 2).bfloat16().float().numpy()
    assert not np.allclose(rounded, boxes / 2, atol=1e-4, rtol=0)
    assert (boxes <= [1798.01, 1200.01] * 2).all()


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: the arguments (image, boxes, labels, colours) of torchvision's function."""
    calls, draw = [], extract_features.draw_bounding_boxes
    monkeypatch.setattr(extract_features, "draw_bounding_boxes",
        lambda *args: calls.append(args) or draw(*args))
    return calls


def test_show_draws_a_picture_or_a_scene_or_grey(undisturbed, detector, pictures, tmp_path, drawn):
    main(["show", str(undisturbed), "3", "-o", str(tmp_path / "r.png")])
    assert Image.open(tmp_path / "r.png").size == (1000, 666)
    with pytest.raises(BadInput, match="has no features of an image '77'"):
        show(undisturbed, "77")
    for which, expected in ((pictures / "COCO_train2014_000000000003.png", noise(3)),
            ("3", Image.new("RGB", (90, 60), "grey"))):
        show(undisturbed, which)
        assert np.array_equal(drawn[-1][0], pil_to_tensor(expected.resize((500, 333))) // 2)
    extract_scenes(detector, [7], tmp_path / "scenes")
    show(tmp_path / "scenes", "7")
    assert np.array_equal(drawn[-1][0], pil_to_tensor(Scene(7).draw(4).resize((500, 500))) // 2)
    assert drawn[-1][2][0].rsplit(" ", 1)[0] in TOY_CLASSES[1:]


def test_show_labels_each_box_with_its_best_class(store, tmp_path, drawn):
    """The best region comes last, on top; the background is no class."""
    show(store.folder, "3")
    _, boxes, labels, _ = drawn.pop()
    np.testing.assert_allclose(boxes.flip(0), store[3]["boxes"] * 500 / 100, rtol=1e-6)
    things = store.class_probs(3)[:, 1:]
    assert labels[::-1] == [f"class {1 + p.argmax()} {p.max():.2f}" for p in things]
    writer = FeatureStore.create(tmp_path, ["a"], 1, 2)  # without classes
    writer.write(0, np.ones((1, 2)), np.float32([[1, 1, 5, 5]]), (9, 9))
    show(writer.finish().folder, "a")
    assert drawn.pop()[2] is None
