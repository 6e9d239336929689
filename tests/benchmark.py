"""Speed, as ratios of things measured in turn in one run: python tests/benchmark.py [store|extract]

A figure in seconds says more of the machine than of the code; a ratio of two that took turns within
a second of each other says something of the code on any machine. Let nothing else run beside it.

    store      reading a feature store against plain copies in memory, .npz files, pickled records
    extract    extraction from picture files against the bare network, at its real size
"""

import argparse
import mmap
import pickle
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import extract_features  # noqa: E402
from data import FeatureStore, pad  # noqa: E402


def take_turns(functions, rounds):
    """{name: median seconds} of functions that are called in turn, after one call that warms up."""
    seconds = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function(turn)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(each) for name, each in seconds.items()}


def benchmark_store(folder, images=2000, batch=256, rounds=30):
    """Batches (256, 36, 2048) of random images of a store that is in the page cache (295 MB)."""
    rng = np.random.default_rng(0)
    ram = rng.normal(size=(images, 36, 2048)).astype(np.float16)
    boxes = np.tile(np.array([1, 1, 9, 9], np.float32), (36, 1))
    writer = FeatureStore.create(folder / "store", range(images), 36, 2048)
    (folder / "npz").mkdir()
    offsets = [0]
    with open(folder / "records", "wb") as records:
        for row in range(images):
            record = dict(features=ram[row], boxes=boxes, size=(10, 10))
            writer.write(row, **record)
            np.savez(folder / "npz" / f"{row}.npz", **record)
            records.write(pickle.dumps(record, protocol=5))
            offsets.append(records.tell())
    store = writer.finish()
    with open(folder / "records", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def npz(row):
        with np.load(folder / "npz" / f"{row}.npz", allow_pickle=False) as file:
            return {name: file[name] for name in file}

    readers = {"store": lambda row: store[row], "npz": npz,
        "pickle": lambda row: pickle.loads(mapped[offsets[row] : offsets[row + 1]])}
    orders = [rng.integers(images, size=batch) for _ in range(rounds + 1)]
    seconds = take_turns({"memory": lambda turn: np.stack([ram[row] for row in orders[turn]]),
        **{name: lambda turn, read=read: pad([read(row)["features"] for row in orders[turn]])
            for name, read in readers.items()}}, rounds)
    size = batch * ram[0].nbytes / 1e9
    print(f"store: random batches of {batch} at {size / seconds['store']:.1f} GB/s, "
        f"{seconds['memory'] / seconds['store']:.2f} of plain copies in memory; "
        f"{seconds['npz'] / seconds['store']:.1f} x as fast as a .npz an image, "
        f"{seconds['pickle'] / seconds['store']:.1f} x as fast as pickled records")


def benchmark_extract(folder, pictures=2, rounds=3):
    """vg at 600 x 1000 with random weights: all of `extract` from JPEG files, against backbone,
    proposals, pooling and head alone on the prepared pictures.
    """
    torch.manual_seed(0)
    model = extract_features.build_detector("vg")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    for name, buffer in model.named_buffers():
        if name.endswith("bn3.weight"):
            buffer.fill_(0.2)  # or what 33 blocks add grows beyond all numbers
    # With random weights and no anchors all boxes would be alike, and selection would be free.
    sizes = 2.0 ** torch.arange(4).repeat_interleave(3) * 20
    wide = torch.tensor([1.4, 1.0, 0.7]).repeat(4) * sizes
    model.rpn.anchor_generator.cells.copy_(
        torch.stack([-wide, -sizes * sizes / wide, wide, sizes * sizes / wide], dim=1))
    weights = folder / "vg.pt"  # the flags want a name; the model is given below
    (folder / "images").mkdir()
    for i in range(pictures):
        noise = np.random.default_rng(i).integers(0, 256, (38, 63, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((1000, 600)).save(folder / "images" / f"{i}.jpg")
    files = extract_features.find_pictures(folder / "images")
    images = [extract_features.pil_to_tensor(extract_features.open_picture(p)) / 255
        for _, p in files]
    prepared = [model.transform([i.to(next(model.parameters()).device)])[0] for i in images]

    @torch.no_grad()
    def network(turn):
        for image in prepared:
            maps = {"0": model.backbone(image.tensors)}
            boxes, _ = model.rpn(image, maps)
            pooled = model.roi_heads.box_roi_pool(maps, boxes, image.image_sizes)
            model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def extraction(turn):
        args = extract_features.parse_args([str(folder / "images"), "-o", str(folder / f"s{turn}"),
            "--weights", str(weights), "--workers", "0"])
        writer = FeatureStore.create(args.out, [i for i, _ in files], 36, **model.about)
        extract_features.extract_part(args, model, writer, files, None)

    seconds = take_turns({"network": network, "extraction": extraction}, rounds)
    print(f"extract: {pictures / seconds['extraction']:.3f} pictures/s at 600 x 1000 on "
        f"{next(model.parameters()).device.type}; loading, selection and writing add "
        f"{100 * (seconds['extraction'] / seconds['network'] - 1):.1f} % to the network's time")


BENCHMARKS = {"store": benchmark_store, "extract": benchmark_extract}


def main():
    """Those that were asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="*", default=list(BENCHMARKS),
        help=" ".join(BENCHMARKS))
    for name in parser.parse_args().which:
        with tempfile.TemporaryDirectory() as folder:
            BENCHMARKS[name](Path(folder))


if __name__ == "__main__":
    main()
