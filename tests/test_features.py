"""How regions get into a store: from pictures of every kind, at given boxes, from published files.
"""

import base64
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import extract_features
from data import BadInput, FeatureStore, PretrainingDataset, import_features
from extract_features import (build_detector, draw_regions, find_pictures, open_picture, read_boxes,
    regions, show)

SCRIPT = Path(extract_features.__file__)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The toy detector's, random: what it finds is beside the point here."""
    path = tmp_path_factory.mktemp("weights") / "toy.pt"
    torch.manual_seed(0)
    torch.save(build_detector("toy").state_dict(), path)
    return path


def noise(seed, size=(90, 60)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of five sound pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(5):
        noise(i).save(folder / f"COCO_train2014_{i:012d}.png")
    return folder


def flags(images, out, weights, *more):
    return [str(x) for x in (images, "-o", out, "--detector", "toy", "--weights", weights, *more)]


def same_files(one, two):
    names = {p.name for p in one.iterdir()}
    assert names == {p.name for p in two.iterdir()} and "features.npy" in names
    return [n for n in sorted(names) if (one / n).read_bytes() != (two / n).read_bytes()]


# --- pictures of every kind ---


def test_every_kind_of_picture_is_opened_upright_and_in_colour(tmp_path):
    grey = np.arange(60, dtype=np.uint8).reshape(6, 10)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    Image.fromarray(np.dstack([grey] * 3)).quantize(60).save(tmp_path / "palette.gif")
    Image.fromarray(grey > 30).save(tmp_path / "one_bit.png")
    for name in ("grey.png", "sixteen.png", "palette.gif", "one_bit.png"):
        found = open_picture(tmp_path / name)
        assert found.mode == "RGB" and found.size == (10, 6)
        expected = 255 * (grey > 30) if name == "one_bit.png" else grey
        assert np.abs(np.asarray(found).astype(int) - expected[..., None]).max() <= 1, name
    red = Image.new("CMYK", (10, 6), (0, 255, 255, 0))
    red.save(tmp_path / "cmyk.jpg")
    assert np.abs(np.asarray(open_picture(tmp_path / "cmyk.jpg"))[0, 0] - [255, 0, 0.0]).max() < 9
    Image.new("RGBA", (10, 6), (0, 0, 255, 255)).save(tmp_path / "rgba.png")
    assert np.asarray(open_picture(tmp_path / "rgba.png"))[0, 0].tolist() == [0, 0, 255]


def test_a_picture_that_a_camera_turned_is_turned_back(tmp_path):
    """EXIF orientation 6: the camera's top row is the right-hand side of what was seen."""
    seen = noise(0, (8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    seen.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(open_picture(tmp_path / "turned.png")), np.asarray(seen))


def test_a_turned_picture_of_16_bits_is_turned_back_too(tmp_path):
    seen = np.arange(60, dtype=np.uint16).reshape(6, 10) * 1000
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(seen).copy()).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(open_picture(tmp_path / "turned.png"))[..., 0], seen // 256)


def test_whatever_a_reader_of_pictures_stumbles_over_is_told(tmp_path, monkeypatch):
    noise(0).save(tmp_path / "a.png")
    for problem in (struct.error("bad EXIF"), TypeError("x"), NotImplementedError("y")):
        monkeypatch.setattr(extract_features.ImageOps, "exif_transpose", raiser(problem))
        with pytest.raises(BadInput, match="a.png: cannot be read as a picture"):
            open_picture(tmp_path / "a.png")


def raiser(problem):
    def function(*_):
        raise problem
    return function


def test_what_is_no_picture_is_named_with_its_reason_and_the_rest_goes_on(
        tmp_path, weights, capsys):
    folder, out = tmp_path / "images", tmp_path / "store"
    (folder / "deep" / "er").mkdir(parents=True)
    noise(0).save(folder / "a.png")
    noise(1, (400, 300)).save(folder / "deep" / "er" / "b.JPG", "JPEG")
    whole = (folder / "deep" / "er" / "b.JPG").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.png").write_text("<html>404</html>")
    noise(2, (1, 500)).save(folder / "thin.png")
    Image.new("1", (20_000, 10_000)).save(folder / "huge.png")  # 200 million pixels
    (folder / "notes.txt").write_text("no picture")
    extract_features.main(flags(folder, out, weights))
    said = capsys.readouterr().out
    assert "1 files are no pictures by their names" in said
    assert f"7 of 7 pictures, 8 regions of 128: up to 0.00 GB to write\n{out}: 2 pict" in said
    assert f"2 pictures extracted, 5 failed: see {out}/failed.txt" in said
    failed = [line.split("\t") for line in (out / "failed.txt").read_text().splitlines()]
    assert [image_id for image_id, _ in failed] == ["cut", "empty", "huge", "page", "thin"]
    assert all(str(folder) in reason and "cannot be read as a picture" in reason
        for _, reason in failed[:4])
    assert "a strip of 1 x 500 pixels" in failed[4][1]
    store = FeatureStore(out)
    assert store.row("cut") is None and store[store.row("b")]["size"] == (400, 300)
    for name in ("a", "b"):
        store.check(store.row(name))


# --- which pictures ---


def test_a_list_has_paths_and_ids_if_it_likes(tmp_path, pictures):
    path = tmp_path / "list.txt"
    path.write_text(f"images/0001.jpg\t1234567\n{pictures / 'x_1.png'}\n")
    assert find_pictures(path) == [
        ("1234567", tmp_path / "images" / "0001.jpg"), ("x_1", pictures / "x_1.png")]


def test_a_published_file_names_its_pictures_wherever_they_lie_below_it(tmp_path):
    (tmp_path / "images" / "val2014").mkdir(parents=True)
    name = "COCO_val2014_000000391895.jpg"
    noise(0).save(tmp_path / "images" / "val2014" / name)
    karpathy = {"dataset": "coco", "images": [
        {"filepath": "val2014", "filename": name, "split": "test", "cocoid": 391895},
        {"filepath": "train2014", "filename": "COCO_train2014_000000000009.jpg",
            "split": "train"}]}
    (tmp_path / "dataset_coco.json").write_text(json.dumps(karpathy))
    there = ("391895", tmp_path / "images" / "val2014" / name)
    missing = ("9", tmp_path / "train2014" / "COCO_train2014_000000000009.jpg")
    assert find_pictures(tmp_path / "dataset_coco.json") == [there, missing]
    assert find_pictures(tmp_path / "dataset_coco.json", "test") == [there]
    coco = {"images": [{"id": 391895, "file_name": name, "height": 60, "width": 90}]}
    (tmp_path / "captions_val2014.json").write_text(json.dumps(coco))
    assert find_pictures(tmp_path / "captions_val2014.json") == [there]


def test_a_picture_that_is_not_there_is_among_the_failed(tmp_path, weights, pictures):
    (tmp_path / "list.txt").write_text(f"{pictures}/COCO_train2014_000000000003.png\ngone.jpg\n")
    store = extract_features.extract(extract_features.parse_args(
        flags(tmp_path / "list.txt", tmp_path / "store", weights)))
    assert store.row(3) == 0 and store.row("gone") is None
    assert (tmp_path / "store" / "failed.txt").read_text().startswith("gone\t")


@pytest.mark.parametrize("content, problem", [
    ({"a/1.jpg": "", "b/000001.png": ""}, "a/1.jpg and .*b/000001.png have the same id, 1; give a"),
    ({"notes.md": ""}, "no pictures here"),
    ({"x.json": "[1]"}, "x.json: expected a JSON object"),
    ({"x.json": "{"}, "x.json: not a whole JSON file"),
    ({"x.json": '{"images": [{"id": 3}]}'}, "x.json: image 0: expected file_name")])
def test_folders_and_files_that_name_no_pictures_are_refused(tmp_path, content, problem):
    for name, text in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    source = tmp_path / "x.json" if "x.json" in content else tmp_path
    with pytest.raises(BadInput, match=problem):
        find_pictures(source)


def test_pictures_of_one_name_are_told_apart_by_their_folder_and_go_by_their_id(tmp_path):
    for part, size in (("a", (90, 60)), ("b", (50, 50))):
        (tmp_path / part).mkdir()
        noise(0, size).save(tmp_path / part / "x.png")
    (tmp_path / "j.json").write_text(json.dumps(
        {"images": [{"id": 7, "filepath": "b", "file_name": "x.png"}]}))
    assert find_pictures(tmp_path / "j.json") == [("7", tmp_path / "b" / "x.png")]
    (tmp_path / "j.json").write_text(json.dumps({"images": [{"id": 7, "file_name": "x.png"}]}))
    with pytest.raises(BadInput, match="j.json: image 0: .*a/x.png or .*b/x.png\\? give a list"):
        find_pictures(tmp_path / "j.json")


def test_a_split_that_is_not_there_is_named_and_restval_is_train(tmp_path):
    (tmp_path / "j.json").write_text(json.dumps({"images": [
        {"filename": f"{k}.jpg", "split": s} for k, s in enumerate(("train", "restval", "val"))]}))
    assert [i for i, _ in find_pictures(tmp_path / "j.json", "train")] == ["0", "1"]
    with pytest.raises(BadInput, match="j.json: --split vall: found train, val"):
        find_pictures(tmp_path / "j.json", "vall")
    with pytest.raises(BadInput, match="--split train: only JSON files have splits"):
        find_pictures(tmp_path, "train")


def test_pictures_behind_a_link_are_found_and_one_picture_is_enough(tmp_path, pictures):
    (tmp_path / "link").symlink_to(pictures, target_is_directory=True)
    assert find_pictures(tmp_path)[0] == ("0", tmp_path / "link/COCO_train2014_000000000000.png")
    assert find_pictures(pictures / "COCO_train2014_000000000003.png")[0][0] == "3"


@pytest.mark.parametrize("line", ["a.jpg\t1\t2", "a.jpg\t"])
def test_a_line_of_a_list_with_something_else_is_named(tmp_path, line):
    (tmp_path / "l.txt").write_text(f"b.jpg\n{line}\n")
    with pytest.raises(BadInput, match=r"l.txt: expected a path a line, .* found \['a.jpg'"):
        find_pictures(tmp_path / "l.txt")


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, weights, pictures):
    (tmp_path / "failed.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds 'failed.txt' and no feature store; choose a fol"):
        extract_features.main(flags(pictures, tmp_path, weights))
    assert [p.name for p in tmp_path.iterdir()] == ["failed.txt"]


def test_images_that_cannot_be_named_are_refused(tmp_path):
    for image_id in ("", "a\tb", "caf\udce9"):
        with pytest.raises(BadInput, match="is empty or cannot be printed"):
            FeatureStore.create(tmp_path / "s", ["ok", image_id], 1, 2)


def test_a_run_in_which_everything_failed_is_an_error(tmp_path, weights):
    (tmp_path / "l.txt").write_text("a.jpg\nb.jpg\n")
    with pytest.raises(SystemExit, match="store: not one picture could be extracted"):
        extract_features.main(flags(tmp_path / "l.txt", tmp_path / "store", weights))


# --- given boxes ---

ANNOTATIONS = [{"id": 1, "image_id": 3, "bbox": [10, 20, 30.5, 15]},
    {"id": 2, "image_id": 3, "bbox": [0, 0, 90, 60]},
    {"id": 3, "image_id": 4, "bbox": [5, 5, 1, 1]}]
FORMS = {
    "instances": {"images": [], "annotations": ANNOTATIONS, "categories": []},
    "detections": [{"det_id": k, "h5_id": k, "image_id": a["image_id"], "box": a["bbox"],
        "category_id": 1, "category_name": "person", "score": [0.5, 0.9, 0.7][k]}
        for k, a in enumerate(ANNOTATIONS)],
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
    with pytest.raises(BadInput, match="boxes.json: one of its . entries: expected detections"):
        read_boxes(tmp_path / "boxes.json")


def test_features_of_given_boxes_are_stored_in_their_order(tmp_path, weights, pictures, capsys):
    """As many as there are; pictures without boxes are left out; boxes end at the picture."""
    boxes = {"3": [[10, 20, 40.5, 35], [-5, 0, 95, 60], [1, 1, 9, 9]], "4": [[5, 5, 16, 36]]}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    extract_features.main(
        flags(pictures, tmp_path / "store", weights, "--boxes", tmp_path / "boxes.json"))
    assert "boxes for 2 pictures; 3 others left out" in capsys.readouterr().out
    store = FeatureStore(tmp_path / "store")
    assert (len(store), store.num_regions) == (2, 3)
    boxes["3"][1] = [0, 0, 90, 60]
    image = torch.from_numpy(np.asarray(noise(3)).copy()).permute(2, 0, 1) / 255
    expected = regions(build_detector("toy", weights), [image], 9, [torch.tensor(boxes["3"])])[0]
    record = store[store.row(3)]
    assert record["boxes"].tolist() == boxes["3"]
    np.testing.assert_allclose(record["features"], expected[1], rtol=2e-3, atol=1e-4)
    assert store.meta["selection"] == "given boxes"


def test_boxes_of_other_pictures_are_refused(tmp_path, weights, pictures):
    (tmp_path / "boxes.json").write_text(json.dumps({"dog": [[1, 1, 2, 2]]}))
    with pytest.raises(SystemExit, match="boxes.json: boxes of image 'dog' and others, but none"):
        extract_features.main(
            flags(pictures, tmp_path / "store", weights, "--boxes", tmp_path / "boxes.json"))


def test_a_disk_that_is_too_small_is_said_before_the_work(
        tmp_path, weights, pictures, monkeypatch):
    class Full:
        free = 10

    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: Full)
    with pytest.raises(SystemExit, match="store: 0.00 GB are to be written, and there are 0.00 GB"):
        extract_features.main(flags(pictures, tmp_path / "store", weights))


@pytest.mark.parametrize("more, complaint", [(["--regions", "0"], "--regions 0: expected 1 at"),
    (["--gpus", "0"], "--gpus 0: expected 1 at"), (["--workers", "-1"], "--workers -1: expected 0"),
    (["--detector", "vg"], "--detector vg needs --weights FILE")])
def test_flags_that_cannot_be_meant_are_refused(tmp_path, capsys, more, complaint):
    with pytest.raises(SystemExit) as end:
        extract_features.parse_args(["images", "-o", str(tmp_path), *more])
    assert end.value.code == 2 and complaint in capsys.readouterr().err


def test_a_file_where_the_store_should_be_is_named(tmp_path, weights, pictures):
    with pytest.raises(SystemExit, match="toy.pt: cannot be made"):
        extract_features.main(flags(pictures, weights, weights))


def test_boxes_beside_the_picture_are_told(tmp_path, weights, pictures):
    (tmp_path / "boxes.json").write_text(json.dumps({"3": [[500, 500, 600, 600]],
        "4": [[1, 1, 9, 9]]}))
    extract_features.main(
        flags(pictures, tmp_path / "store", weights, "--boxes", tmp_path / "boxes.json"))
    assert (tmp_path / "store/failed.txt").read_text().startswith(
        "3\ta given box lies beside the picture of 90 x 60 pixels")


def test_every_flag_of_an_extraction_has_its_effect(tmp_path, weights, pictures):
    (tmp_path / "boxes.json").write_text(
        json.dumps({"3": [[10, 20, 40.5, 35]], "4": [[1, 1, 9, 9]]}))
    (tmp_path / "names.txt").write_text("".join(f"thing {i}\n" for i in range(48)))
    (tmp_path / "j.json").write_text(json.dumps({"images": [
        {"file_name": str(pictures / f"COCO_train2014_{i:012d}.png"), "id": i, "split": s}
        for i, s in ((3, "val"), (4, "test"))]}))
    extract_features.main(flags(tmp_path / "j.json", tmp_path / "store", weights, "--precision",
        "bf16", "--workers", 1, "--boxes", tmp_path / "boxes.json", "--split", "val", "--classes",
        tmp_path / "names.txt"))
    store = FeatureStore(tmp_path / "store")
    assert len(store) == 1 and store.class_names[1] == "thing 0"
    assert store.meta["boxes"] == sha(tmp_path / "boxes.json")
    image = torch.from_numpy(np.asarray(noise(3)).copy()).permute(2, 0, 1) / 255
    box = [torch.tensor([[10, 20, 40.5, 35]])]
    half, whole = (regions(build_detector("toy", weights), [image], 1, box, p)[0][1].numpy()
        for p in ("bf16", "fp32"))
    assert np.array_equal(store[0]["features"], half.astype(np.float16))
    assert not np.array_equal(half, whole)


def test_of_detections_the_surest_are_taken(tmp_path, weights, pictures):
    found = [{"image_id": 2, "box": [k, k, 10, 10], "score": (k * 7 % 11) / 11} for k in range(11)]
    (tmp_path / "dets.json").write_text(json.dumps(found))
    extract_features.main(flags(pictures, tmp_path / "store", weights, "--boxes",
        tmp_path / "dets.json", "--regions", 4))
    boxes = FeatureStore(tmp_path / "store")[0]["boxes"]
    assert boxes[:, 0].tolist() == sorted(range(11), key=lambda k: -(k * 7 % 11))[:4]


# --- stopped, resumed, shared ---


@pytest.fixture(scope="module")
def undisturbed(weights, pictures, tmp_path_factory):
    (pictures / "zz_cut.png").write_bytes((pictures / "COCO_train2014_000000000000.png")
        .read_bytes()[:1000])
    out = tmp_path_factory.mktemp("undisturbed") / "store"
    extract_features.main(flags(pictures, out, weights))
    return out


def test_an_extraction_that_was_stopped_goes_on_to_the_same_bytes(
        weights, pictures, undisturbed, tmp_path, monkeypatch):
    """Stopped in the middle of writing the third picture, and again after the failed one."""
    real = data.StoreWriter.write, data.StoreWriter.fail

    def dying_write(writer, row, features, *rest):
        if row == 2:
            writer.arrays["features"][row, :1] = 7  # half of it is there
            raise KeyboardInterrupt
        real[0](writer, row, features, *rest)

    def dying_fail(writer, row, reason):
        real[1](writer, row, reason)
        writer.arrays["counts"][row] = -1  # the line is written, the row not yet marked
        raise KeyboardInterrupt

    for name, function in (("write", dying_write), ("fail", dying_fail)):
        with monkeypatch.context() as patch, pytest.raises(
                SystemExit, match="stopped; the same command goes on from here"):
            patch.setattr(data.StoreWriter, name, function)
            extract_features.main(flags(pictures, tmp_path / "store", weights))
        assert not FeatureStore.is_complete(tmp_path / "store")
    extract_features.main(flags(pictures, tmp_path / "store", weights))
    assert same_files(undisturbed, tmp_path / "store") == []


def test_two_parts_of_the_work_make_what_one_makes(weights, pictures, undisturbed, tmp_path):
    args = extract_features.parse_args(
        flags(pictures, tmp_path / "store", weights, "--gpus", 2, "--regions", 8))
    work = (args, find_pictures(pictures), {}, list(range(6)))
    for rank in (1, 0):
        extract_features.extract_part(rank, *work)
    extract_features.open_store(args, work[1], build_detector("toy", weights)).finish()
    assert same_files(undisturbed, tmp_path / "store") == []


@pytest.mark.slow
def test_two_processes_make_what_one_makes(weights, pictures, undisturbed, tmp_path):
    command = [sys.executable, SCRIPT, *flags(pictures, tmp_path / "store", weights, "--gpus", 2)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert same_files(undisturbed, tmp_path / "store") == []


@pytest.mark.slow
def test_an_extraction_that_was_killed_goes_on_to_the_same_bytes(weights, tmp_path):
    for i in range(300):
        (tmp_path / "images").mkdir(exist_ok=True)
        noise(i).save(tmp_path / "images" / f"{i}.png")
    command = [sys.executable, SCRIPT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command + flags(tmp_path / "images", tmp_path / "whole", weights), check=True,
        env=environment)
    command += flags(tmp_path / "images", tmp_path / "store", weights)
    kills = 0
    while not (tmp_path / "store/store.json").exists() or not FeatureStore.is_complete(
            tmp_path / "store"):
        process = subprocess.Popen(command, env=environment)
        before = time.time()
        while process.poll() is None:
            counts = tmp_path / "store" / "counts.npy"
            done = (np.load(counts, mmap_mode="r") >= 0).sum() if counts.exists() else 0
            if kills < 3 and done > 60 * (kills + 1):
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            assert time.time() - before < 100
        process.wait()
    assert kills == 3 and same_files(tmp_path / "whole", tmp_path / "store") == []


def test_another_version_of_torch_may_finish_a_store(weights, pictures, undisturbed, tmp_path):
    args = extract_features.parse_args(
        flags(pictures, tmp_path / "store", weights, "--regions", 8))
    model = build_detector("toy", weights)
    extract_features.open_store(args, find_pictures(pictures), model)
    meta = json.loads((tmp_path / "store/store.json").read_text())
    assert meta["versions"]["torch"] == torch.__version__
    meta["versions"]["torch"] = "2.6.0"
    (tmp_path / "store/store.json").write_text(json.dumps(meta))
    extract_features.extract(args)
    assert same_files(undisturbed, tmp_path / "store") == []


def test_weights_of_another_name_are_the_same_weights(weights, pictures, undisturbed, tmp_path):
    (tmp_path / "renamed.pt").write_bytes(weights.read_bytes())
    extract_features.main(flags(pictures, tmp_path / "store", weights, "--regions", "8"))
    extract_features.main(flags(pictures, tmp_path / "store", tmp_path / "renamed.pt"))
    assert same_files(undisturbed, tmp_path / "store") == ["store.json"]  # it names them


def test_a_store_of_another_detector_is_not_mixed_with_this_one(
        weights, pictures, undisturbed, tmp_path):
    other = torch.load(weights, weights_only=True)
    other["backbone.norm.bias"] += 1
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(SystemExit, match=r"settings \(it differs in weights_sha256\)"):
        extract_features.main(flags(pictures, undisturbed, tmp_path / "other.pt"))


# --- what a store says and shows ---


def test_a_store_says_how_it_was_made(undisturbed, weights, capsys):
    data.check([undisturbed])
    said = capsys.readouterr().out
    assert "6 images (1 failed), up to 8 regions of 128" in said
    for line in ("detector: toy", "weights: toy.pt", f"weights_sha256: {sha(weights)}",
            "selection: Anderson: NMS .3 in every class, best score", "dtype: float16",
            "input_size: 128, 128", "box_format: x1 y1 x2 y2, pixels of the upright picture",
            f"'torch': '{torch.__version__}'", "num_region_classes: 49",
            "class_names: background, red circle, red square, red triangle, red star, ... (49)"):
        assert line in said


def sha(path):
    import hashlib
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_regions_are_drawn_where_they_are():
    """A picture of 100 x 50, shown ten times as large: the edges of the box have one colour."""
    drawn = np.asarray(draw_regions(Image.new("RGB", (100, 50), "grey"),
        np.array([[20.0, 10, 60, 40]]), [""])).astype(int)
    assert drawn.shape == (500, 1000, 3)
    changed = np.abs(drawn - 128).sum(-1) > 0
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (100, 400, 200, 600)
    assert not changed[150:350, 250:550].any()
    labelled = np.asarray(draw_regions(Image.new("RGB", (100, 50), "grey"),
        np.array([[20.0, 10, 60, 40]]), ["dog 0.93"])).astype(int)
    assert (labelled != drawn)[70:100].any()


def test_show_writes_a_picture_of_an_image_by_file_or_id(
        undisturbed, pictures, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(extract_features, "draw_regions",
        lambda image, boxes, labels: told.append((image, boxes, labels)) or image)
    show(undisturbed, pictures / "COCO_train2014_000000000003.png")
    show(undisturbed, "3")
    store = FeatureStore(undisturbed)
    for image, boxes, labels in told:
        assert image.size == (90, 60) and np.array_equal(boxes, store[3]["boxes"])
        probs = store.class_probs(3)
        best = 1 + probs[0, 1:].argmax()
        assert labels[0] == f"{data.TOY_CLASSES[best]} {probs[0, best]:.2f}"
    assert np.array_equal(np.asarray(told[0][0]), np.asarray(noise(3)))
    assert {*np.asarray(told[1][0]).flatten()} == {128}  # grey where there is no picture
    monkeypatch.undo()
    extract_features.main(["show", str(undisturbed), "3", "-o", str(tmp_path / "r.png")])
    assert Image.open(tmp_path / "r.png").size == (1000, 667)


def test_show_refuses_what_does_not_fit(undisturbed, tmp_path):
    with pytest.raises(BadInput, match="has no features of an image '77'"):
        show(undisturbed, "77")
    noise(3, (80, 60)).save(tmp_path / "3.png")
    with pytest.raises(BadInput, match="3.png: is 80 x 60 pixels, but the store's image is 90 x 6"):
        show(undisturbed, tmp_path / "3.png")


# --- classes at no storage ---


def test_a_class_head_gives_the_targets_that_stored_distributions_give(tmp_path, tokenizer):
    """The same regions in two stores; training sees the same, up to the float16 of one of them."""
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(7, 12)) / 3, rng.normal(size=7)
    sizes = dict(num_regions=4, feature_size=12)
    head = FeatureStore.create(tmp_path / "a", range(5), class_head=[weight, bias], **sizes)
    stored = FeatureStore.create(tmp_path / "b", range(5), num_region_classes=7, **sizes)
    for row in range(5):
        features = rng.normal(size=(1 + row % 4, 12)).astype(np.float16)
        logits = features.astype(float) @ weight.T + bias
        probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        boxes = np.tile([1.0, 1, 9, 9], (len(features), 1))
        head.write(row, features, boxes, (10, 10))
        stored.write(row, features, boxes, (10, 10), probs)
    one, two = head.finish(), stored.finish()
    assert (tmp_path / "b/class_probs.npy").exists() and not (
        tmp_path / "a/class_probs.npy").exists()
    assert one.num_region_classes == two.num_region_classes == 7
    captions = [(i, "a red star") for i in range(5)]
    for a, b in zip(*(PretrainingDataset(s, captions, tokenizer) for s in (one, two))):
        assert np.array_equal(a["mrc_mask"], b["mrc_mask"])
        np.testing.assert_allclose(a["mrc_targets"], b["mrc_targets"], atol=5e-4)
        assert a["mrc_targets"].sum(axis=1) == pytest.approx(1, abs=2e-3)


def test_a_store_with_another_class_head_is_not_gone_on_with(tmp_path):
    sizes = dict(num_regions=1, feature_size=2)
    FeatureStore.create(tmp_path, ["a"], class_head=[np.eye(2), np.zeros(2)], **sizes)
    FeatureStore.create(tmp_path, ["a"], class_head=[np.eye(2), np.zeros(2)], **sizes)
    with pytest.raises(BadInput, match="differs in class_bias"):
        FeatureStore.create(tmp_path, ["a"], class_head=[np.eye(2), np.ones(2)], **sizes)


# --- published feature files ---


def encoded(array, dtype, python3=False):
    text = base64.b64encode(np.asarray(array, dtype).tobytes()).decode()
    return f"b'{text}'" if python3 else text


def published(columns, count=4, python3=False, background="first"):
    """(lines, records) of a file as its authors wrote it: images of 640 x 480 with 1 to 3 regions.
    """
    rng, lines, records = np.random.default_rng(columns), [], []
    for i in range(count):
        n = 1 + i % 3
        corner = rng.random((n, 2)) * 300
        boxes = np.hstack([corner, corner + 100]).astype(np.float32)
        features = rng.normal(size=(n, 2048)).astype(np.float32)
        probs = rng.dirichlet(np.ones(1601), size=n).astype(np.float32)
        theirs = {"first": probs, "last": np.roll(probs, -1, axis=1), "none": probs[:, 1:]}
        arrays = [encoded(boxes, "<f4", python3), encoded(features, "<f4", python3)]
        image_id = 9 + i if columns == 6 else f"COCO_train2014_{9 + i:012d}"
        if columns == 6:
            cells = [image_id, 640, 480, n, *arrays]
        else:
            tops = [encoded(np.zeros(n), t, python3) for t in ("<i8", "<f4", "<i8", "<f4")]
            cells = [image_id, 480, 640, *tops, n, *arrays]
        if columns == 13:
            cells += [encoded(theirs[background], "<f4", python3),
                encoded(np.zeros((n, 401)), "<f4", python3),
                encoded(np.zeros((n, 1601)), "<f4", python3)]
        lines.append("\t".join(map(str, cells)) + "\n")
        records.append((str(9 + i), boxes, features, probs))
    return lines, records


@pytest.mark.parametrize("columns, python3, background", [(6, False, "first"), (10, False, "first"),
    (10, True, "first"), (13, False, "first"), (13, False, "last"), (13, True, "none")])
def test_published_features_are_read_as_they_are(tmp_path, columns, python3, background):
    lines, records = published(columns, python3=python3, background=background)
    (tmp_path / "a.tsv").write_text("".join(lines[:3]))
    (tmp_path / "b.tsv").write_text("".join(lines[3:]))
    store = import_features(
        [tmp_path / "a.tsv", tmp_path / "b.tsv"], tmp_path / "store", background=background)
    assert (len(store), store.num_regions, store.feature_size) == (4, 3, 2048)
    assert store.num_region_classes == (1601 if columns == 13 else 0)
    assert store.meta["background"] == "first" and store.detector == "vg"
    for image_id, boxes, features, probs in records:
        row = store.row(image_id)
        store.check(row)
        assert store[row]["size"] == (640, 480)
        assert np.array_equal(store[row]["boxes"], boxes)
        assert np.array_equal(store[row]["features"], features.astype(np.float16))
        if columns == 13:
            np.testing.assert_allclose(store.class_probs(row), probs, atol=1e-5)


def test_an_import_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    lines, _ = published(13)
    (tmp_path / "a.tsv").write_text("".join(lines))
    import_features([tmp_path / "a.tsv"], tmp_path / "whole")
    real = data.StoreWriter.write

    def dying(writer, row, **values):
        if row == 2:
            raise KeyboardInterrupt
        real(writer, row, **values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.StoreWriter, "write", dying)
        import_features([tmp_path / "a.tsv"], tmp_path / "store")
    seen = []
    monkeypatch.setattr(data.StoreWriter, "write",
        lambda writer, row, **values: seen.append(row) or real(writer, row, **values))
    import_features([tmp_path / "a.tsv"], tmp_path / "store")
    assert seen == [2, 3]  # what is there is not decoded again
    assert same_files(tmp_path / "whole", tmp_path / "store") == []


def test_an_image_that_comes_twice_counts_once_and_a_broken_one_not_at_all(tmp_path, capsys):
    lines, records = published(6)
    cells = lines[1].split("\t")
    cells[5] = encoded(np.full((2, 2048), np.nan), "<f4") + "\n"
    again = lines[0].replace("640\t480", "50\t50")
    (tmp_path / "a.tsv").write_text("".join([lines[0], "\t".join(cells), lines[2], again]))
    store = import_features([tmp_path / "a.tsv"], tmp_path / "store")
    assert "1 lines name an image that was there before" in capsys.readouterr().out
    assert [store.row(i) for i in (9, 10, 11)] == [0, None, 2] and store[0]["size"] == (640, 480)
    assert (tmp_path / "store/failed.txt").read_text() == (
        "10\timage 10: features with NaN or infinity\n")


@pytest.mark.parametrize("change, problem", [
    (lambda c: c[:3], "line 2: expected 6, 10 or 13 columns, found 3; is the file cut off"),
    (lambda c: [*c[:3], "x", *c[4:]], "line 2: num_boxes: expected a whole .* 1000, found 'x'"),
    (lambda c: [*c[:3], "1001", *c[4:]], "line 2: num_boxes: .* up to 1000, found '1001'")])
def test_a_line_of_another_form_is_named_before_anything_is_written(tmp_path, change, problem):
    lines, _ = published(6)
    cells = change(lines[1].rstrip("\n").split("\t"))
    (tmp_path / "a.tsv").write_text(lines[0] + "\t".join(cells) + "\n")
    with pytest.raises(BadInput, match=f"a.tsv: {problem}"):
        import_features([tmp_path / "a.tsv"], tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("change, problem", [
    (lambda c: [*c[:3], "3", *c[4:]], "boxes: not base64 of 3 rows"),
    (lambda c: [*c[:5], c[5][:-1]], "features: not base64 of 2 rows"),
    (lambda c: [*c[:4], c[5], c[5]], "boxes: expected 2 x 4 numbers, found 2 x 2048")])
def test_cells_that_do_not_fit_are_told_in_failed_txt(tmp_path, change, problem):
    lines, _ = published(6)
    cells = change(lines[1].rstrip("\n").split("\t"))
    (tmp_path / "a.tsv").write_text(lines[2] + "\t".join(cells) + "\n")
    store = import_features([tmp_path / "a.tsv"], tmp_path / "store")
    assert (store.counts > 0).tolist() == [True, False]
    assert f"a.tsv: line 2: {problem}" in (tmp_path / "store/failed.txt").read_text()


@pytest.mark.parametrize("first, then", [(13, 6), (6, 13)])
def test_files_of_two_forms_are_not_mixed(tmp_path, first, then):
    for name, columns in (("a.tsv", first), ("b.tsv", then)):
        (tmp_path / name).write_text("".join(published(columns)[0]))
    with pytest.raises(BadInput, match=f"b.tsv: line 1: {then} columns after lines of {first}"):
        import_features([tmp_path / "a.tsv", tmp_path / "b.tsv"], tmp_path / "store")


def test_images_without_regions_or_of_another_size_do_not_stop_an_import(tmp_path):
    lines, _ = published(6)
    none = "\t".join(["77", "640", "480", "0", "", ""]) + "\n"
    short = lines[1].split("\t")
    short[5] = encoded(np.ones((2, 1)), "<f4") + "\n"
    (tmp_path / "a.tsv").write_text(lines[0] + none + "\t".join(short))
    store = import_features([tmp_path / "a.tsv"], tmp_path / "store")
    assert (store.counts > 0).tolist() == [True, False, False]
    failed = (tmp_path / "store/failed.txt").read_text()
    assert "77\timage 77: no region" in failed
    assert "features of shape (2, 1), expected (2, 2048)" in failed


def test_distributions_that_do_not_add_up_are_not_imported(tmp_path):
    lines, _ = published(13, background="none")
    (tmp_path / "a.tsv").write_text(lines[0])
    cells = lines[0].split("\t")
    cells[10] = encoded(np.ones((1, 1601)), "<f4")
    (tmp_path / "b.tsv").write_text("\t".join(cells))
    with pytest.raises(BadInput, match="b.tsv: line 1: cls_prob of a region adds up to .*1601"):
        import_features([tmp_path / "b.tsv"], tmp_path / "store")


def test_the_command_imports_and_says_what_came_out(tmp_path, capsys):
    (tmp_path / "a.tsv").write_text("".join(published(10)[0]))
    data.main(["import", str(tmp_path / "a.tsv"), "-o", str(tmp_path / "store")])
    said = capsys.readouterr().out
    assert "4 images (0 failed), up to 3 regions of 2048" in said and "source: a.tsv" in said
    (tmp_path / "names.txt").write_text("a\nb\n")
    (tmp_path / "a.tsv").write_text(published(13)[0][0])
    with pytest.raises(SystemExit, match="names.txt: 2 names, but the features have 1600 classes"):
        data.main(["import", str(tmp_path / "a.tsv"), "-o", str(tmp_path / "other"), "--classes",
            str(tmp_path / "names.txt")])
