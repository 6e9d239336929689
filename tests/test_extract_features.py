"""What extract_features.py promises: the toy detector, the choice of regions, pictures of every
kind, given boxes, stores that survive interruptions, and a look at a store.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

import extract_features
from data import TOY_CLASSES, BadInput, FeatureStore, Scene, StoreWriter, run
from extract_features import (COCO_WEIGHTS, build_detector, detection_quality, draw_regions,
    draw_scenes, extract_scenes, find_pictures, judge_things, main, open_picture, parse_args,
    read_boxes, regions, scene_batches, select_regions, show, toy_targets, train_toy_detector)

SCRIPT = Path(extract_features.__file__)


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


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


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
    """The same files with the same bytes; in failed.txt the same lines, in any order."""
    files = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (one, two)]
    failed = [{*f.pop("failed.txt", b"").splitlines()} for f in files]
    return "features.npy" in files[0] and files[0] == files[1] and failed[0] == failed[1]


def select_slowly(boxes, probs, most, confidence):
    """Anderson's rule, class by class and box by box."""
    best, overlap = [0.0] * len(boxes), box_iou(boxes, boxes)
    for c in range(1, len(probs[0])):
        kept = []
        for i in sorted(range(len(boxes)), key=lambda i: -probs[i][c]):
            if all(overlap[i][j] <= 0.3 for j in kept):
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
        assert found == select_slowly(boxes, probs.tolist(), most, confidence)


def test_the_targets_of_a_scene_are_its_things():
    things, targets = Scene(5).things, toy_targets(Scene(5))
    assert [tuple(box) for box in targets["boxes"].tolist()] == [t.box for t in things]
    names = [f"{t.colour} {t.shape}" for t in things]
    assert [TOY_CLASSES[label] for label in targets["labels"]] == names


def test_things_are_found_and_named_as_by_hand():
    """Four things of 10 x 10: the first is found exactly, the second at IoU 6/10 under a wrong name
    (a later region names it), the third only at 4/10, the fourth not at all.
    """
    corner = torch.tensor([[0.0, 0], [20, 0], [40, 0], [60, 0]])
    things = dict(boxes=torch.cat([corner, corner + 10], 1), labels=torch.tensor([1, 2, 3, 1]))
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 26, 10], [40, 0, 44, 10], [20, 0, 30, 10]])
    first_three = judge_things(things, boxes[:3], torch.eye(5)[[1, 1, 3]])
    assert first_three.int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    all_four = judge_things(things, boxes, torch.eye(5)[[1, 1, 3, 2]])
    assert all_four.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]


def test_a_few_steps_of_training_lower_the_loss():
    scenes, images = [Scene(n) for n in range(16)], draw_scenes(range(16))
    torch.manual_seed(0)
    before = build_detector("toy")
    after = train_toy_detector(scenes, images, iterations=25, batch=4)
    targets = [toy_targets(s) for s in scenes]

    def loss(model):
        with torch.no_grad():
            return sum(model.train()(list(images / 255), targets).values()).item()

    assert loss(after) < 0.6 * loss(before)
    assert {*detection_quality(after.eval(), range(3))} == {"found at IoU .5", "at .75", "named"}


@pytest.mark.parametrize("name, content, classes, problem", [
    ("yolo", None, None, "'yolo': expected vg, coco, toy"),
    ("toy", {"x": torch.zeros(1)}, None, "w.pt: not the weights of the toy detector .*Missing"),
    ("toy", b"", None, "w.pt: not the weights of the toy detector"),
    ("toy", b"version https://git-lfs.github.com/spec/v1", None, "w.pt: not the weights of th"),
    ("toy", None, "one\ntwo\n", "names.txt: expected 48 names, found 2")])
def test_detectors_weights_and_names_that_do_not_fit_are_refused(
        tmp_path, name, content, classes, problem):
    path, names = tmp_path / "w.pt", tmp_path / "names.txt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    names.write_text(classes or "")
    with pytest.raises(BadInput, match=problem):
        build_detector(name, path if content is not None else None, names if classes else None)


def test_cocos_detector_gives_regions_in_the_same_way(tmp_path):
    """With random weights in torchvision's own layout."""
    torch.save(extract_features.coco_detector(weights=None).state_dict(), tmp_path / "coco.pth")
    model = build_detector("coco", tmp_path / "coco.pth")
    model.transform.min_size, model.transform.max_size = (100,), 160
    image = torch.rand(3, 61, 83)
    boxes, features, probs = regions(model, [image], 20)[0]
    assert len(boxes) == 20 and features.shape == (20, 1024) and probs.shape == (20, 91)
    assert model.about["class_names"][1] == "person"
    again = regions(model, [image], 20, boxes=[boxes])[0]
    torch.testing.assert_close(again[1], features, rtol=1e-3, atol=1e-4)


def test_without_network_cocos_detector_names_its_file_and_the_way_around(monkeypatch):
    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(type(COCO_WEIGHTS), "get_state_dict", offline)
    with pytest.raises(BadInput, match=r"https://\S+\.pth: .* --weights \(.*no route to host"):
        build_detector("coco")


def test_pictures_of_every_kind_are_opened_in_colour(tmp_path):
    grey = np.arange(60, dtype=np.uint8).reshape(6, 10)
    kinds = {"grey.png": Image.fromarray(grey), "bits16.png": Image.fromarray(
        grey.astype(np.uint16) * 257), "bit.png": Image.fromarray(grey > 30),
        "palette.gif": Image.fromarray(np.dstack([grey] * 3)).quantize(60)}
    for name, image in kinds.items():
        image.save(tmp_path / name)
        found = open_picture(tmp_path / name)
        expected = 255 * (grey > 30) if name == "bit.png" else grey
        assert found.mode == "RGB" and found.size == (10, 6)
        assert np.abs(np.asarray(found).astype(int) - expected[..., None]).max() <= 1, name
    Image.new("CMYK", (10, 6), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    assert np.abs(np.asarray(open_picture(tmp_path / "cmyk.jpg"))[0, 0] - [255, 0, 0.0]).max() < 9
    Image.new("RGBA", (10, 6), (0, 0, 255, 255)).save(tmp_path / "rgba.png")
    assert np.asarray(open_picture(tmp_path / "rgba.png"))[0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("seen", [np.asarray(noise(0, (8, 16))),
    np.arange(60, dtype=np.uint16).reshape(6, 10) * 1000])
def test_a_picture_that_a_camera_turned_is_turned_back(tmp_path, seen):
    """EXIF orientation 6: the camera's top row is the right-hand side of what was seen."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(seen).copy()).save(tmp_path / "turned.png", exif=exif)
    expected = seen if seen.ndim == 3 else np.dstack([seen // 256] * 3)
    assert np.array_equal(np.asarray(open_picture(tmp_path / "turned.png")), expected)


def test_what_is_no_picture_costs_itself_and_nothing_else(tmp_path, weights, capsys):
    folder, out = tmp_path / "images", tmp_path / "store"
    (folder / "deep" / "er").mkdir(parents=True)
    noise(0).save(folder / "a.png")
    noise(1, (400, 300)).save(folder / "deep" / "er" / "b.JPG", "JPEG")
    (folder / "cut.jpg").write_bytes((folder / "deep" / "er" / "b.JPG").read_bytes()[:30_000])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.png").write_text("<html>404</html>")
    noise(2, (1, 500)).save(folder / "thin.png")
    Image.new("1", (20_000, 10_000)).save(folder / "huge.png")  # 200 million pixels
    (folder / "notes.txt").write_text("no picture")
    noise(3).save(os.fsencode(folder) + b"/caf\xe9.png")  # not UTF-8
    noise(4).save(folder / "tab\t.png")
    main(flags(folder, out, weights))
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: 9 of 9 pictures to extract, at most 0.05 MB\n")
    assert f"2 of 9 pictures extracted, 7 failed: see {out}/failed.txt; to try again" in said
    failed = dict(line.split("\t") for line in (out / "failed.txt").read_text().splitlines())
    assert set(failed) == {"cut", "empty", "huge", "page", "thin", r"'caf\udce9'", r"'tab\t'"}
    for name in ("cut", "empty", "huge", "page"):
        assert f"{name}." in failed[name] and "not a picture that can be read" in failed[name]
    assert "a strip of 1 x 500 pixels" in failed["thin"]
    assert "cannot be an image's id" in failed[r"'caf\udce9'"]
    store = FeatureStore(out)
    assert store.row("cut") is None and store[store.row("b")]["size"] == (400, 300)


def test_a_list_has_a_path_and_perhaps_an_id_per_line(tmp_path, pictures):
    path = tmp_path / "list.txt"
    path.write_text(f"images/0001.jpg\t1234567\n{pictures / 'x_1.png'}\n\n")
    assert find_pictures(path) == [
        ("1234567", tmp_path / "images" / "0001.jpg"), ("x_1", pictures / "x_1.png")]
    assert find_pictures(pictures / "COCO_train2014_000000000003.png")[0][0] == "3"


def test_published_files_name_pictures_that_lie_somewhere_below_them(tmp_path):
    """By COCO's id; by the folder where a name occurs twice; and missing ones all the same."""
    for folder, name in (("val2014", "v.jpg"), ("a", "x.png"), ("b", "x.png")):
        (tmp_path / "images" / folder).mkdir(parents=True)
        (tmp_path / "images" / folder / name).touch()
    entries = [{"filepath": "val2014", "filename": "v.jpg", "split": "test", "cocoid": 391895},
        {"filepath": "train2014", "filename": "COCO_train2014_000000000009.jpg", "split": "train"},
        {"id": 7, "filepath": "b", "file_name": "x.png", "split": "restval"},
        {"id": 8, "file_name": "x.png", "split": "restval"}]
    (tmp_path / "j.json").write_text(json.dumps({"images": entries}))
    there, gone, b, either = expected = [("391895", tmp_path / "images/val2014/v.jpg"),
        ("9", tmp_path / "COCO_train2014_000000000009.jpg"), ("7", tmp_path / "images/b/x.png"),
        ("8", tmp_path / "x.png")]
    assert find_pictures(tmp_path / "j.json") == expected
    assert find_pictures(tmp_path / "j.json", "test") == [there]
    assert find_pictures(tmp_path / "j.json", "train") == [gone, b, either]


def test_links_to_other_folders_are_followed_and_links_upwards_are_not(tmp_path, pictures):
    folder = tmp_path / "images"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    links = {"link": pictures, "a/up": folder, "b/top": tmp_path, "a/twin": folder / "b/inner",
        "b/inner/twin": folder / "a"}
    (folder / "b/inner").mkdir()
    for name, target in links.items():
        (folder / name).symlink_to(target, target_is_directory=True)
    found = find_pictures(folder)
    assert found[0] == ("0", folder / "link/COCO_train2014_000000000000.png") and len(found) == 6


@pytest.mark.parametrize("content, split, problem", [
    ({"a/1.jpg": "", "b/000001.png": ""}, None, "a/1.jpg and .*b/000001.png have the same id, '1'"),
    ({"notes.md": ""}, None, "no pictures here; expected .jpg"),
    ({"a.jpg": ""}, "train", "--split train: only JSON files have splits"),
    ({"x.json": "[1]"}, None, "x.json: expected a JSON dict"),
    ({"x.json": "{"}, None, "x.json: not a whole JSON file"),
    ({"x.json": '{"images": [{"id": 3}]}'}, None, "x.json: not a list of images, as.*filename"),
    ({"x.json": '{"images": [{"filename": "a"}]}'}, "val", "no pictures here of --split val"),
    ({"l.txt": "b.jpg\na.jpg\t1\t2\n"}, None, r"l.txt: not a list .*2: found \['a.jpg', '1'"),
    ({"l.txt": b"\xff\xfe\n"}, None, "l.txt: not a list with a path per line"),
    ({"gone": None}, None, "gone: not a list .*No such file")])
def test_folders_and_files_that_name_no_pictures_are_refused(tmp_path, content, split, problem):
    for name, text in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if text is not None:
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    source = tmp_path / name if name in ("x.json", "l.txt", "gone") else tmp_path
    with pytest.raises(BadInput, match=problem):
        find_pictures(source, split)


BOXES = [{"image_id": 3, "bbox": [10, 20, 30.5, 15]}, {"image_id": 3, "bbox": [0, 0, 90, 60]},
    {"image_id": 4, "bbox": [5, 5, 1, 1]}]
FORMS = {"instances": {"images": [], "annotations": BOXES, "categories": []},
    "detections": [{"image_id": b["image_id"], "box": b["bbox"], "score": [0.5, 0.9, 0.7][k]}
        for k, b in enumerate(BOXES)],
    "own": {"COCO_train2014_000000000003.jpg": [[10, 20, 40.5, 35], [0, 0, 90, 60]],
        "4": [[5, 5, 6, 6]]}}


@pytest.mark.parametrize("form", FORMS)
def test_boxes_are_read_in_three_forms(tmp_path, form):
    """x, y, width, height in the published ones; of detections the surest comes first."""
    (tmp_path / "boxes.json").write_text(json.dumps(FORMS[form]))
    boxes, detected = read_boxes(tmp_path / "boxes.json")
    order = [1, 0] if form == "detections" else [0, 1]
    expected = np.array([[10, 20, 40.5, 35], [0, 0, 90, 60]], np.float32)[order]
    assert detected == (form == "detections") and set(boxes) == {"3", "4"}
    assert np.array_equal(boxes["3"], expected) and boxes["4"].tolist() == [[5, 5, 6, 6]]


@pytest.mark.parametrize("content", [[{"image_id": 3}], {"annotations": [{"bbox": [1, 2]}]},
    {"3": [[1, 2, 3]]}, {"3": 5}, [1], {"3": [[float("nan"), 5, 5, 20]]},
    {"annotations": [{"image_id": 3, "bbox": [[1], [2], [3], [4]]}]}])
def test_other_files_in_the_place_of_boxes_are_refused(tmp_path, content):
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match="boxes.json: not a file of boxes; expected detections"):
        read_boxes(tmp_path / "boxes.json")


def test_features_of_given_boxes_are_stored_in_their_order(tmp_path, weights, detector, pictures):
    """As many as there are. Pictures without boxes are left out; boxes beside a picture fail it."""
    boxes = {"3": [[10, 20, 40.5, 35], [0, 0, 90, 60], [1, 1, 9, 9]], "4": [[500, 500, 600, 600]],
        "dog": [[1, 1, 2, 2]]}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    main(flags(pictures, tmp_path / "store", weights, "--boxes", tmp_path / "boxes.json"))
    store = FeatureStore(tmp_path / "store")
    assert (len(store), store.num_regions) == (2, 3) and store.meta["selection"] == "given boxes"
    given = [torch.tensor(boxes["3"], dtype=torch.float32)]
    expected = regions(detector, [as_tensor(noise(3))], 9, given)[0]
    assert store[0]["boxes"].tolist() == boxes["3"]
    assert np.array_equal(store[0]["features"], expected[1].numpy().astype(np.float16))
    assert "4\timage 4: a box outside the image" in (tmp_path / "store/failed.txt").read_text()
    (tmp_path / "boxes.json").write_text(json.dumps({"dog": [[1, 1, 2, 2]]}))
    with pytest.raises(BadInput, match="boxes.json: boxes of image 'dog' and others, but of no"):
        main(flags(pictures, tmp_path / "other", weights, "--boxes", tmp_path / "boxes.json"))


@pytest.fixture(scope="module")
def undisturbed(weights, pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "store"
    main(flags(pictures, out, weights))
    return out


def test_a_store_of_scenes_that_was_interrupted_goes_on_to_the_same_bytes(
        detector, tmp_path, monkeypatch):
    numbers, real, calls = list(range(40, 60)), StoreWriter.write, []
    extract_scenes(detector, numbers, tmp_path / "whole")

    def dying_write(writer, row, *values):
        calls.append(row)
        if len(calls) == 7:
            raise KeyboardInterrupt
        real(writer, row, *values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StoreWriter, "write", dying_write)
        extract_scenes(detector, numbers, tmp_path / "parts")
    assert not FeatureStore.is_complete(tmp_path / "parts")
    store = extract_scenes(detector, numbers, tmp_path / "parts")
    assert same_store(tmp_path / "whole", tmp_path / "parts")
    assert store.num_region_classes == 49 and store.class_names[0] == "background"
    batches = [rows for rows, _, _ in scene_batches(numbers, [1, 7, 19])]
    assert batches == [range(16), range(16, 20)]  # whole ones, whatever is missing
    for row in (0, 19):  # the last batch has 4 scenes
        alone = regions(detector, draw_scenes([numbers[row]]) / 255, 8)[0]
        np.testing.assert_allclose(store[row]["boxes"], alone[0], rtol=1e-3, atol=1e-3)


def test_an_extraction_that_was_interrupted_goes_on_to_the_same_bytes(
        weights, pictures, undisturbed, tmp_path, monkeypatch):
    """Stopped when half of the third picture was written."""
    real = StoreWriter.write

    def dying_write(writer, row, *values):
        if row == 2:
            writer.arrays["features"][row, :1] = 7
            raise KeyboardInterrupt
        real(writer, row, *values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StoreWriter, "write", dying_write)
        main(flags(pictures, tmp_path / "store", weights))
    assert not FeatureStore.is_complete(tmp_path / "store")
    main(flags(pictures, tmp_path / "store", weights))
    assert same_store(undisturbed, tmp_path / "store")


def test_processes_that_start_one_after_the_other_make_what_one_makes(
        weights, pictures, undisturbed, tmp_path, monkeypatch):
    argv = flags(pictures, tmp_path / "store", weights, "--gpus", 2)

    def children(count):
        for rank in range(count):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(count))
            main(argv)
            assert not FeatureStore.is_complete(tmp_path / "store")  # the parent finishes it

    monkeypatch.setattr(extract_features, "start_processes", children)
    main(argv)
    assert same_store(undisturbed, tmp_path / "store")


@pytest.mark.slow
def test_two_processes_go_on_where_another_one_was_killed(weights, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(200):
        noise(i).save(tmp_path / "images" / f"{i}.png")
    main(flags(tmp_path / "images", tmp_path / "whole", weights))
    command = [sys.executable, SCRIPT, *flags(tmp_path / "images", tmp_path / "store", weights)]
    counts, alone = tmp_path / "store" / "counts.npy", {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=alone)
    while not counts.exists() or (np.load(counts, mmap_mode="r") >= 0).sum() < 60:
        assert process.poll() is None
    process.kill()
    process.wait()
    subprocess.run([*command, "--gpus", "2"], check=True, env=alone)
    assert same_store(tmp_path / "whole", tmp_path / "store")


def test_a_store_records_what_makes_its_features_and_refuses_other_settings(
        weights, pictures, undisturbed, tmp_path):
    meta, digest = FeatureStore(undisturbed).meta, hashlib.sha256(weights.read_bytes()).hexdigest()
    assert meta["weights"] == "toy.pt" and meta["weights_sha256"] == digest
    assert meta["versions"]["torch"] == torch.__version__ and meta["input_size"] == [128, 128]
    (tmp_path / "renamed.pt").write_bytes(weights.read_bytes())
    main(flags(pictures, undisturbed, tmp_path / "renamed.pt"))  # a name makes no other detector
    changed = torch.load(weights, weights_only=True)
    changed["backbone.norm.bias"] += 1
    torch.save(changed, other := tmp_path / "other.pt")
    for argv, key in (([other], "weights_sha256"), ([weights, "--precision", "bf16"], "precision")):
        with pytest.raises(BadInput, match=f"differs in .*{key}"):
            main(flags(pictures, undisturbed, *argv))


def test_an_extraction_in_which_everything_failed_ends_with_status_1(tmp_path, weights, capsys):
    (tmp_path / "l.txt").write_text("a.jpg\nb.jpg\n")
    with pytest.raises(SystemExit) as end:
        run(lambda: main(flags(tmp_path / "l.txt", tmp_path / "store", weights)))
    assert end.value.code == 1
    assert "0 of 2 pictures extracted, 2 failed: see" in (error := capsys.readouterr().err)
    assert "store/failed.txt" in error


def test_every_flag_of_an_extraction_has_its_effect(tmp_path, weights, detector, pictures):
    given = tmp_path / "boxes.json"
    given.write_text(json.dumps([{"image_id": 3, "box": [1, 1, 9, 9], "score": 0.2},
        {"image_id": 3, "box": [10, 20, 30.5, 15], "score": 0.9},  # --regions 1: the surest
        {"image_id": 4, "box": [1, 1, 9, 9], "score": 0.5}]))
    (tmp_path / "names.txt").write_text("".join(f"thing {i}\n" for i in range(48)))
    (tmp_path / "j.json").write_text(json.dumps({"images": [
        {"file_name": str(pictures / f"COCO_train2014_{i:012d}.png"), "id": i, "split": s}
        for i, s in ((3, "val"), (4, "test"))]}))
    main(flags(tmp_path / "j.json", tmp_path / "store", weights, "--precision", "bf16", "--workers",
        1, "--regions", 1, "--boxes", given, "--split", "val", "--classes", tmp_path / "names.txt"))
    store = FeatureStore(tmp_path / "store")
    assert len(store) == 1 and store.class_names[1] == "thing 0"
    assert store.meta["boxes"] == hashlib.sha256(given.read_bytes()).hexdigest()
    box = [torch.tensor([[10, 20, 40.5, 35]])]
    half, whole = (regions(detector, [as_tensor(noise(3))], 1, box, p)[0][1].numpy()
        for p in ("bf16", "fp32"))
    assert np.array_equal(store[0]["features"], half.astype(np.float16))
    assert not np.array_equal(half, whole)


@pytest.mark.parametrize("more, complaint", [(["--regions", "0"], "--regions: expected a number"),
    (["--gpus", "0"], "--gpus: expected a"), (["--workers", "-1"], "--workers: expected a number"),
    (["--detector", "vg"], "--detector vg needs --weights FILE"),
    (["-o", __file__], "expected a folder to write to, but .* is a file")])
def test_flags_that_cannot_be_meant_are_refused(tmp_path, capsys, more, complaint):
    with pytest.raises(SystemExit) as end:
        parse_args(["images", "-o", str(tmp_path), *more])
    said = " ".join(capsys.readouterr().err.split())
    assert end.value.code == 2 and re.search(complaint, said)


def test_regions_are_drawn_where_they_are():
    """A picture of 100 x 50, shown ten times as large: the edges of the box have one colour."""
    grey, box = Image.new("RGB", (200, 100), "grey"), np.array([[20.0, 10, 60, 40]])
    drawn = np.asarray(draw_regions(grey, box, (100, 50))).astype(int)
    assert drawn.shape == (500, 1000, 3)
    changed = np.abs(drawn - 128).sum(-1) > 0
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (100, 400, 200, 600)
    assert not changed[150:350, 250:550].any()
    labelled = np.asarray(draw_regions(grey, box, (100, 50), ["dog 0.93"])).astype(int)
    assert (labelled != drawn)[102:120, 203:270].mean() > 0.5
    two = np.asarray(draw_regions(grey, np.array([box[0], [20, 10, 80, 45]]), (100, 50)))
    first, second = two[150, 200], two[420, 200]  # on the common edge the better one is on top
    assert np.array_equal(first, drawn[150, 200]) and not np.array_equal(first, second)


def test_show_draws_a_picture_or_a_scene_or_grey_with_the_best_classes(
        undisturbed, detector, pictures, tmp_path, monkeypatch):
    main(["show", str(undisturbed), "3", "-o", str(tmp_path / "r.png")])
    assert Image.open(tmp_path / "r.png").size == (1000, 667)
    with pytest.raises(BadInput, match="has no features of an image '77'"):
        show(undisturbed, "77")
    monkeypatch.setattr(extract_features, "draw_regions", lambda *args: args)
    store = FeatureStore(undisturbed)
    probs = store.class_probs(3)
    best = 1 + probs[0, 1:].argmax()
    for which, expected in ((pictures / "COCO_train2014_000000000003.png", noise(3)),
            ("3", Image.new("RGB", (90, 60), "grey"))):
        image, boxes, size, labels = show(undisturbed, which)
        assert np.array_equal(image, expected)
        assert size == (90, 60) and np.array_equal(boxes, store[3]["boxes"])
        assert labels[0] == f"{TOY_CLASSES[best]} {probs[0, best]:.2f}"
    extract_scenes(detector, [7], tmp_path / "scenes")
    assert np.array_equal(show(tmp_path / "scenes", "7")[0], Scene(7).draw(4))


@pytest.mark.parametrize("names, label", [((), "class 2 0.75"), (("bg", "cat", "dog"), "dog 0.75")])
def test_show_names_the_best_class_of_published_features(tmp_path, monkeypatch, names, label):
    writer = FeatureStore.create(tmp_path / "s", ["a"], 1, 2, class_names=names, objects=True)
    writer.write(0, np.ones((1, 2)), np.array([[1, 1, 5, 5]]), (9, 9), objects=[2],
        confidences=[0.75])
    writer.finish()
    monkeypatch.setattr(extract_features, "draw_regions", lambda *args: args[-1])
    assert show(tmp_path / "s", "a") == [label]
