"""A hostile day in ten minutes: kills, damaged files, impossible flags. Not part of the test suite.

    python tests/tools/campaign.py [kills|files|flags ...] [--kills 1000] [--files 3000] [--seed 0]

    kills    a small run, half of the time with a loading process, is killed (SIGKILL) at random
             moments and at its renames and fsyncs, or stopped (SIGTERM to its group), and resumed,
             again and again: no checkpoint may be lost, and the weights at the end must be those of
             an undisturbed run, bit for bit
    files    files of every kind are damaged (bits, lengths, JSON values, a folder in their place)
             and read: a reader must refuse in a sentence (BadInput) or read; a traceback is a
             fault, and so is a damaged checkpoint that loads with other numbers
    flags    every numeric flag of every script is given values out of its range

Everything is drawn from --seed. It prints one table; its exit status is 1 if there was a fault.
"""

import argparse
import contextlib
import copy
import io
import json
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

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402
import extract_features  # noqa: E402
import finetune  # noqa: E402
import train  # noqa: E402
from data import BadInput, FeatureStore  # noqa: E402
from switchbert import SwitchBertConfig, SwitchBertForPretraining, load_bert  # noqa: E402

torch.set_num_threads(1)
WORDS = [*data.SPECIALS, *"a small red large ring".split(), *"abcdefghijklmnopqrstuvwxyz"]
CAPTIONS = [(str(i), f"a {word} ring") for i in range(10) for word in ("small", "red", "large")]


def make_store(folder):
    """Ten images of one to five regions; F = 12, C = 7."""
    rng = np.random.default_rng(0)
    head = rng.normal(size=(7, 12)), rng.normal(size=7)
    writer = FeatureStore.create(folder, range(10), 5, 12, detector="made up", class_head=head)
    for row in writer.pending():
        n = 1 + row % 5
        corner = rng.random((n, 2)) * 50
        writer.write(row, rng.normal(size=(n, 12)), np.hstack([corner, corner + 20]), (100, 80))
    return writer.finish()


# --- kills ----------------------------------------------------------------------------------------


def run_once(folder, store, flags, killer):
    """A run in a forked process, in a group of its own; killer(): called there before it begins."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        data.on_stop()  # as `run` does it
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
        status = 1
        try:
            words = data.WordPiece(list(WORDS))
            train.load_data = lambda *_: train.Data(store, CAPTIONS, CAPTIONS, words)
            args, checkpoint = train.parse_args(["--out", str(folder), "--batch", "6", "--epochs",
                "3", "--eval-every", "3", "--threads", "1", "--data", str(store.folder), *flags,
                "--model", "small"])
            killer()
            train.launch(args, lambda: train.pretrain(args, checkpoint))
            status = 0
        except SystemExit as end:
            status = end.code
        except KeyboardInterrupt:
            status = 130
        finally:
            os._exit(status)
    return pid


def weights_of(folder):
    """Weights and step of a checkpoint."""
    checkpoint = train.load_checkpoint(folder / "checkpoint.pt", "pretraining")
    return checkpoint["model"], checkpoint["step"]


def attack_kills(home, count, rng):
    """{outcome: number} of so many kills."""
    store, found = make_store(home / "store"), Counter()
    os.waitpid(run_once(home / "whole", store, [], lambda: None), 0)
    expected, last = weights_of(home / "whole")
    start = time.time()
    os.waitpid(run_once(home / "timed", store, [], lambda: None), 0)
    duration = time.time() - start
    while found["kills"] < count:
        folder, step = home / "run", 0
        shutil.rmtree(folder, ignore_errors=True)
        while step < last:
            point = rng.integers(4)  # a moment, a rename, an fsync, a moment for SIGTERM
            number = int(rng.integers(1, 8))

            def killer(point=point, number=number):
                calls = Counter()
                name = (None, "replace", "fsync", None)[point]
                if name is None:
                    return
                real = getattr(os, name)

                def deadly(*args):
                    calls[name] += 1
                    if calls[name] == number:
                        if number % 2:
                            real(*args)
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args)
                setattr(os, name, deadly)

            resume = ["--resume"] if (folder / "checkpoint.pt").exists() else []
            resume += ["--workers", str(rng.integers(2))]
            pid = run_once(folder, store, resume, killer)
            moment = rng.random() * duration if point in (0, 3) else 4 * duration
            deadline = time.time() + moment
            while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.time() < deadline:
                time.sleep(0.002)
            if ended[0] == 0:
                if point == 3:
                    with contextlib.suppress(ProcessLookupError):  # not yet a group
                        os.killpg(pid, signal.SIGTERM)
                else:
                    os.kill(pid, signal.SIGKILL)
                ended = os.waitpid(pid, 0)
            killed = os.WIFSIGNALED(ended[1])
            stopped = os.waitstatus_to_exitcode(ended[1]) == 130
            found["kills"] += killed
            found["stops"] += stopped
            found["runs that failed by themselves"] += not killed and not stopped and ended[1] != 0
            if (folder / "checkpoint.pt").exists():
                try:
                    reached = weights_of(folder)[1]
                except BadInput:
                    found["lost checkpoints"] += 1
                    break
                found["lost checkpoints"] += reached < step
                step = reached
            elif step:
                found["lost checkpoints"] += 1
                break
        else:
            found["finished runs"] += 1
            same = all(w.equal(expected[k]) for k, w in weights_of(folder)[0].items())
            found["unequal weights"] += not same
    return found


# --- files ----------------------------------------------------------------------------------------


def damage_bytes(content, rng):
    """Another content: flipped bits, a cut, a hole, repetition, noise, nothing."""
    content, n = bytearray(content), max(1, len(content))
    a, b = sorted(rng.integers(n, size=2).tolist())
    kind = rng.integers(6)
    if kind == 0:
        for place in rng.integers(n, size=int(rng.integers(1, 9))).tolist():
            content[place : place + 1] = bytes([int(rng.integers(256))])
    elif kind == 1:
        del content[a:]
    elif kind == 2:
        del content[a:b]
    elif kind == 3:
        content[a:a] = content[a:b]
    elif kind == 4:
        content[a:b] = rng.bytes(b - a)
    else:
        others = (b"", b"null", b"[]", b"{}", b"\xff\xfe\0", b"[" * 9999)
        content = bytearray(others[rng.integers(6)])
    return bytes(content)


def damage_json(value, rng):
    """The same JSON with one value somewhere in it replaced, or one key removed."""
    value = copy.deepcopy(value)
    here = value
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            return value
        key = keys[rng.integers(len(keys))]
        if isinstance(here[key], (dict, list)) and here[key] and rng.random() < 0.8:
            here = here[key]
            continue
        if rng.random() < 0.3:
            del here[key]
        else:
            here[key] = (None, -1, "x", [], {}, 1e400, True, "1", [[1]], 10**30)[rng.integers(10)]
        return value


def make_kinds(home):
    """{kind: (files that are damaged, function that reads them)}."""
    rng = np.random.default_rng(0)
    make_store(home / "store")

    def write(name, content):
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = content if isinstance(content, (bytes, str)) else json.dumps(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def encoded(array):
        return data.base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()

    def tsv_line(i):
        return "\t".join([str(i), "90", "60", "2", encoded(np.float32([[1, 1, 9, 9]] * 2)),
            encoded(rng.normal(size=(2, 8)).astype(np.float32))]) + "\n"

    def read_store():
        found = FeatureStore(home / "store")
        for row in np.flatnonzero(found.counts > 0):
            data.region_inputs(found, row)
            found.class_probs(row)

    def read_tsv():
        shutil.rmtree(home / "imported", ignore_errors=True)
        data.import_features([tsv], home / "imported")

    tsv = write("features.tsv", "".join(map(tsv_line, range(4))))
    plain = write("captions.tsv", "".join(f"{i}\t{t}\n" for i, t in CAPTIONS))
    coco = write("coco.json", {"annotations": [dict(image_id=i, caption=t) for i, t in CAPTIONS]})
    karpathy = write("karpathy.json", {"images": [dict(filename=f"{i}.jpg", split="train",
        sentences=[{"raw": t}]) for i, t in CAPTIONS]})
    vocab = write("vocab.txt", "".join(w + "\n" for w in WORDS))
    asked = write("vqa/questions.json", {"data_subtype": "train2014", "questions": [
        dict(image_id=i, question="what ?", question_id=i) for i in range(10)]})
    answered = write("vqa/annotations.json", {"data_subtype": "train2014", "annotations": [
        dict(question_id=i, multiple_choice_answer="ring", answer_type="other",
            question_type="what", answers=[{"answer": "ring"}] * 10) for i in range(10)]})
    refs = write("refer/refs(unc).p", pickle.dumps([dict(ref_id=i, ann_id=i, image_id=i,
        split="train", sentences=[dict(sent="ring", sent_id=i)]) for i in range(9)], protocol=2))
    instances = write("refer/instances.json",
        {"annotations": [dict(id=i, bbox=[1, 1, 5, 5]) for i in range(9)]})
    boxes = write("boxes.json", [dict(image_id=i, box=[1, 1, 8, 8], score=0.5) for i in range(5)])
    picture = home / "pictures" / "1.png"
    picture.parent.mkdir()
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(picture)

    config = SwitchBertConfig.tiny(vocab_size=len(WORDS))
    model = SwitchBertForPretraining(config)
    checkpoint = home / "checkpoint.pt"
    torch.save({"format": train.CHECKPOINT_FORMAT, "task": "pretraining", "config": {},
        "model": model.state_dict()}, checkpoint)
    good = {k: v.clone() for k, v in model.state_dict().items()}

    def read_checkpoint():
        found = train.load_checkpoint(checkpoint, "pretraining")["model"]
        if not all(found[k].equal(good[k]) for k in good):
            raise AssertionError("a damaged checkpoint loaded with other numbers")

    import test_switchbert
    bert = test_switchbert.write_bert(home / "bert", test_switchbert.bert_weights())

    def read_bert():
        with data.reading(bert, "a BERT"):
            load_bert(SwitchBertForPretraining(SwitchBertConfig.tiny()), bert)

    return {"store": (sorted((home / "store").glob("*.*")), read_store), "TSV": ([tsv], read_tsv),
        "captions": ([plain], lambda: data.Captions(data.read_captions(plain))),
        "COCO captions": ([coco], lambda: data.Captions(data.read_captions(coco))),
        "Karpathy's splits": ([karpathy], lambda: data.Captions(data.read_captions(karpathy))),
        "vocabulary": ([vocab], lambda: data.WordPiece(vocab).encode("a ring", 9)),
        "VQA": ([asked, answered], lambda: finetune.VQA.from_folder(home / "vqa")),
        "RefCOCO": ([refs, instances], lambda: finetune.Refer.from_folder(home / "refer")),
        "boxes": ([boxes], lambda: extract_features.read_boxes(boxes)),
        "pictures": ([picture], lambda: extract_features.open_picture(picture)),
        "checkpoints": ([checkpoint], read_checkpoint), "BERT": (sorted(bert.iterdir()), read_bert)}


def attack_files(home, count, rng):
    """{outcome: number} over so many damaged files."""
    found, kinds = Counter(), make_kinds(home)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("hangs")))
    for number in range(count):
        kind = list(kinds)[number % len(kinds)]
        files, read = kinds[kind]
        path = files[rng.integers(len(files))]
        content = path.read_bytes()
        if path.suffix == ".json" and rng.random() < 0.7:
            path.write_text(json.dumps(damage_json(json.loads(content), rng)))
        elif rng.random() < 0.03:
            path.unlink()
            path.mkdir()
        else:
            path.write_bytes(damage_bytes(content, rng))
        signal.alarm(20)
        try:
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), (
                    contextlib.redirect_stderr(null)):
                read()
            found["read"] += 1
        except (BadInput, OSError):
            found["refused in a sentence"] += 1
        except Exception as error:
            found["faults"] += 1
            print(f"{kind}: {path.name}: {''.join(traceback.format_exception(error)[-2:])}")
        signal.alarm(0)
        if path.is_dir():
            path.rmdir()
        path.write_bytes(content)
    return found


# --- flags ----------------------------------------------------------------------------------------


def attack_flags(home, count, rng):
    """{outcome: number} of flags out of their range, of every script."""
    found = Counter()
    numbers = ("--epochs", "--batch", "--lr", "--eval-every", "--anneal", "--limit", "--seed",
        "--gpus", "--accum", "--workers", "--threads")
    commands = [(train.parse_args, [])]
    commands += [(finetune.parse_args, [task]) for task in finetune.TASKS]
    for parse, words in commands:
        for flag in numbers:
            for value in ("-1", "nan", "inf", "-inf", "x", "", "1e400", "0x1", "1.5e"):
                found.update([outcome(parse, [*words, flag, value])])
            if flag not in ("--epochs", "--seed", "--workers"):
                found.update([outcome(parse, [*words, flag, "0"])])
    found.update([outcome(finetune.parse_args, ["retrieval", "--boxes", "gt"])])
    common = ["x", "-o", str(home / "s"), "--detector", "toy", "--weights", "w"]
    for flag in ("--regions", "--gpus", "--workers"):
        for value in ("-1", "nan", "x", "", "1.5"):
            found.update([outcome(extract_features.parse_args, [*common, flag, value])])
    return found


def outcome(parse, argv):
    """What a parser makes of a command line that it must refuse."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parse(argv)
    except SystemExit as error:
        return "refused in a sentence" if error.code == 2 else "faults"
    except BadInput:
        return "refused in a sentence"
    except Exception:
        traceback.print_exc()
        return "faults"
    print("accepted:", " ".join(argv))
    return "faults"


def main():
    """The attacks that were asked for, or all, and their table."""
    attacks = {"kills": attack_kills, "files": attack_files, "flags": attack_flags}
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("attacks", nargs="*", default=list(attacks))
    p.add_argument("--kills", type=int, default=1000)
    p.add_argument("--files", type=int, default=3000)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    bad = ("lost checkpoints", "unequal weights", "faults", "runs that failed by themselves")
    faults = 0
    for name in args.attacks:
        with tempfile.TemporaryDirectory() as home:
            start, rng = time.time(), np.random.default_rng([args.seed, len(name)])
            count = {"kills": args.kills, "files": args.files}.get(name, 0)
            found = attacks[name](Path(home), count, rng)
        found.update({b: 0 for b in bad[:2]} if name == "kills" else {"faults": 0})
        faults += sum(found[b] for b in bad)
        cells = ", ".join(f"{number:,} {what}" for what, number in found.items())
        print(f"{name:6s} {cells}; {time.time() - start:.0f} s", flush=True)
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
