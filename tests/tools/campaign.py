"""A hostile day in ten minutes: kills, damaged files, impossible flags. Not in the test suite.

    python tests/tools/campaign.py [kills|files|flags ...] [--kills 1000] [--files 3000] [--seed 0]

    kills    A small run, half of the time with a loading process, is killed (SIGKILL) at random
             moments and at its renames and fsyncs, or stopped (SIGTERM to its group). Then it is
             resumed, again and again. No checkpoint may be lost, and the weights at the end must
             be those of an undisturbed run, bit for bit.
    files    Files of every kind are damaged (bits, lengths, JSON values, a folder in their
             place) and read. A reader must read, or refuse in a sentence (BadInput). A traceback
             is a fault, and so is a damaged checkpoint that loads with other numbers.
    flags    Every numeric flag of every script is given values out of its range.

Everything is drawn from --seed. The campaign prints one table. Its exit status is 1 if there was
a fault.
"""

import argparse
import base64
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from string import ascii_lowercase

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402
import extract_features  # noqa: E402
import finetune  # noqa: E402
import test_switchbert  # noqa: E402
import train  # noqa: E402
from data import BadInput, FeatureStore  # noqa: E402
from switchbert import SwitchBertConfig, SwitchBertForPretraining, load_bert  # noqa: E402

torch.set_num_threads(1)
WORDS = list(data.SPECIALS) + "a small red large ring".split() + list(ascii_lowercase)
ADJECTIVES = ("small", "red", "large")
CAPTIONS = [(str(i), f"a {word} ring") for i in range(10) for word in ADJECTIVES]


def make_store(folder):
    """Ten images of one to five regions; F = 12, C = 7."""
    rng = np.random.default_rng(0)
    head = rng.normal(size=(7, 12)), rng.normal(size=7)
    writer = FeatureStore.create(folder, range(10), 5, 12, detector="made up", class_head=head)
    for row in writer.pending():
        n = 1 + row % 5
        corner = rng.random((n, 2)) * 50
        boxes = np.hstack([corner, corner + 20])
        writer.write(row, rng.normal(size=(n, 12)), boxes, (100, 80))
    return writer.finish()


# --- Kills ----------------------------------------------------------------------------------------

WAYS = ("SIGKILL", "SIGTERM", "replace", "fsync")  # a signal, or a call of os that it dies at
# Exit statuses.
KILLED = -signal.SIGKILL
STOPPED = 130
FORK = multiprocessing.get_context("fork")


def train_here(folder, store, flags, prepare):
    """A run, in a process group of its own. prepare() is called before it begins."""
    os.setsid()
    data.on_stop()  # as `run` does it
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    status = 1
    try:
        words = data.WordPiece(list(WORDS))
        train.load_data = lambda *_: train.Data(store, CAPTIONS, CAPTIONS, words)
        argv = "--model small --batch 6 --epochs 3 --eval-every 3 --threads 1".split()
        argv += ["--out", str(folder), "--data", str(store.folder)] + flags
        args, checkpoint = train.parse_args(argv)
        prepare()
        train.launch(args, lambda: train.pretrain(args, checkpoint))
        status = 0
    except SystemExit as end:
        status = end.code
    except KeyboardInterrupt:
        status = STOPPED
    finally:
        os._exit(status)


def start_run(folder, store, flags=None, prepare=lambda: None, seconds=None):
    """Start a run in a forked process, and wait for its end, or so many seconds."""
    arguments = (folder, store, flags or [], prepare)
    process = FORK.Process(target=train_here, args=arguments)
    process.start()
    process.join(seconds)
    return process


def die_at(name, number):
    """Let this process kill itself at a call of os.name: after it if the number is odd."""
    real = getattr(os, name)
    calls = itertools.count(1)

    def deadly(*args):
        if next(calls) == number:
            if number % 2:
                real(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    setattr(os, name, deadly)


def disturbed_run(folder, store, duration, rng):
    """Start or resume a run and end it in a random way; its exit status, 0 if it was faster."""
    way = WAYS[rng.integers(len(WAYS))]
    number = int(rng.integers(1, 8))
    flags = ["--workers", str(rng.integers(2))]
    if (folder / "checkpoint.pt").exists():
        flags.append("--resume")
    if way in ("replace", "fsync"):
        process = start_run(folder, store, flags, lambda: die_at(way, number), 4 * duration)
    else:
        process = start_run(folder, store, flags, seconds=duration * rng.random())
    if way == "SIGTERM" and process.is_alive():
        with contextlib.suppress(ProcessLookupError):  # not yet a group
            os.killpg(process.pid, signal.SIGTERM)
    else:
        process.kill()  # nothing happens if it has ended
    process.join()
    return process.exitcode


def state_of(folder):
    """(step, weights) of a checkpoint; step 0 without one, and -1 of a broken one."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return 0, {}
    try:
        checkpoint = train.load_checkpoint(path, "pretraining")
    except BadInput:
        return -1, {}
    return checkpoint["step"], checkpoint["model"]


def attack_kills(home, count, rng):
    """{outcome: number} of so many kills."""
    store = make_store(home / "store")
    start_run(home / "whole", store)
    last, expected = state_of(home / "whole")
    start = time.time()
    start_run(home / "timed", store)
    duration = time.time() - start
    folder = home / "run"
    names = {KILLED: "kills", STOPPED: "stops", 0: "ends before that"}
    found = Counter()
    while found["kills"] < count:
        shutil.rmtree(folder, ignore_errors=True)
        step = 0
        while 0 <= step < last:
            status = disturbed_run(folder, store, duration, rng)
            found[names.get(status, "runs that failed by themselves")] += 1
            before = step
            step, weights = state_of(folder)
            found["lost checkpoints"] += step < before
        if step == last:
            found["finished runs"] += 1
            equal = all(weight.equal(expected[name]) for name, weight in weights.items())
            found["unequal weights"] += not equal
    return found


# --- Files ----------------------------------------------------------------------------------------

NO_FILES = (b"", b"null", b"[]", b"{}", b"\xff\xfe\0", b"[" * 9999)
NO_VALUES = (None, -1, "x", [], {}, 1e400, True, "1", [[1]], 10**30)


def damage_bytes(content, rng):
    """Another content: flipped bits, a cut, a hole, repetition, noise, nothing."""
    content = bytearray(content)
    size = max(1, len(content))
    a, b = sorted(rng.integers(size, size=2).tolist())
    way = rng.integers(6)
    if way == 0:
        for place in rng.integers(size, size=rng.integers(1, 9)).tolist():
            content[place : place + 1] = rng.bytes(1)
    elif way == 1:
        del content[a:]
    elif way == 2:
        del content[a:b]
    elif way == 3:
        content[a:a] = content[a:b]
    elif way == 4:
        content[a:b] = rng.bytes(b - a)
    else:
        return NO_FILES[rng.integers(len(NO_FILES))]
    return bytes(content)


def damage_json(text, rng):
    """The same JSON with one value somewhere in it replaced, or one key removed."""
    whole = here = json.loads(text)
    while here:
        keys = list(here) if isinstance(here, dict) else range(len(here))
        key = keys[rng.integers(len(keys))]
        if isinstance(here[key], (dict, list)) and here[key] and rng.random() < 0.8:
            here = here[key]  # one level deeper
        elif rng.random() < 0.3:
            del here[key]
            break
        else:
            here[key] = NO_VALUES[rng.integers(len(NO_VALUES))]
            break
    return whole


def write(path, content):
    """Write bytes, text, or anything else as JSON; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    return path


# Each of these writes files of one kind, and returns them and a function that reads them.


def store_files(home):
    make_store(home / "store")

    def read():
        store = FeatureStore(home / "store")
        for row in np.flatnonzero(store.counts > 0):
            data.region_inputs(store, row)
            store.class_probs(row)

    return sorted((home / "store").glob("*.*")), read


def tsv_files(home):
    rng = np.random.default_rng(0)
    box = base64.b64encode(np.array([1, 1, 9, 9], np.float32).tobytes()).decode()
    lines = ""
    for i in range(4):
        features = rng.normal(size=8).astype(np.float32)
        features = base64.b64encode(features.tobytes()).decode()
        lines += f"{i}\t90\t60\t1\t{box}\t{features}\n"  # id, width, height, one box
    path = write(home / "features.tsv", lines)

    def read():
        shutil.rmtree(home / "imported", ignore_errors=True)
        data.import_features([path], home / "imported")

    return [path], read


def caption_files(name, content):
    """The function for a caption file with this content."""
    def make(home):
        path = write(home / name, content)
        return [path], lambda: data.Captions(data.read_captions(path))

    return make


TABLE = "".join(f"{i}\t{text}\n" for i, text in CAPTIONS)
COCO = {"annotations": [dict(image_id=i, caption=text) for i, text in CAPTIONS]}
KARPATHY = {"images": [
    dict(filename=f"{i}.jpg", split="train", sentences=[{"raw": text}]) for i, text in CAPTIONS]}


def vocabulary_files(home):
    path = write(home / "vocab.txt", "\n".join(WORDS) + "\n")
    return [path], lambda: data.WordPiece(path).encode("a ring", 9)


def vqa_files(home):
    questions = [dict(image_id=i, question="what ?", question_id=i) for i in range(10)]
    annotation = dict(multiple_choice_answer="ring", answer_type="other",
        question_type="what", answers=[{"answer": "ring"}] * 10)
    annotations = [annotation | {"question_id": i} for i in range(10)]
    folder = home / "vqa"
    asked = {"data_subtype": "train2014", "questions": questions}
    answered = {"data_subtype": "train2014", "annotations": annotations}
    paths = [
        write(folder / "questions.json", asked),
        write(folder / "annotations.json", answered),
    ]
    return paths, lambda: finetune.VQA.from_folder(folder, None)


def refer_files(home):
    refs = []
    for i in range(9):
        sentences = [dict(sent="ring", sent_id=i)]
        refs.append(dict(ref_id=i, ann_id=i, image_id=i, split="train", sentences=sentences))
    boxes = {"annotations": [dict(id=i, bbox=[1, 1, 5, 5]) for i in range(9)]}
    folder = home / "refer"
    pickled = write(folder / "refs(unc).p", pickle.dumps(refs, protocol=2))
    instances = write(folder / "instances.json", boxes)
    return [pickled, instances], lambda: finetune.Refer.from_folder(folder, None)


def box_files(home):
    boxes = [dict(image_id=i, box=[1, 1, 8, 8], score=0.5) for i in range(5)]
    path = write(home / "boxes.json", boxes)
    return [path], lambda: extract_features.read_boxes(path)


def picture_files(home):
    path = home / "1.png"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return [path], lambda: extract_features.open_picture(path)


def checkpoint_files(home):
    path = home / "checkpoint.pt"
    config = SwitchBertConfig.tiny(vocab_size=len(WORDS))
    weights = SwitchBertForPretraining(config).state_dict()
    torch.save({"format": train.CHECKPOINT_FORMAT, "task": "pretraining", "config": {},
        "model": weights}, path)

    def read():
        loaded = train.load_checkpoint(path, "pretraining")["model"]
        if not all(loaded[name].equal(weight) for name, weight in weights.items()):
            raise AssertionError("a damaged checkpoint loaded with other numbers")

    return [path], read


def bert_files(home):
    folder = test_switchbert.write_bert(home / "bert", test_switchbert.bert_weights())

    def read():
        with data.reading(folder, "a BERT"):
            load_bert(SwitchBertForPretraining(SwitchBertConfig.tiny()), folder)

    return sorted(folder.iterdir()), read


FILES = {
    "store": store_files,
    "TSV": tsv_files,
    "captions": caption_files("captions.tsv", TABLE),
    "COCO captions": caption_files("coco.json", COCO),
    "Karpathy's splits": caption_files("karpathy.json", KARPATHY),
    "vocabulary": vocabulary_files,
    "VQA": vqa_files,
    "RefCOCO": refer_files,
    "boxes": box_files,
    "pictures": picture_files,
    "checkpoints": checkpoint_files,
    "BERT": bert_files,
}


def damage(path, rng):
    """Damage a file."""
    if path.suffix == ".json" and rng.random() < 0.7:
        write(path, damage_json(path.read_bytes(), rng))
    elif rng.random() < 0.03:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(damage_bytes(path.read_bytes(), rng))


def time_is_up(number, frame):
    raise TimeoutError("hangs")


def outcome_of(read, what):
    """Read a damaged file: what comes of it?"""
    signal.alarm(20)  # seconds
    try:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            read()
        return "read"
    except (BadInput, OSError):
        return "refused in a sentence"
    except Exception as error:
        print(f"{what}: {''.join(traceback.format_exception(error)[-2:])}")
        return "faults"
    finally:
        signal.alarm(0)


def attack_files(home, count, rng):
    """{outcome: number} over so many damaged files."""
    signal.signal(signal.SIGALRM, time_is_up)
    made = {kind: make(home) for kind, make in FILES.items()}
    found = Counter()
    for kind, (paths, read) in itertools.islice(itertools.cycle(made.items()), count):
        path = paths[rng.integers(len(paths))]
        whole = path.read_bytes()
        damage(path, rng)
        found[outcome_of(read, f"{kind}: {path.name}")] += 1
        if path.is_dir():
            path.rmdir()
        path.write_bytes(whole)
    return found


# --- Flags ----------------------------------------------------------------------------------------

NUMBERS = ("--epochs", "--batch", "--lr", "--eval-every", "--anneal", "--limit", "--seed",
    "--gpus", "--accum", "--workers", "--threads")
MAY_BE_ZERO = ("--epochs", "--seed", "--workers")
NO_NUMBERS = ("-1", "nan", "inf", "-inf", "x", "", "1e400", "0x1", "1.5e")


def verdict(parse, argv):
    """What a parser makes of a command line that it must refuse."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parse(argv)
        print("accepted:", " ".join(argv))
    except SystemExit as error:
        if error.code == 2:
            return "refused in a sentence"
    except BadInput:
        return "refused in a sentence"
    except Exception:
        traceback.print_exc()
    return "faults"


def attack_flags(home, count, rng):
    """{outcome: number} of flags out of their range, of every script."""
    found = Counter()
    commands = [(train.parse_args, [])]
    commands += [(finetune.parse_args, [task]) for task in finetune.TASKS]
    for parse, words in commands:
        for flag in NUMBERS:
            values = NO_NUMBERS if flag in MAY_BE_ZERO else NO_NUMBERS + ("0",)
            for value in values:
                found[verdict(parse, words + [flag, value])] += 1
    found[verdict(finetune.parse_args, ["retrieval", "--boxes", "gt"])] += 1
    words = ["x", "-o", str(home / "s"), "--detector", "toy", "--weights", "w"]
    for flag in ("--regions", "--gpus", "--workers"):
        for value in ("-1", "nan", "x", "", "1.5"):
            found[verdict(extract_features.parse_args, words + [flag, value])] += 1
    return found


# --- The campaign ---------------------------------------------------------------------------------

ATTACKS = {"kills": attack_kills, "files": attack_files, "flags": attack_flags}
# What must not happen; each is printed, also where there was none.
BAD = {
    "kills": ("lost checkpoints", "unequal weights", "runs that failed by themselves"),
    "files": ("faults",),
    "flags": ("faults",),
}


def main():
    """Lead the attacks that were asked for, or all; print their outcomes."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("attacks", nargs="*", default=list(ATTACKS))
    p.add_argument("--kills", type=int, default=1000)
    p.add_argument("--files", type=int, default=3000)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    faults = 0
    for number, name in enumerate(args.attacks):
        start = time.time()
        rng = np.random.default_rng([args.seed, number])
        count = vars(args).get(name)
        with tempfile.TemporaryDirectory() as home:
            found = ATTACKS[name](Path(home), count, rng)
        for outcome in BAD[name]:
            faults += found[outcome]
            found.setdefault(outcome, 0)
        cells = ", ".join(f"{times:,} {outcome}" for outcome, times in found.items())
        print(f"{name:6s} {cells}; {time.time() - start:.0f} s", flush=True)
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
