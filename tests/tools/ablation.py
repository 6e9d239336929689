"""Do learned switches earn their keep? The paper's question, on the toy world, at two lengths.

    python tests/tools/ablation.py                          900 steps, eight settings, five seeds
    python tests/tools/ablation.py --epochs 16              3,600 steps: six to eight minutes a run
    python tests/tools/ablation.py --settings learned single dual --tasks       finetunes them, too
    python tests/tools/ablation.py --settings learned@12 II,XX,JJ,JJ --seeds 3  any setting you like
    python tests/tools/ablation.py table                    only prints the tables and draws

A run is what a user would type: train.py, and with --tasks finetune.py for each task, each in one
thread. Its setting, seed and epochs name it, and when it is finished it has a line of its own in
assets/ablation.jsonl. No run is made twice: stop at any moment, and the same command goes on. If a
run has a line, but no scores of the tasks, --tasks adds them. The models stay in the folder --work;
after a change of the code, choose another one.

There are three kinds of scenes. Models train on the first kind. The second kind, the held-out
scenes of train.py, is for tuning: every choice in this project was made on them. The tables are
measured on the third kind, 400 scenes from number 2,000,000 on, by which nothing was ever chosen.
Only the curves of the figure come from the second kind: they are what train.py itself records.

A setting is a value of --switches. It may end in `+dropout`, for BERT's dropout of .1 in place of
none, and in `@12`, for twelve layers in place of four. `chosen` freezes the modes in which the
learned run of the same seed and length ended, and trains from the start: is it the choice that
helps, or the learning?
"""

import argparse
import json
import subprocess
import sys
import threading
import time
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
ORDER = LEARNED + PUBLISHED + ("intra", "chosen") + CONTROLS  # of the columns; paths come last

DROPOUT = ["hidden_dropout_prob=0.1", "attention_probs_dropout_prob=0.1"]
LAYERS = 4  # of the toy run's model
STEPS = 225  # of an epoch; a run is evaluated after each

THIRD = 2_000_000  # the number of the first scene that the tables are measured on
SCENES = 400

# The parts of a run. `refer-25` stops while it still learns.
COMMANDS = {
    "pretrain": "train.py",
    "vqa": "finetune.py vqa",
    "retrieval": "finetune.py retrieval",
    "refer-25": "finetune.py refer --limit 1600 --eval-every 25",
    "refer": "finetune.py refer",
}
# Part -> its measures -> what the code calls them. Rows of the table, in this order.
MEASURES = {
    "pretrain": {"image R@1": "image R@1", "text R@1": "text R@1", "masked words": "words",
        "region KL": "mrc", "matching": "match"},
    "vqa": {"VQA": "accuracy"},
    "retrieval": {"retrieval: image": "image R@1", "retrieval: text": "text R@1"},
    "refer-25": {"refer, 25 steps": "accuracy"},
    "refer": {"refer": "accuracy"},
}
LOWER_IS_BETTER = ("region KL",)  # all others are shares of right answers
CURVES = ("masked words", "region KL", "matching")  # what train.py evaluates while it trains
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
        flags += ["--set", *changed]
    return flags


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
    write_whole(path, lambda file: file.write(text))


def missing_parts(line, tasks):
    """The parts of a run that are asked for, but whose scores its line lacks."""
    asked = list(MEASURES) if tasks else ["pretrain"]
    return [part for part in asked if not MEASURES[part].keys() <= line["scores"].keys()]


def find_switches(setting, seed, epochs, results):
    """The value of --switches. `chosen` is the path of a learned run, which must be finished."""
    name, _ = split_setting(setting)
    if name != "chosen":
        return name.removesuffix("+dropout")
    learned = setting.replace("chosen", "learned")
    for line in results:
        if key_of(line) == (learned, seed, epochs):
            return line["path"]
    raise BadInput(f"{setting} needs the path of {learned} with seed {seed} and {epochs} epochs, "
        "which has no line yet; make that run first")


def call(work, *words):
    """Run a script in the work folder. Returns its output, or raises an error that holds it."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=work, capture_output=True,
        text=True)
    if done.returncode:
        raise RuntimeError(f"{words}: {done.stdout[-500:]} {done.stderr[-2000:]}")
    return done.stdout


def train_part(work, folder, part, seed, flags):
    """Pretrain or finetune, from the last checkpoint if there is one, unless it is done already."""
    out = folder / part
    if (out / "finished").exists():
        return
    script, *command = COMMANDS[part].split()
    if (out / "checkpoint.pt").exists():
        flags = [*flags, "--resume"]
    call(work, ROOT / script, *command, *flags, "--seed", seed, "--threads", 1, "--out", out)
    (out / "finished").touch()


def make_run(setting, seed, args, lock):
    """Pretrain, finetune and measure what the results lack of a run, and keep its line."""
    started = time.time()
    results = read_results()
    switches = find_switches(setting, seed, args.epochs, results)
    line = dict(setting=setting, switches=switches, seed=seed, epochs=args.epochs, scores={})
    for known in results:
        if key_of(known) == key_of(line):
            line = known
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
    output = call(args.work, Path(__file__).resolve(), "measure", folder, *parts)
    found = json.loads(output.splitlines()[-1])
    found["scores"] = line["scores"] | found["scores"]
    line = line | found
    with lock:
        keep_line(line)
    print(f"{setting}, seed {seed}, {args.epochs} epochs: {time.time() - started:.0f} s, "
        f"{line['path']}, {line['scores']}", flush=True)


def make_runs(args):
    """Make all runs, some of them at the same time, seed by seed; `chosen` after the others."""
    call(args.work, ROOT / "train.py", "--epochs", 0)  # makes the world, if it is not there
    detector = extract_features.build_detector("toy", args.work / "runs/world/detector.pt")
    extract_features.extract_scenes(detector, range(THIRD, THIRD + SCENES), args.work / "third")
    chosen = [s for s in args.settings if s.startswith("chosen")]
    others = [s for s in args.settings if s not in chosen]
    lock = threading.Lock()
    for settings in (others, chosen):
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = [(setting, seed) for seed in range(args.seeds) for setting in settings]
            # If one fails or Ctrl-C comes, the map cancels those that have not begun.
            for _ in pool.map(lambda job: make_run(*job, args, lock), jobs):
                pass


# --- 3. Measuring a finished run ------------------------------------------------------------------


def load_checkpoint(folder, task, make_model):
    """(checkpoint, model) of a run; make_model(config, checkpoint) -> a model with new weights."""
    saved = train.load_checkpoint(folder / "checkpoint.pt", task)
    model = make_model(SwitchBertConfig(**saved["config"]), saved)
    model.load_state_dict(saved["model"])
    return saved, model.eval().to(train.device())


def folds_of(numbers):
    """Recall depends on how many pictures there are to choose from: 100, four times."""
    return [numbers[k : k + 100] for k in range(0, len(numbers), 100)]


@torch.no_grad()
def measure_pretraining(folder, store):
    """({measure: score}, path) of a pretrained model; recalls are zero-shot."""
    saved, model = load_checkpoint(folder / "pretrain", "pretraining",
        lambda config, _: SwitchBertForPretraining(config))
    tokenizer = WordPiece(saved["vocab"])
    numbers = range(THIRD, THIRD + SCENES)
    pairs = [(n, text) for n in numbers for text in Scene(n).captions(2)]
    masked = PretrainingDataset(store, pairs, tokenizer, seed=1)
    whole = PretrainingDataset(store, pairs, tokenizer, seed=1, masking=False)
    scores, switches = train.evaluate(model, masked)
    scores["match"] = train.evaluate(model, whole)[0]["match"]

    ranker = SwitchBertForRetrieval.from_pretraining(model.config, model.state_dict())
    ranker.to(train.device())
    recalls = []
    for fold in folds_of(numbers):
        texts = [Scene(n).captions(1)[0] for n in fold]
        ids = [str(n) for n in fold]
        similarity = train.match_scores(ranker, store, tokenizer, texts, ids)
        recalls.append(train.recall_at(similarity, torch.arange(len(fold)), (1,)))
    for name in RECALLS:
        scores[name] = np.mean([recall[name] for recall in recalls])

    best = np.argmax(switches["modes"], axis=-1)  # (layers, 2): of text and of vision
    path = ",".join("".join(LETTERS[mode] for mode in layer) for layer in best)
    return rename(scores, "pretrain"), path


def measure_task(folder, part, store):
    """{measure: score} of a finetuned model."""
    kind = finetune.TASKS[part.split("-")[0]]
    saved, model = load_checkpoint(folder / part, kind.name,
        lambda config, saved: kind.new_model(config, saved["labels"]))
    args, _ = finetune.parse_args([kind.name])
    tokenizer = WordPiece(saved["vocab"])
    numbers = range(THIRD, THIRD + SCENES)
    splits = [kind.from_scenes(range(0), numbers)["val"]]
    if part == "retrieval":
        splits = [kind.from_scenes(range(0), fold)["test"] for fold in folds_of(numbers)]
    found = []
    for items in splits:
        task = kind(store, tokenizer, {"train": items, "third": items}, args, saved["labels"])
        found.append(task.evaluate_items(model, items)[0])
    means = {name: np.mean([scores[name] for scores in found]) for name in found[0]}
    return rename(means, part)


def rename(scores, part):
    """{measure: score}: those of the table alone, under their names there."""
    return {ours: round(float(scores[theirs]), 4) for ours, theirs in MEASURES[part].items()}


def curve_of(metrics):
    """{"step": [...], "words": [...], ...} of the lines of a metrics.jsonl."""
    evaluations = [line for line in metrics if "scores" in line]
    curve = {"step": [line["step"] for line in evaluations]}
    for measure in CURVES:
        name = MEASURES["pretrain"][measure]
        curve[name] = [round(line["scores"][name], 4) for line in evaluations]
    return curve


def measure(folder, parts):
    """What is measured of these parts of a run, for its line in the results."""
    torch.set_num_threads(1)
    store = FeatureStore(folder.parent / "third")
    found = {"scores": {}}
    for part in parts:
        if part != "pretrain":
            found["scores"] |= measure_task(folder, part, store)
            continue
        scores, found["path"] = measure_pretraining(folder, store)
        found["scores"] |= scores
        metrics = train.read_metrics(folder / part)
        speeds = [line["per_second"] for line in metrics if "per_second" in line]
        found["pairs per second"] = round(float(np.median(speeds)), 1)
        found["curve"] = curve_of(metrics)
    return found


# --- 4. The tables --------------------------------------------------------------------------------


def groups_of(results):
    """{(layers, epochs): lines of runs that compare}. Their settings lose the number of layers."""
    groups = defaultdict(list)
    for line in results:
        name, layers = split_setting(line["setting"])
        groups[layers, line["epochs"]].append(line | {"setting": name})
    return dict(sorted(groups.items()))


def scores_of(lines):
    """{measure: {setting: {seed: score}}} of the lines of a group, in the order of the table."""
    scores = {}
    for measures in MEASURES.values():
        for name in measures:
            for line in lines:
                if name in line["scores"]:
                    of_setting = scores.setdefault(name, {}).setdefault(line["setting"], {})
                    of_setting[line["seed"]] = line["scores"][name]
    return scores


def settings_of(lines):
    """The names of the settings that have lines: those of ORDER, then paths."""
    found = dict.fromkeys(line["setting"] for line in lines)
    paths = [name for name in found if name not in ORDER]
    return [name for name in ORDER if name in found] + paths


def mean_and_error(values):
    """Mean and its standard error; the error of one value is unknown: 0."""
    values = np.array(list(values), dtype=float)
    if len(values) == 1:
        return values[0], 0.0
    return values.mean(), values.std(ddof=1) / len(values) ** 0.5


def paired(one, other):
    """Mean and standard error of one - other over the seeds that both have."""
    return mean_and_error(one[seed] - other[seed] for seed in one.keys() & other.keys())


def goodness(measure, scores):
    """{setting: mean over its seeds}, turned round where lower is better."""
    sign = -1 if measure in LOWER_IS_BETTER else 1
    return {setting: sign * mean_and_error(seeds.values())[0] for setting, seeds in scores.items()}


def mean_ranks(scores, settings):
    """{setting: mean rank among these}, 1 is best, over the measures that all of them have."""
    ranks = defaultdict(list)
    for measure, each in scores.items():
        if each.keys() >= set(settings):
            good = goodness(measure, {setting: each[setting] for setting in settings})
            for setting in settings:
                better = [value for value in good.values() if value > good[setting]]
                ranks[setting].append(1 + len(better))
    return {setting: np.mean(all_ranks) for setting, all_ranks in ranks.items()}


def short(number, sign=""):
    """Three decimals, and no zero in front of the point: '.781', with sign '+': '+.020'."""
    text = f"{number:{sign}.3f}"
    return text.replace("0.", ".", 1) if abs(number) < 1 else text


def with_error(mean, error, sign=""):
    """'.781±.012'"""
    return f"{short(mean, sign)}±{short(error)}"


def row_of(measure, scores, settings, compared):
    """A row: mean ± standard error over seeds, the best in bold, and learned - best fixed."""
    good = goodness(measure, scores)
    best = max(good, key=good.get)
    row = [measure]
    for setting in settings:
        cell = ""
        if setting in scores:
            cell = with_error(*mean_and_error(scores[setting].values()))
        row.append(f"**{cell}**" if setting == best else cell)
    fixed = [s for s in compared if s != "learned" and s in scores]
    difference = ""
    if "learned" in scores and fixed:
        rival = max(fixed, key=good.get)
        difference = with_error(*paired(scores["learned"], scores[rival]), "+")
    return [*row, difference]


def table(lines):
    """The table of a group: a row per measure, a column per setting; the difference of learned
    switches to the best fixed structure is paired by seed.
    """
    settings = settings_of(lines)
    scores = scores_of(lines)
    compared = [s for s in settings if s == "learned" or is_fixed(s)]
    rows = [["measure", *settings, "learned - best fixed"], ["---"] * (len(settings) + 2)]
    for measure, each in scores.items():
        rows.append(row_of(measure, each, settings, compared))
    ranks = mean_ranks(scores, compared)
    ranks = [f"{ranks[s]:.1f}" if s in ranks else "" for s in settings]
    rows.append(["mean rank", *ranks, ""])
    speeds = []
    for setting in settings:
        # The fastest of a setting's runs: others had the machine to share.
        speed = max(line["pairs per second"] for line in lines if line["setting"] == setting)
        speeds.append(f"{speed:.0f}")
    rows.append(["pairs/s", *speeds, ""])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def tables(results):
    """{title: table}, one for each number of layers and length of training."""
    found = {}
    for (layers, epochs), lines in groups_of(results).items():
        found[f"{layers} layers, {epochs * STEPS:,} steps"] = table(lines)
    return found


# --- 5. The figure --------------------------------------------------------------------------------

PANEL = (276, 220)  # pixels; three of them are as wide as a picture at GitHub
LEFT, TOP, RIGHT, BOTTOM = 44, 30, 262, 196  # of the axes in a panel
GREY = (225, 225, 225)


def points_of(results):
    """{measure: {setting: [(steps, mean over seeds, standard error), ...]}} of the small model.

    Curves are those of the longest runs; a recall has a point for each length of training. Controls
    are left out. So is the first quarter of the longest runs, in which all curves rise alike.
    """
    lengths = {epochs: [line for line in lines if "+" not in line["setting"]]
        for (layers, epochs), lines in groups_of(results).items() if layers == LAYERS}
    longest = max(lengths)
    points = defaultdict(lambda: defaultdict(list))
    for setting in settings_of(lengths[longest]):
        curves = [line["curve"] for line in lengths[longest] if line["setting"] == setting]
        for measure in CURVES:
            values = np.mean([curve[MEASURES["pretrain"][measure]] for curve in curves], axis=0)
            for step, value in zip(curves[0]["step"], values):
                if step >= longest * STEPS / 4:
                    points[measure][setting].append((step, value, 0))
    for epochs, lines in lengths.items():
        scores = scores_of(lines)
        for measure in RECALLS:
            for setting, seeds in scores[measure].items():
                points[measure][setting].append((epochs * STEPS, *mean_and_error(seeds.values())))
    return points


def draw_panel(measure, lines, colours):
    """A measure against the length of training. lines: {setting: [(steps, mean, error), ...]}"""
    panel = Image.new("RGB", PANEL, "white")
    pen = ImageDraw.Draw(panel)
    pen.font = ImageFont.load_default(12)
    note = ", lower is better" if measure in LOWER_IS_BETTER else ""
    pen.text((LEFT, 8), measure + note, "black")
    points = np.array([point for each in lines.values() for point in each])
    steps, means, errors = points.T
    low, high = (means - errors).min(), (means + errors).max()

    def x_of(step):
        return LEFT + 8 + (RIGHT - LEFT - 16) * (step - steps.min()) / max(1, np.ptp(steps))

    def y_of(value):
        return BOTTOM - 8 - (BOTTOM - TOP - 16) * (value - low) / max(1e-9, high - low)

    spacing = next(s for s in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1) if high - low < 5 * s)
    for value in np.arange(np.ceil(low / spacing), high / spacing) * spacing:
        pen.line([LEFT, y_of(value), RIGHT, y_of(value)], GREY)
        pen.text((LEFT - 5, y_of(value)), short(value), "black", anchor="rm")
    for step in np.unique(np.linspace(steps.min(), steps.max(), 4)):
        pen.text((x_of(step), BOTTOM + 4), f"{step:.0f}", "black", anchor="ma")
    pen.rectangle([LEFT, TOP, RIGHT, BOTTOM], outline="grey")

    for number, (setting, each) in enumerate(reversed(lines.items())):  # learned on top
        shift = 0
        if measure in RECALLS:  # so that no bar of an error hides another
            shift = len(lines) - 2 * number
        places = [(x_of(step) + shift, y_of(mean)) for step, mean, _ in each]
        pen.line(places, colours[setting], 2)
        for (x, y), (_, mean, error) in zip(places, each):
            if error:
                pen.line([x, y_of(mean - error), x, y_of(mean + error)], colours[setting])
            pen.circle((x, y), 2, colours[setting])
    return panel


def draw_legend(colours):
    """The settings in their colours, and what the lines mean."""
    panel = Image.new("RGB", PANEL, "white")
    pen = ImageDraw.Draw(panel)
    pen.font = ImageFont.load_default(12)
    for number, (setting, colour) in enumerate(colours.items()):
        y = 20 + 18 * number
        pen.line([LEFT, y, LEFT + 24, y], colour, 4)
        pen.text((LEFT + 34, y), setting, "black", anchor="lm")
    pen.text((LEFT, y + 20), "Across: steps of training. Means over\nseeds; R@1 ± standard "
        "error, on other\nscenes, at the end of separate runs.", "black", font_size=11)
    return panel


def draw(results):
    """The figure: each structure's measures against the length of training."""
    points = points_of(results)
    settings = settings_of([{"setting": s} for lines in points.values() for s in lines])
    colours = dict(zip(settings, train.COLOURS))
    panels = [draw_panel(measure, lines, colours) for measure, lines in points.items()]
    return train.stack([*panels, draw_legend(colours)], columns=3)


# --- Machine room ---------------------------------------------------------------------------------


def parse_args(argv):
    """The settings of a command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("what", nargs="?", choices=["table"], help="only print the tables, and draw")
    p.add_argument("--epochs", type=int, default=4, help="of pretraining, 225 steps each")
    p.add_argument("--seeds", type=int, default=5, help="of each setting")
    p.add_argument("--settings", nargs="+", default=list(SETTINGS))
    p.add_argument("--tasks", action="store_true", help="finetune as well")
    p.add_argument("--jobs", type=int, default=2, help="runs side by side")
    p.add_argument("--work", type=Path, default=Path("runs/ablation"), help="folder of the runs")
    args = p.parse_args(argv)
    args.work = args.work.resolve()
    return args


def main(argv):
    """Make the runs, print the tables, draw the figure."""
    if argv[:1] == ["measure"]:  # a process of its own for each run, see make_run
        _, folder, *parts = argv
        print(json.dumps(measure(Path(folder), parts)))
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
    run(lambda: main(sys.argv[1:]))
