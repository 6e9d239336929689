"""Do learned switches earn their keep? The paper's question, on the toy world, in the open.

    python tests/ablation.py                     every setting, five seeds: an hour and a half
    python tests/ablation.py --quick             two seeds of pretraining alone: twenty minutes
    python tests/ablation.py table               the README's table, from assets/ablation.jsonl
    python tests/ablation.py --settings II,XX,JJ,JJ single --seeds 3

A run is what a user would type: train.py, then finetune.py for each task, each in one thread; two
runs side by side use two cores best. A run that is finished has a line in assets/ablation.jsonl and
is not made again: stop it at any moment, and the same command goes on.

There are three kinds of scenes. Models train on the first kind; the second, held-out scenes of
train.py, is for tuning: every choice in this project was made on it. What is printed here is
measured on the third, 400 scenes from number 2,000,000 on, which nothing was ever chosen by.

Settings are values of --switches. `chosen` is the path of modes that the learned model of the same
seed ended in, frozen, and trained from the start: does the choice help, or the learning?
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import extract_features  # noqa: E402
import finetune  # noqa: E402
import train  # noqa: E402
from data import (FeatureStore, PretrainingDataset, Scene, WordPiece, run,  # noqa: E402
    save_png)
from switchbert import (LETTERS, SwitchBertConfig, SwitchBertForPretraining,  # noqa: E402
    SwitchBertForRetrieval)

RESULTS = ROOT / "assets" / "ablation.jsonl"
SETTINGS = ("learned", "attention", "input", "single", "dual", "late", "intra", "chosen")
FIXED = ("single", "dual", "late", "intra")  # published structures: what learning competes with
THIRD, SCENES = 2_000_000, 400
# Tasks after pretraining: the name of a run -> the command. `refer 25` stops while it still learns.
TASKS = {"vqa": "vqa", "retrieval": "retrieval", "refer 25": "refer --limit 1600 --eval-every 25",
    "refer": "refer"}
# Measure -> is higher better? Shares, but for the KL divergence of masked regions.
MEASURES = {"image R@1": True, "text R@1": True, "masked words": True, "region KL": False,
    "matching": True, "VQA": True, "retrieval: image": True, "retrieval: text": True,
    "refer, 25 steps": True, "refer": True}


# --- Measuring a finished run ---------------------------------------------------------------------


def load(path, task, make):
    """(checkpoint, model) of a run; make(config, checkpoint) -> the model without weights."""
    saved = train.load_checkpoint(path / "checkpoint.pt", task)
    model = make(SwitchBertConfig(**saved["config"]), saved).eval()
    model.load_state_dict(saved["model"])
    return saved, model


@torch.no_grad()
def measure_pretraining(folder, store):
    """Zero-shot recalls, the mean of four folds of 100 scenes, and losses and accuracies."""
    saved, model = load(folder / "pretrain", "pretraining",
        lambda config, _: SwitchBertForPretraining(config))
    tokenizer, numbers = WordPiece(saved["vocab"]), range(THIRD, THIRD + SCENES)
    pairs = [(n, text) for n in numbers for text in Scene(n).captions(2)]
    masked, whole = (PretrainingDataset(store, pairs, tokenizer, seed=1, masking=masking)
        for masking in (True, False))
    scores, switches = train.evaluate(model, masked)
    ranker = SwitchBertForRetrieval.from_pretraining(model.config, model.state_dict())
    recalls = []
    for fold in np.split(np.array(numbers), 4):
        texts, ids = [Scene(n).captions(1)[0] for n in fold], [str(n) for n in fold]
        found = train.match_scores(ranker, store, tokenizer, texts, ids)
        recalls.append(train.recall_at(found, torch.arange(len(fold)), (1,)))
    path = ",".join("".join(LETTERS[int(np.argmax(shares))] for shares in layer)
        for layer in switches["modes"])
    return {"image R@1": np.mean([r["image R@1"] for r in recalls]),
        "text R@1": np.mean([r["text R@1"] for r in recalls]), "masked words": scores["words"],
        "region KL": scores["mrc"], "matching": train.evaluate(model, whole)[0]["match"]}, path


def measure_task(folder, name, store):
    """The scores of a finetuned model; retrieval among 100, the mean of four folds."""
    kind = finetune.TASKS[TASKS[name].split()[0]]
    saved, model = load(folder / name.replace(" ", "-"), kind.name,
        lambda config, saved: kind.new_model(config, saved["labels"]))
    args, _ = finetune.parse_args([kind.name])
    size, split = (100, "test") if name == "retrieval" else (SCENES, "val")
    found = []
    for first in range(THIRD, THIRD + SCENES, size):
        items = kind.from_scenes(range(0), range(first, first + size))[split]
        task = kind(store, WordPiece(saved["vocab"]), {"train": items, "third": items}, args,
            saved["labels"])
        found.append(task.evaluate_items(model, items)[0])
    names = {"vqa": {"VQA": "accuracy"}, "refer": {"refer": "accuracy"}, "refer 25": {
        "refer, 25 steps": "accuracy"}, "retrieval": {"retrieval: image": "image R@1",
        "retrieval: text": "text R@1"}}[name]
    return {ours: np.mean([scores[theirs] for scores in found]) for ours, theirs in names.items()}


def measure(folder):
    """Print the scores of a run's folder as a line of JSON."""
    torch.set_num_threads(1)
    store = FeatureStore(folder.parent / "third")
    scores, path = measure_pretraining(folder, store)
    for name in TASKS:
        if (folder / name.replace(" ", "-") / "checkpoint.pt").exists():
            scores |= measure_task(folder, name, store)
    lines = map(json.loads, (folder / "pretrain" / "metrics.jsonl").read_text().splitlines())
    speeds = [line["per_second"] for line in lines if "per_second" in line]
    print(json.dumps({"path": path, "pairs per second": round(float(np.median(speeds)), 1),
        "scores": {name: round(float(score), 4) for name, score in scores.items()}}))


# --- Making the runs ------------------------------------------------------------------------------


def call(work, *words):
    """Run a script in the work folder, in one thread; its output, or an error that holds it."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=work, capture_output=True,
        text=True)
    if done.returncode:
        raise RuntimeError(f"{words}: {done.stdout[-500:]} {done.stderr[-2000:]}")
    return done.stdout


def read_results(path=RESULTS):
    """The lines of the results file, in its order."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def one_run(work, setting, seed, quick, lock):
    """Pretrain, finetune, measure, and add a line to the results. A finished part stays."""
    results = read_results()
    if any((r["setting"], r["seed"], r["quick"]) == (setting, seed, quick) for r in results):
        return
    switches, folder = setting, work / f"{setting}-{seed}"
    if setting == "chosen":
        switches = next(r["path"] for r in results
            if (r["setting"], r["seed"]) == ("learned", seed))
    started, commands = time.time(), {"pretrain": ["train.py", "--switches", switches]}
    if not quick:
        commands |= {name.replace(" ", "-"): ["finetune.py", *command.split(), "--checkpoint",
            folder / "pretrain" / "checkpoint.pt"] for name, command in TASKS.items()}
    for name, (script, *words) in commands.items():
        if not (folder / name / "finished").exists():
            call(work, ROOT / script, *words, "--seed", seed, "--threads", 1, "--out",
                folder / name)
            (folder / name / "finished").touch()
    found = json.loads(call(work, Path(__file__), "measure", folder).splitlines()[-1])
    line = dict(setting=setting, switches=switches, seed=seed, quick=quick, **found)
    with lock:
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{setting} {seed}: {time.time() - started:.0f} s, {found['path']}, "
            f"{found['scores']}", flush=True)


def make_runs(args):
    """All runs that have no line yet: two at a time, seed by seed."""
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    world = work / "runs" / "world"
    call(work, ROOT / "train.py", "--epochs", 0)  # makes the world, if it is not there
    detector = extract_features.build_detector("toy", world / "detector.pt")
    extract_features.extract_scenes(detector, range(THIRD, THIRD + SCENES), work / "third")
    lock, jobs = threading.Lock(), [(s, seed) for seed in range(args.seeds) for s in args.settings]
    jobs.sort(key=lambda job: job[0] == "chosen")  # it needs the learned ones
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(one_run, work, *job, args.quick, lock) for job in jobs]
        for job in waiting:
            job.result()


# --- Table and picture ----------------------------------------------------------------------------


def scores_of(results, quick=False):
    """{measure: {setting: {seed: score}}}"""
    found = {}
    for line in results:
        if line["quick"] == quick:
            for name, score in line["scores"].items():
                found.setdefault(name, {}).setdefault(line["setting"], {})[line["seed"]] = score
    return found


def settings_of(scores):
    """The settings that have scores: those of SETTINGS in their order, then other paths."""
    found = next(iter(scores.values()))
    return [s for s in SETTINGS if s in found] + [s for s in found if s not in SETTINGS]


def mean_and_error(values):
    """Mean and its standard error; the error of one value is unknown: 0."""
    values = np.array(list(values), dtype=float)
    return values.mean(), values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0


def paired(one, other):
    """Mean and standard error of one - other over the seeds that both have."""
    return mean_and_error(one[seed] - other[seed] for seed in one.keys() & other.keys())


def mean_ranks(scores, settings):
    """{setting: its mean rank among these over all measures, 1 is best}"""
    ranks = Counter()
    for name, each in scores.items():
        means = {s: mean_and_error(each[s].values())[0] for s in settings}
        for s in settings:
            better = [t for t in settings if (means[t] > means[s]) == MEASURES[name]
                and means[t] != means[s]]
            ranks[s] += (1 + len(better)) / len(scores)
    return dict(ranks)


def short(mean, error, sign=""):
    """'.781±.012', '+.020±.010' with sign '+': no zeros in front, no spaces."""
    return "±".join(f"{value:{form}.3f}".replace("0.", ".", 1) if abs(value) < 1 else
        f"{value:{form}.3f}" for value, form in ((mean, sign), (error, "")))


def table(results):
    """The README's table: mean ± standard error over seeds, the best in bold; and the difference
    of learned switches to the best fixed structure, paired by seed.
    """
    scores = scores_of(results)
    settings = settings_of(scores)
    fixed = [s for s in settings if s in FIXED or s not in SETTINGS]
    compared = [s for s in settings if s == "learned" or s in fixed]
    rows = [["measure", *settings, "learned - best fixed"], ["---"] * (len(settings) + 2)]
    for name, each in scores.items():
        means = {s: mean_and_error(each[s].values()) for s in settings}
        pick = max if MEASURES[name] else min
        leader = pick(settings, key=lambda s: means[s][0])
        cells = [short(*means[s]) for s in settings]
        cells = [f"**{c}**" if s == leader else c for s, c in zip(settings, cells)]
        difference = ""
        if "learned" in settings and fixed:
            best = pick(fixed, key=lambda s: means[s][0])
            difference = short(*paired(each["learned"], each[best]), "+")
        rows.append([name, *cells, difference])
    ranks = mean_ranks(scores, compared)
    rows.append(["mean rank", *(f"{ranks[s]:.1f}" if s in ranks else "" for s in settings), ""])
    # The fastest of a setting's runs: others had the machine to share.
    speeds = {s: max(r["pairs per second"] for r in results if r["setting"] == s)
        for s in settings}
    rows.append(["pairs/s", *(f"{speeds[s]:.0f}" for s in settings), ""])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(results, width=230, height=190):
    """A panel per measure with a dot per run, a column per setting, and the mean as a line."""
    scores, font = scores_of(results), ImageFont.load_default(12)
    settings, panels = settings_of(scores), []
    for name, each in scores.items():
        panel = Image.new("RGB", (width, height), "white")
        pen, values = ImageDraw.Draw(panel), [v for s in settings for v in each[s].values()]
        low, high = min(values), max(values)
        y_of = lambda v, a=low, b=high: 150 - 115 * (v - a) / max(b - a, 1e-9)  # noqa: E731
        pen.text((10, 6), name + ("" if MEASURES[name] else " (lower is better)"), "black", font)
        for value in (low, high):
            pen.text((2, y_of(value) - 7), f"{value:.2f}", "grey", font)
        for column, s in enumerate(settings):
            x = 48 + column * (width - 60) // len(settings)
            colour = (200, 60, 40) if s == "learned" else (66, 114, 196)
            for value in each[s].values():
                y = y_of(value)
                pen.ellipse([x - 3, y - 3, x + 3, y + 3], outline=colour, width=1)
            mean = y_of(mean_and_error(each[s].values())[0])
            pen.line([x - 7, mean, x + 7, mean], fill=colour, width=2)
            pen.text((x, 160 + 12 * (column % 2)), s, "black", ImageFont.load_default(10),
                anchor="ma")
        panels.append(panel)
    return train.stack(panels, columns=5)


def main(argv=None):
    """Make the runs, print the table, draw the picture."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["measure"]:
        return measure(Path(argv[1]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["table"], help="only print the table, and draw")
    parser.add_argument("--quick", action="store_true", help="two seeds, pretraining alone")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"))
    args = parser.parse_args(argv)
    args.seeds = 2 if args.quick else args.seeds
    if args.what != "table":
        make_runs(args)
    results = [r | {"quick": False} for r in read_results() if r["quick"] == args.quick]
    print(table(results))
    save_png(RESULTS.with_suffix(".png"), draw(results))


if __name__ == "__main__":
    run(main)
