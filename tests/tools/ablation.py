"""Do learned switches earn their keep? The paper's question, on the toy world.

    python tests/tools/ablation.py                     eight settings, five seeds, 900 steps
    python tests/tools/ablation.py --epochs 16         3,600 steps: eight to twelve minutes a run
    python tests/tools/ablation.py --tasks             finetunes them as well
    python tests/tools/ablation.py --settings learned@12 II,XX,JJ,JJ --seeds 3
    python tests/tools/ablation.py table               only prints the tables and draws

A run is what a user would type: train.py, and with --tasks also finetune.py for each task, each
in one thread. A run is named by its setting, its seed and its epochs. When it is finished, it has
a line in assets/ablation.jsonl, and it is not made again: stop at any moment, and the same
command goes on. If a run has a line without scores of the tasks, --tasks adds them. The models
stay in the folder --work. After a change of the code, choose another one.

There are three kinds of scenes. Models train on the first kind. The second kind, the held-out
scenes of train.py, is for tuning: every choice in this project was made on them. The tables are
measured on the third kind, 400 scenes from number 2,000,000 on, which no choice was made on.
Only the curves of the figure come from the second kind, because train.py records them.

A setting is a value of --switches. It may end in `+dropout`, for BERT's dropout of .1 instead
of none, and in `@12`, for twelve layers instead of four. `chosen` takes the modes in which the
learned run of the same seed and length ended, freezes them, and trains from the start: does the
choice help, or the learning?
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import extract_features  # noqa: E402
import finetune  # noqa: E402
import train  # noqa: E402
from data import (BadInput, FeatureStore, PretrainingDataset, Scene, WordPiece,  # noqa: E402
    only_run_in, run, save_png, write_whole)
from switchbert import (LETTERS, SwitchBertConfig, SwitchBertForPretraining,  # noqa: E402
    SwitchBertForRetrieval)

RESULTS = ROOT / "assets" / "ablation.jsonl"

# --- 1. What is compared --------------------------------------------------------------------------

LEARNED = ("learned", "attention", "input")
PUBLISHED = ("single", "dual", "late")  # structures that learned switches compete with
CONTROLS = ("single+dropout", "dual+dropout")  # does noise alone help, by regularising?
SETTINGS = LEARNED + PUBLISHED + CONTROLS
ORDER = LEARNED + PUBLISHED + ("intra", "chosen") + CONTROLS  # of columns; paths are last

DROPOUT = ["hidden_dropout_prob=0.1", "attention_probs_dropout_prob=0.1"]
LAYERS = 4  # of the toy run's model
STEPS = 225  # of an epoch; a run is evaluated after each

THIRD = range(2_000_000, 2_000_400)  # the scenes that the tables are measured on

# With wider vectors, sums are rounded in another order: a CPU with AVX-512 trains another toy
# detector than one with AVX2, and all scores differ. So runs use AVX2, wherever they are made. (Two
# kinds of AMD EPYC, one with AVX-512, then gave the same bits. `mixed_seeds` finds where they do
# not.)
SAME_BITS = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}

# The parts of a run. `refer-25` stops while it still learns.
COMMANDS = {
    "pretrain": "train.py",
    "vqa": "finetune.py vqa",
    "retrieval": "finetune.py retrieval",
    "refer-25": "finetune.py refer --limit 1600 --eval-every 25",
    "refer": "finetune.py refer",
}
# What train.py evaluates while it trains, and what it calls them.
CURVES = {"masked words": "words", "region KL": "mrc", "matching": "match"}
# Part -> its measures -> what the code calls them. Rows of the table, in this order.
MEASURES = {
    "pretrain": {"image R@1": "image R@1", "text R@1": "text R@1"} | CURVES,  # zero-shot recalls
    "vqa": {"VQA": "accuracy"},
    "retrieval": {"retrieval: image": "image R@1", "retrieval: text": "text R@1"},
    "refer-25": {"refer, 25 steps": "accuracy"},
    "refer": {"refer": "accuracy"},
}
LOWER_IS_BETTER = ("region KL",)  # all others are shares of right answers
RECALLS = ("image R@1", "text R@1")


def split_setting(setting):
    """The name and the number of layers of a setting.

    >>> split_setting("dual+dropout"), split_setting("learned@12")
    (('dual+dropout', 4), ('learned', 12))
    """
    name, _, layers = setting.partition("@")
    return name, int(layers or LAYERS)


def train_flags(setting, switches):
    """The words on the command line of train.py that make a setting.

    >>> " ".join(train_flags("learned@12", "learned"))
    '--switches learned --set num_hidden_layers=12'
    """
    name, layers = split_setting(setting)
    changed = []
    if name.endswith("+dropout"):
        changed += DROPOUT
    if layers != LAYERS:
        changed.append(f"num_hidden_layers={layers}")
    flags = ["--switches", switches]
    if changed:
        flags.append("--set")
    return flags + changed


def is_fixed(name):
    """Is it a structure that learned switches compete with: a published one, or a path?"""
    return name not in LEARNED and name != "chosen" and "+" not in name


# --- 2. The runs ----------------------------------------------------------------------------------


def read_results(path=RESULTS):
    """The lines of the results file, in its order."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def key_of(line):
    """What names a run."""
    return line["setting"], line["seed"], line["epochs"]


def keep_line(line, path=RESULTS):
    """Add a line to the results file, or replace that of the same run."""
    lines = {key_of(each): each for each in read_results(path)}
    lines[key_of(line)] = line
    text = "".join(json.dumps(each) + "\n" for each in lines.values())
    write_whole(path, lambda file: file.write(text), mode="w")


def missing_parts(line, tasks):
    """The parts of a run that are asked for, but whose scores its line lacks."""
    asked = list(MEASURES) if tasks else ["pretrain"]
    return [part for part in asked if not MEASURES[part].keys() <= line["scores"].keys()]


def find_switches(setting, seed, epochs, results):
    """The value of --switches. `chosen` is the path of a learned run, which must have a line."""
    name, _ = split_setting(setting)
    if name != "chosen":
        return name.removesuffix("+dropout")
    learned = setting.replace("chosen", "learned")
    for line in results:
        if key_of(line) == (learned, seed, epochs):
            return line["path"]
    raise BadInput(f"{setting} needs the path of {learned} with seed {seed} and {epochs} "
        "epochs, which has no line yet; make that run first")


def call(work, words):
    """Run a script in the work folder; its output. Raises an error that holds the output."""
    command = [sys.executable] + [str(word) for word in words]
    done = subprocess.run(
        command, cwd=work, env=os.environ | SAME_BITS, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{words}: {done.stdout[-500:]} {done.stderr[-2000:]}")
    return done.stdout


def train_part(work, folder, part, seed, flags):
    """Pretrain or finetune, unless it is done; an interrupted part goes on."""
    out = folder / part
    if (out / "finished").exists():
        return
    command = COMMANDS[part].split() + flags
    command[0] = ROOT / command[0]
    command += ["--seed", seed, "--threads", 1, "--out", out]
    if (out / "checkpoint.pt").exists():
        command.append("--resume")
    call(work, command)
    (out / "finished").touch()


def make_run(setting, seed, args, lock):
    """Pretrain, finetune and measure what the results lack of a run, and keep its line."""
    started = time.time()
    results = read_results()
    switches = find_switches(setting, seed, args.epochs, results)
    line = dict(setting=setting, switches=switches, seed=seed, epochs=args.epochs, scores={})
    known = {key_of(each): each for each in results}
    line = known.get(key_of(line), line)
    parts = missing_parts(line, args.tasks)
    if not parts:
        return
    folder = args.work / f"{setting}-{seed}-{args.epochs}"
    flags = train_flags(setting, line["switches"])
    flags += ["--epochs", args.epochs, "--eval-every", STEPS]
    train_part(args.work, folder, "pretrain", seed, flags)
    for part in parts:
        if part != "pretrain":
            checkpoint = folder / "pretrain" / "checkpoint.pt"
            train_part(args.work, folder, part, seed, ["--checkpoint", checkpoint])
    output = call(args.work, [Path(__file__).resolve(), "measure", folder] + parts)
    found = json.loads(output.splitlines()[-1])
    found["scores"] = line["scores"] | found["scores"]
    line = line | found
    with lock:
        keep_line(line)
    print(f"{setting}, seed {seed}, {args.epochs} epochs: {time.time() - started:.0f} s, "
        f"{line['path']}, {line['scores']}", flush=True)


def make_runs(args):
    """Make all runs, --jobs at a time, seed by seed; `chosen` after the others."""
    call(args.work, [ROOT / "train.py", "--epochs", 0])  # makes the world, if there is none
    call(args.work, [Path(__file__).resolve(), "extract", args.work])
    chosen = [s for s in args.settings if s.startswith("chosen")]
    others = [s for s in args.settings if s not in chosen]
    lock = threading.Lock()
    for settings in (others, chosen):
        jobs = [(setting, seed) for seed in range(args.seeds) for setting in settings]
        with ThreadPoolExecutor(args.jobs) as pool:
            done = pool.map(lambda job: make_run(job[0], job[1], args, lock), jobs)
            list(done)  # waits; an error or Ctrl-C cancels the runs that have not begun


# --- 3. Measuring a finished run ------------------------------------------------------------------


def load_model(folder, task, make_model):
    """(model, checkpoint) of a run; make_model(config, checkpoint): a model with new weights."""
    checkpoint = train.load_checkpoint(folder / "checkpoint.pt", task)
    config = SwitchBertConfig(**checkpoint["config"])
    model = make_model(config, checkpoint)
    model.load_state_dict(checkpoint["model"])
    return model.eval().to(train.device()), checkpoint


def extract_third(work):
    """Fill the store of the third kind of scenes, in the work folder, unless it is there."""
    weights = work / "runs" / "world" / "detector.pt"
    detector = extract_features.build_detector("toy", weights)
    extract_features.extract_scenes(detector, THIRD, work / "third")


def folds_of(numbers):
    """Recall depends on the number of pictures to choose from: 100, several times."""
    return [numbers[first : first + 100] for first in range(0, len(numbers), 100)]


def measure_pretraining(folder, store, numbers=THIRD):
    """({measure: score}, path) of a pretrained model on these scenes; recalls are zero-shot."""
    model, checkpoint = load_model(folder / "pretrain", "pretraining",
        lambda config, _: SwitchBertForPretraining(config))
    tokenizer = WordPiece(checkpoint["vocab"])
    pairs = [(n, text) for n in numbers for text in Scene(n).captions(2)]
    masked = PretrainingDataset(store, pairs, tokenizer, seed=1)
    whole = PretrainingDataset(store, pairs, tokenizer, seed=1, masking=False)
    scores, switches = train.evaluate(model, masked)
    of_whole, _ = train.evaluate(model, whole)
    scores["match"] = of_whole["match"]

    ranker = SwitchBertForRetrieval.from_pretraining(model.config, model.state_dict())
    ranker.to(train.device())
    recalls = []
    for fold in folds_of(numbers):
        texts = [Scene(n).captions(1)[0] for n in fold]
        ids = [str(n) for n in fold]
        similarity = train.match_scores(ranker, store, tokenizer, texts, ids)
        recalls.append(train.recall_at(similarity, torch.arange(len(fold))))
    scores |= means_of(recalls)

    best = np.argmax(switches["modes"], axis=-1)  # (layers, 2): of text and of vision
    path = ",".join("".join(LETTERS[mode] for mode in layer) for layer in best)
    return rename(scores, "pretrain"), path


def measure_task(folder, part, store):
    """{measure: score} of a finetuned model."""
    kind = finetune.TASKS[part.removesuffix("-25")]
    model, checkpoint = load_model(folder / part, kind.name,
        lambda config, checkpoint: kind.build_model(config, checkpoint["labels"], {}))
    args, _ = finetune.parse_args([kind.name])
    tokenizer = WordPiece(checkpoint["vocab"])
    found = []
    for numbers in folds_of(THIRD) if part == "retrieval" else [THIRD]:
        splits = kind.from_scenes(range(0), numbers)
        items = splits.get("test", splits["val"])
        task = kind(store, tokenizer, {"train": items}, args, checkpoint["labels"])
        scores, _, _ = task.evaluate_items(model, items)
        found.append(scores)
    return rename(means_of(found), part)


def means_of(found):
    """{name: mean} of dicts with the same names."""
    return {name: np.mean([scores[name] for scores in found]) for name in found[0]}


def rename(scores, part):
    """{measure: score}: those of the table alone, under their names there."""
    renamed = {}
    for measure, name in MEASURES[part].items():
        renamed[measure] = round(float(scores[name]), 4)
    return renamed


def curve_of(metrics):
    """{"step": [...], "words": [...], ...} of the lines of a metrics.jsonl."""
    evaluations = [line for line in metrics if "scores" in line]
    curve = {"step": [line["step"] for line in evaluations]}
    for name in CURVES.values():
        curve[name] = [round(line["scores"][name], 4) for line in evaluations]
    return curve


def measure(folder, parts):
    """What is measured of these parts of a run, for its line in the results."""
    torch.set_num_threads(1)
    store = FeatureStore(folder.parent / "third")
    weights = store.arrays["class_weight"].tobytes()
    found = {"scores": {}, "detector": zlib.crc32(weights)}
    for part in parts:
        if part != "pretrain":
            found["scores"] |= measure_task(folder, part, store)
            continue
        scores, found["path"] = measure_pretraining(folder, store)
        found["scores"] |= scores
        found["curve"] = curve_of(train.read_metrics(folder / part))
    return found


# --- 4. The tables --------------------------------------------------------------------------------


def groups_of(results):
    """{(layers, epochs): lines of runs to compare}, their settings without the suffix `@12`."""
    groups = defaultdict(list)
    for line in results:
        name, layers = split_setting(line["setting"])
        groups[layers, line["epochs"]].append(line | {"setting": name})
    return dict(sorted(groups.items()))


def scores_of(lines):
    """{measure: {setting: {seed: score}}} of the lines of a group, in the order of the rows."""
    scores = {}
    for part in MEASURES.values():
        for measure in part:
            scores[measure] = defaultdict(dict)
            for line in lines:
                if measure in line["scores"]:
                    scores[measure][line["setting"]][line["seed"]] = line["scores"][measure]
    return {measure: each for measure, each in scores.items() if each}


def settings_of(lines):
    """The names of the settings that have lines: those of ORDER, then paths."""
    found = dict.fromkeys(line["setting"] for line in lines)
    paths = [name for name in found if name not in ORDER]
    return [name for name in ORDER if name in found] + paths


def mean_and_error(values):
    """Mean and its standard error; the error of one value is unknown: None."""
    mean = np.mean(values)
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
    return mean, error


def paired(one, other):
    """Mean and standard error of one - other over the seeds that both have."""
    return mean_and_error([one[seed] - other[seed] for seed in one.keys() & other.keys()])


def goodness(measure, scores):
    """{setting: mean over its seeds}, with a minus where lower is better."""
    sign = -1 if measure in LOWER_IS_BETTER else 1
    return {setting: sign * np.mean(list(seeds.values())) for setting, seeds in scores.items()}


def mean_places(scores, settings):
    """{setting: mean place among these}, 1 is best, over the measures that all of them have."""
    places = defaultdict(list)
    for measure, each in scores.items():
        good = goodness(measure, each)
        if good.keys() >= set(settings):
            for setting in settings:
                better = [other for other in settings if good[other] > good[setting]]
                places[setting].append(1 + len(better))
    return {setting: np.mean(each) for setting, each in places.items()}


def short(number, sign=""):
    """Three decimals, and no zero in front of the point: '.781', with sign '+': '+.020'."""
    text = f"{number:{sign}.3f}"
    return text.replace("0.", ".", 1) if abs(number) < 1 else text


def with_error(mean_and_error, sign=""):
    """'.781±.012'; '.781' if the error is unknown."""
    mean, error = mean_and_error
    text = short(mean, sign)
    return text if error is None else f"{text}±{short(error)}"


def row_of(measure, scores, settings):
    """A row: mean ± standard error over seeds, the best in bold, and learned - best fixed."""
    good = goodness(measure, scores)
    row = [measure]
    for setting in settings:
        cell = ""
        if setting in scores:
            cell = with_error(mean_and_error(list(scores[setting].values())))
        if setting == max(good, key=good.get):
            cell = f"**{cell}**"
        row.append(cell)
    fixed = [setting for setting in scores if is_fixed(setting)]
    difference = ""
    if "learned" in scores and fixed:
        best = max(fixed, key=good.get)
        difference = with_error(paired(scores["learned"], scores[best]), "+")
    row.append(difference)
    return row


def table(lines):
    """The table of a group: a row per measure, a column per setting; the difference of learned
    switches to the best fixed structure is paired by seed.
    """
    settings = settings_of(lines)
    scores = scores_of(lines)
    head = ["measure"] + settings + ["learned - best fixed"]
    rows = [head, ["---"] * len(head)]
    for measure, each in scores.items():
        rows.append(row_of(measure, each, settings))
    places = mean_places(scores, [s for s in settings if s == "learned" or is_fixed(s)])
    last = ["mean place"]
    for setting in settings:
        last.append(f"{places[setting]:.1f}" if setting in places else "")
    rows.append(last + [""])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def tables(results):
    """{title: table}, one for each number of layers and length of training."""
    found = {}
    for (layers, epochs), lines in groups_of(results).items():
        title = f"{layers} layers, {epochs * STEPS:,} steps"
        if mixed := mixed_seeds(lines):
            title += f"; not comparable, since detectors differ within seeds {mixed}"
        found[title] = table(lines)
    return found


def mixed_seeds(lines):
    """The seeds whose runs had regions of different detectors, so that no difference is paired.

    Each machine trains its own toy detector. Kinds of CPUs round differently, so their detectors
    differ, and with them all scores.
    """
    detectors = defaultdict(set)
    for line in lines:
        detectors[line["seed"]].add(line["detector"])
    return [seed for seed, found in detectors.items() if len(found) > 1]


# --- 5. The figure --------------------------------------------------------------------------------

# Pixels of a panel; three of them are as wide as a picture at GitHub.
WIDTH = 276
HEIGHT = 220
# Where its axes stand.
LEFT = 44
RIGHT = 262
TOP = 30
BOTTOM = 196
SPACINGS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the lines across a panel


def points_of(results):
    """{measure: {setting: [(steps, mean over seeds, standard error), ...]}} of the small model.

    Curves are those of the longest runs; a recall has a point for each length of training.
    Controls are left out, and so is the first quarter, in which all curves rise alike.
    """
    lengths = {}
    for (layers, epochs), lines in groups_of(results).items():
        if layers == LAYERS:
            lengths[epochs] = [line for line in lines if "+" not in line["setting"]]
    longest = max(lengths)
    points = defaultdict(lambda: defaultdict(list))
    for setting in settings_of(lengths[longest]):
        curves = [line["curve"] for line in lengths[longest] if line["setting"] == setting]
        for measure, name in CURVES.items():
            means = np.mean([curve[name] for curve in curves], axis=0)
            for step, mean in zip(curves[0]["step"], means):
                if step >= longest * STEPS / 4:
                    points[measure][setting].append((step, mean, 0))
    for epochs, lines in lengths.items():
        scores = scores_of(lines)
        for measure in RECALLS:
            for setting, seeds in scores[measure].items():
                mean, error = mean_and_error(list(seeds.values()))
                points[measure][setting].append((epochs * STEPS, mean, error or 0))
    return points


def new_panel():
    """A white PIL image, and what draws on it."""
    panel = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(panel)
    pen.font = ImageFont.load_default(12)
    return panel, pen


def draw_panel(measure, lines, colours):
    """A measure against the length of training; lines {setting: [(steps, mean, error), ...]}."""
    panel, pen = new_panel()
    note = ", lower is better" if measure in LOWER_IS_BETTER else ""
    pen.text((LEFT, 8), measure + note, "black")
    steps, means, errors = np.concatenate(list(lines.values())).T
    first = steps.min()
    duration = max(1, steps.max() - first)
    low = (means - errors).min()
    span = max(1e-9, (means + errors).max() - low)

    def x_of(step):
        return LEFT + 8 + (RIGHT - LEFT - 16) * (step - first) / duration

    def y_of(value):
        return BOTTOM - 8 - (BOTTOM - TOP - 16) * (value - low) / span

    spacing = next(spacing for spacing in SPACINGS if span < 5 * spacing)
    for value in spacing * np.arange(np.ceil(low / spacing), (low + span) / spacing):
        y = y_of(value)
        pen.line([LEFT, y, RIGHT, y], "gainsboro")
        pen.text((LEFT - 5, y), short(value), "black", anchor="rm")
    for step in np.unique(np.linspace(first, steps.max(), 4)):
        pen.text((x_of(step), BOTTOM + 4), f"{step:.0f}", "black", anchor="ma")
    pen.rectangle([LEFT, TOP, RIGHT, BOTTOM], outline="grey")

    # `learned`, the first one, is drawn last, on top.
    for number, (setting, points) in enumerate(reversed(lines.items())):
        shift = 0
        if measure in RECALLS:  # so that no bar of an error hides another
            shift = len(lines) - 2 * number
        places = [(x_of(step) + shift, y_of(mean)) for step, mean, _ in points]
        pen.line(places, colours[setting], 2)
        for (x, y), (_, mean, error) in zip(places, points):
            pen.line([x, y_of(mean - error), x, y_of(mean + error)], colours[setting])
            pen.circle((x, y), 2, colours[setting])
    return panel


def draw_legend(colours):
    """The settings in their colours, and what the lines mean."""
    panel, pen = new_panel()
    y = 20
    for setting, colour in colours.items():
        pen.line([LEFT, y, LEFT + 24, y], colour, 4)
        pen.text((LEFT + 34, y), setting, "black", anchor="lm")
        y += 18
    pen.text((LEFT, y), "Across: steps of training. Means over\nseeds; R@1 ± standard error, on "
        "other\nscenes, at the end of separate runs.", "black", font_size=11)
    return panel


def draw(results):
    """The figure: each structure's measures against the length of training."""
    points = points_of(results)
    settings = settings_of([{"setting": name} for lines in points.values() for name in lines])
    colours = dict(zip(settings, train.COLOURS))
    panels = [draw_panel(measure, lines, colours) for measure, lines in points.items()]
    panels.append(draw_legend(colours))
    return train.stack(panels, columns=3)


# --- Machine room ---------------------------------------------------------------------------------


def parse_args(argv):
    """The settings of a command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("what", nargs="?", choices=["table"], help="make no runs")
    p.add_argument("--epochs", type=int, default=4, help="of pretraining, 225 steps each")
    p.add_argument("--seeds", type=int, default=5, help="of each setting")
    p.add_argument("--settings", nargs="+", default=list(SETTINGS))
    p.add_argument("--tasks", action="store_true", help="finetune as well")
    p.add_argument("--jobs", type=int, default=2, help="runs side by side")
    p.add_argument("--work", type=Path, default="runs/ablation", help="folder of the runs")
    args = p.parse_args(argv)
    args.work = args.work.resolve()
    return args


def main(argv):
    """Make the runs, print the tables, draw the figure."""
    # Two commands for `call` alone, which has this work done in a process of its own.
    if argv[:1] == ["extract"]:
        return extract_third(Path(argv[1]))
    if argv[:1] == ["measure"]:
        print(json.dumps(measure(Path(argv[1]), argv[2:])))
        return
    args = parse_args(argv)
    if args.what != "table":
        with only_run_in(args.work):
            make_runs(args)
    results = read_results()
    for title, text in tables(results).items():
        print(f"\n{title}\n\n{text}")
    save_png(RESULTS.with_suffix(".png"), draw(results))


if __name__ == "__main__":
    run(main)
