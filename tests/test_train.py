"""What train.py promises: its loop, schedules, evaluation, data folders and records.

The first test is one step of training, worked out by hand on the smallest task there is.
"""

import functools
import inspect
import json
import math
import os
import re
import signal
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from test_switchbert import bert_weights, write_bert
from torch.nn.parallel import DistributedDataParallel

import finetune
import train
from data import (SPECIALS, BadInput, Captions, FeatureStore, PretrainingDataset, collate,
    only_run_in, read_json, write_json)
from switchbert import (MODES, SwitchBert, SwitchBertConfig, SwitchBertForPretraining,
    SwitchBertForRetrieval)

parametrize = pytest.mark.parametrize
approx = pytest.approx
close = torch.testing.assert_close

# --- The loop, on the smallest task there is ---


def test_one_step_by_hand(plain, tmp_path):
    """The 50 numbers 0, .02, ... .98 have the mean .49. Those with an odd index are .02, .06,
    ... .98, with the mean .5. So the losses of the weight 1 are .49 and .5, and the slope of
    both together is .99. The rate of a single step is that of the peak, .1, and half of it for
    this parameter: the weight becomes 1 - .05 x .99 = .9505.
    """
    task = plain("run", "--batch 50 --epochs 1 --lr 0.1")
    assert task.model.weight.item() == approx(0.9505)
    for line in metrics(tmp_path / "run", "losses"):
        assert line["losses"] == approx({"all": 0.49, "odd": 0.5})
        assert line["lr"] == 0.1
        assert line["temperature"] == 3.0


def number(index):
    """0, .14, .28, ...: the multiples of .02 below 1, each of them once for 50 indices."""
    return (7 * index % 50) / 50


class Plain(train.Task, torch.utils.data.Dataset):
    """50 numbers x; one weight w, 1 at first; losses w x of all numbers and of the odd ones."""

    name = "pretraining"
    unit = "numbers"
    loss_terms = {"all": "x", "odd": "odd"}
    clip = 1.05
    weight_decay = 0.0
    initial_temperature = 3.0
    gate_rate = 0.1
    evaluates_at_start = False
    headline = str
    lengths = np.arange(50) % 7
    captions = Captions((index, f"number {index}") for index in range(50))
    missing = {}
    # What goes wrong:
    score = 0.5  # of each evaluation
    stop_at = None  # the number of examples after which SIGTERM comes
    not_a_number = None  # the key of an example
    steep_at = None  # the step whose gradient is not finite, though its loss is

    def __init__(self, store, tokenizer):
        self.store = store
        self.tokenizer = tokenizer
        self.examples = self
        self.model = torch.nn.Linear(1, 1, bias=False)
        self.model.config = SwitchBertConfig.tiny(num_hidden_layers=1)
        torch.nn.init.ones_(self.model.weight)
        self.keys = []
        self.noise = []
        self.taus = []

    def __len__(self):
        return 50

    def __getitem__(self, key):
        if len(self.keys) == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        self.keys.append(key)
        _, index = key
        x = math.nan if key == self.not_a_number else number(index)
        return x, index % 2 > 0

    def collate(self, examples):
        x = torch.tensor([x for x, _ in examples])
        odd = torch.tensor([odd for _, odd in examples])
        return {"x": x, "odd": odd.nonzero()[:, 0]}

    def sums(self, model, batch, tau):
        self.noise.append(torch.rand(1).item())
        self.taus.append(tau)
        losses = model(batch["x"][:, None])[:, 0]
        sums = torch.stack([losses.sum(), losses[batch["odd"]].sum()])
        if len(self.noise) == self.steep_at:
            zero = 0 * model.weight.sum()
            sums = sums + zero.sqrt()  # whose slope is infinite
        n = len(losses)
        modes = torch.full((n, 1, 2, len(MODES)), 1 / len(MODES))
        return sums, SimpleNamespace(modes=modes, depths=[torch.ones(n, 2, 1)])

    def evaluate(self, model):
        return {"score": self.score}, {"modes": [], "depths": []}


def plain_sgd(model, *_):
    group = {"params": list(model.parameters()), "scale": 0.5}
    return torch.optim.SGD([group], lr=1.0, momentum=0.9)


@pytest.fixture
def plain(store, tokenizer, tmp_path, monkeypatch):
    """plain(name, flags, **attributes) -> the task after 16 steps of SGD on 12 numbers each."""
    def start(name, flags="", **attributes):
        task = Plain(store, tokenizer)
        vars(task).update(attributes)
        usual = f"--batch 12 --epochs 4 --eval-every 5 --out {tmp_path / name} "
        words = (usual + flags).split()
        args, checkpoint = train.parse_args(words)
        task.result = train.fit(args, task, checkpoint)
        return task

    monkeypatch.setattr(train, "make_optimizer", plain_sgd)
    monkeypatch.setattr(train, "switches_picture", lambda *_: Image.new("RGB", (800, 9)))
    return start


def metrics(out, entry):
    """The lines of metrics.jsonl that have this entry, without times."""
    text = (out / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [{key: line[key] for key in line if "second" not in key}
        for line in lines if entry in line]


def saved(out):
    return train.load_checkpoint(out, "pretraining")


@parametrize("accum, flags, share", [
    (1, "--anneal 0.5", 0.5),
    (2, "--data x", 0.9),
    (3, "--data x", 0.9),
    (6, "--data x", 0.9),
])
def test_a_step_is_gradient_descent_on_the_whole_batch_in_any_number_of_parts(
        plain, tmp_path, accum, flags, share):
    """Parts hold different numbers of odd ones: a mean of their means would differ. The
    temperature falls from 3 to .2, its fifteenth part, within a share of the 16 steps.
    """
    task = plain("run", f"--accum {accum} --lr 1e-3 {flags}")
    weight = 1.0
    velocity = 0.0
    losses = []
    slopes = []
    for step in range(16):
        keys = task.keys[12 * step : 12 * step + 12]
        indices = [index for _, index in keys]
        of_all = np.mean([number(index) for index in indices])
        of_odd = np.mean([number(index) for index in indices if index % 2])
        losses.append([weight * of_all, weight * of_odd])
        slope = of_all + of_odd
        slopes.append(slope)
        rate = 1e-3 * min((step + 1) / 2, (16 - step) / 14)  # a tenth of 16 steps is 2
        velocity = 0.9 * velocity + min(slope, Plain.clip)
        weight -= 0.5 * rate * velocity
    assert min(slopes) < Plain.clip < max(slopes)
    assert abs(weight - 1) > 1e-3
    assert task.model.weight.item() == approx(weight, abs=1e-6)

    taus = [max(0.2, 3 * (1 / 15) ** (step / (16 * share))) for step in range(16)]
    assert task.taus[::accum] == approx(taus, rel=1e-9)

    mixtures = metrics(tmp_path / "run", "soft_switches")
    evaluations = metrics(tmp_path / "run", "scores")
    assert len(mixtures) == 16  # one of every step, as there are under thirty
    assert [line["step"] for line in evaluations] == [5, 10, 15, 16]
    for line in mixtures + evaluations:
        step = line["step"]
        last_evaluation = (step - 1) // 5 * 5
        means = np.mean(losses[last_evaluation:step], axis=0)
        assert list(line["losses"].values()) == approx(means.tolist(), rel=1e-4)
        assert line["lr"] == train.learning_rate(step - 1, 16, 1e-3)


def test_batches_depend_on_seed_and_epoch_and_noise_on_seed_step_and_part(plain):
    one = plain("run", "--accum 2 --seed 0")
    more_parts = plain("run", "--accum 3 --seed 0")
    same = plain("run", "--accum 2 --seed 0")
    other = plain("run", "--accum 2 --seed 1")
    assert one.keys == more_parts.keys == same.keys != other.keys
    orders = set()
    for epoch in range(4):
        keys = one.keys[48 * epoch : 48 * epoch + 48]  # 4 whole batches of the 50
        assert {key[0] for key in keys} == {epoch}
        order = tuple(index for _, index in keys)
        assert len(set(order)) == 48
        orders.add(order)
    assert len(orders) == 4
    assert one.noise == same.noise
    assert len(set(one.noise + other.noise)) == 64  # 16 steps of 2 parts


def test_an_epoch_has_every_example_once_in_batches_of_like_length_in_random_order():
    """5,000 examples of 1 to 40 words: windows of 2,000 hold 50 of each length, batches 20."""
    lengths = np.random.default_rng(0).integers(1, 41, 5000)
    Examples = type("Examples", (), {"__len__": lambda self: 5000, "lengths": lengths})
    indices = train.epoch_batches(0, 3, 20, Examples())
    assert indices.shape == (250, 20)
    assert sorted(indices.flatten()) == list(range(5000))
    of_batches = lengths[indices]
    spread = np.ptp(of_batches, axis=1)
    assert spread.max() <= 2
    assert spread.mean() < 1
    longest = of_batches.max(axis=1)
    assert abs(np.corrcoef(longest[1:], longest[:-1])[0, 1]) < 0.2


@parametrize("stop_at, step", [
    (0, 1),
    (12 * 7, 8),
    (12 * 9, 10),  # which is evaluated, too
    (12 * 16 - 1, 16),  # in the last step: what follows it may take hours
])
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(plain, tmp_path, stop_at, step):
    whole = plain("whole", "--accum 2")
    first = plain("run", "--accum 2", stop_at=stop_at)
    run = tmp_path / "run"
    done = saved(run)["step"]
    assert first.result is None
    assert done == step
    with open(run / "metrics.jsonl", "a") as file:  # a killed run knows later steps
        file.write(f'{{"step": {done + 1}, "losses": {{}}}}\n{{"step": 99, "lo')
    again = plain("run", "--accum 2 --resume")
    assert again.result == {"score": 0.5}
    assert again.model.weight.equal(whole.model.weight)
    assert first.keys + again.keys == whole.keys
    assert first.noise + again.noise == whole.noise
    assert metrics(run, "step") == metrics(tmp_path / "whole", "step")


def test_a_request_during_the_last_evaluation_is_heard(plain):
    def evaluate(model):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"score": 0.5}, {"modes": [], "depths": []}

    assert plain("run", "--eval-every 16", evaluate=evaluate).result is None
    assert plain("run", "--eval-every 16 --resume").result == {"score": 0.5}


def test_processes_resume_equal_shares_of_the_totals(plain, tmp_path, monkeypatch):
    """The saved ones are sums over all processes, whatever their number was."""
    task = plain("run", stop_at=12 * 7)
    checkpoint = saved(tmp_path / "run")
    optimizer = plain_sgd(task.model)
    monkeypatch.setattr(train, "WORLD_SIZE", 3)
    step, totals = train.restore(task, optimizer, checkpoint)
    assert step == 8
    assert totals.all()
    assert (3 * totals).tolist() == pytest.approx(checkpoint["interval"].tolist())


@parametrize("score", [math.nan, 1e30, -1000.0])
def test_a_score_that_has_diverged_stops_the_run_and_is_not_saved(plain, tmp_path, score):
    """A thousand or more has diverged; the first evaluation is that of step 5."""
    assert plain("clean", score=999.0).result == {"score": 999.0}
    with pytest.raises(BadInput, match="step 5: .*diverged.*lower --lr"):
        plain("run", score=score)
    assert not (tmp_path / "run/checkpoint.pt").exists()


@parametrize("every, stop_at, step, last_saved", [
    (5, None, 10, 5),
    (5, 12 * 7, 8, 5),
    (16, None, 10, None),
])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(
        plain, tmp_path, every, stop_at, step, last_saved):
    """In step 7. A run looks every ten steps, and before it records (every six of these 160),
    evaluates (every 5 or 16) or stops.
    """
    key = plain("clean").keys[12 * 6]
    with pytest.raises(BadInput, match=f"step {step}: .*diverged.*all nan.*lower --lr"):
        plain("run", f"--eval-every {every} --epochs 40", not_a_number=key, stop_at=stop_at)
    if last_saved:
        checkpoint = saved(tmp_path / "run")
        assert checkpoint["step"] == last_saved
        assert checkpoint["model"]["weight"].isfinite()
    else:
        assert not (tmp_path / "run/checkpoint.pt").exists()


def test_a_gradient_that_is_not_finite_stops_the_run_and_is_not_saved(plain, tmp_path):
    with pytest.raises(BadInput, match="step 10: .*diverged"):
        plain("run", steep_at=10)
    checkpoint = saved(tmp_path / "run")
    assert checkpoint["step"] == 5
    assert checkpoint["model"]["weight"].isfinite()


FEWER = [(index, f"number {index}") for index in range(49)]
OTHERS = [(index, f"number {50 - index}") for index in range(50)]


@parametrize("captions", [FEWER, OTHERS], ids=["fewer", "others"])
def test_a_run_is_not_resumed_on_other_examples(plain, captions):
    plain("run", stop_at=12)
    with pytest.raises(BadInput, match="resumed had other numbers, 50 of them, here are .*--out"):
        plain("run", "--resume", captions=Captions(captions))


# --- The folder of a run ---


def test_a_run_that_cannot_be_moved_says_what_to_type(plain, tmp_path, monkeypatch):
    """As a mounted folder."""
    plain("run")
    monkeypatch.setattr(Path, "rename", Mock(side_effect=OSError(16, "Device or resource busy")))
    with pytest.raises(BadInput, match="cannot be renamed .*busy.* --resume, or .* --out .*/new"):
        plain("run")


def test_the_lock_stays_with_the_name_when_an_earlier_run_is_moved(plain, tmp_path):
    lock = tmp_path / "run/.lock"
    plain("run")
    with only_run_in(tmp_path / "run"):
        held = lock.stat().st_ino
        plain("run")
        assert lock.stat().st_ino == held
        assert (tmp_path / "run-1/checkpoint.pt").exists()


def test_a_new_run_moves_an_earlier_one_to_the_next_free_name(plain, tmp_path):
    for rate in (0.1, 0.2, 0.3):
        plain("run", f"--lr {rate}")
    for name, rate in (("run-1", 0.1), ("run-2", 0.2), ("run", 0.3)):
        assert saved(tmp_path / name)["settings"]["lr"] == rate


def test_an_earlier_run_that_was_only_evaluated_is_moved_too(plain, tmp_path):
    """It has a result, but no checkpoint."""
    plain("run", "--epochs 0")
    write_json(tmp_path / "run/result.json", {})
    plain("run")
    assert (tmp_path / "run-1/result.json").exists()
    assert not (tmp_path / "run/result.json").exists()


def test_a_picture_that_cannot_be_drawn_does_not_cost_the_run(plain, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "draw_runs", Mock(side_effect=OSError("switches.png is open")))
    assert plain("run").result is not None
    assert "run: the pictures could not be drawn: OSError('switches.png is open')" in (
        capsys.readouterr().out)
    assert saved(tmp_path / "run")["step"] == 16


def test_a_run_whose_batch_was_cut_is_resumed_by_the_same_command(plain, tmp_path):
    plain("run", "--batch 64", stop_at=2)
    plain("run", "--batch 64 --resume")
    assert saved(tmp_path / "run")["step"] == 4
    with pytest.raises(BadInput, match="--batch 20: the run that is resumed has 50"):
        plain("run", "--batch 20 --resume")


def test_what_is_only_evaluated_needs_no_batch_of_equal_parts(plain):
    task = plain("run", "--epochs 0 --accum 5")
    assert task.result is not None


def test_a_batch_is_cut_to_the_data(plain, capsys):
    task = plain("run", "--batch 64 --accum 4")
    said = capsys.readouterr().out
    assert "--batch 64 is cut: there are only 50 training numbers" in said
    assert len(task.keys) == 4 * 48
    for start in (0, 48):
        assert len({index for _, index in task.keys[start : start + 48]}) == 48


# --- Optimisation ---


def test_gates_learn_at_a_tenth_and_biases_and_norms_do_not_decay(config):
    model = SwitchBertForPretraining(config)
    groups = train.make_optimizer(model, weight_decay=0.01, gate_rate=0.1).param_groups
    group_of = {parameter: group for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name or name.endswith("transform.2.weight")
        spared = is_norm or name.endswith("bias")
        is_gate = "mode_gate" in name or "switch_input" in name
        group = group_of[parameter]
        assert group["weight_decay"] == (0 if spared else 0.01), name
        assert group["scale"] == (0.1 if is_gate else 1), name


def test_a_run_too_short_for_the_papers_rate_has_hard_switches_after_nine_tenths(capsys):
    """From 5 to .2 at a rate of 1e-6 takes ln 25 = 3.22 million pairs."""
    task = SimpleNamespace(initial_temperature=5.0, unit="pairs")

    def last_temperatures(batch, flags=""):
        """A tenth before nine tenths, and at nine tenths, of a run of 10,000 steps."""
        args, _ = train.parse_args(f"--data x --batch {batch} {flags}".split())
        rate = train.anneal_rate(args, task, 10_000)
        return [train.temperature(share * 10_000 * batch, rate=rate) for share in (0.8, 0.9)]

    short = [5 * 25 ** (-8 / 9), 0.2]
    assert last_temperatures(100) == approx(short)
    assert "its 1,000,000 pairs are fewer than the 3,218,876 of" in capsys.readouterr().out
    assert last_temperatures(330) == approx([5 * math.exp(-2.64), 5 * math.exp(-2.97)])
    assert last_temperatures(330, "--anneal 0.9") == approx(short)
    args, _ = train.parse_args("--data x --batch 100".split())
    train.anneal_rate(args, task, 0)  # a finished run, which is only evaluated
    assert not capsys.readouterr().out


# --- Pretraining and evaluation ---

WORDS = ("small", "red", "large")
CAPTIONS = [(str(image), f"a {word} ring") for image in range(10) for word in WORDS]


@pytest.fixture
def data(store, tokenizer):
    return train.Data(store, CAPTIONS, CAPTIONS[::3], tokenizer)


@pytest.fixture
def model(store, tokenizer):
    args = SimpleNamespace(**train.TOY)
    return SwitchBertForPretraining(train.model_config(args, store, tokenizer))


def new_task(flags, data, checkpoint=None):
    args, _ = train.parse_args(flags.split())
    return train.Pretraining(args, data, checkpoint)


@parametrize("classes", [7, 0])
@parametrize("flags", ["", "--blind"])
def test_losses_belong_to_counts_and_reach_every_parameter(data, flags, classes, monkeypatch):
    """Several processes wait for the gradient of each."""
    monkeypatch.setattr(data.store, "num_region_classes", classes)
    if not classes:
        monkeypatch.delitem(data.store.arrays, "class_probs")
    task = new_task(flags, data)
    batch = task.collate([task.examples[index] for index in range(8)])
    sums, _ = task.sums(task.model.eval(), batch, 9.0)
    whole = task.model(**batch, temperature=9.0)
    assert sums.equal(whole.sums[:3])
    assert task.counts(batch).tolist() == list(whole.counts[:3])
    sums.sum().backward()
    for name, parameter in task.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_an_evaluation_is_the_mean_over_examples_one_by_one(model, store, tokenizer):
    ring = tokenizer.encode("ring", 3)[1]
    model.mlm_bias.data[ring] = 99  # so that some words are right
    pairs = PretrainingDataset(store, CAPTIONS, tokenizer)
    scores, switches = train.evaluate(model, pairs, batch_size=7)
    assert model.training  # again, as the loop needs it
    sums = torch.zeros(5)
    counts = torch.zeros(5)
    modes = 0
    for index in range(30):
        with torch.no_grad():
            out = model.eval()(**collate([pairs[index]]))
        sums += out.sums
        counts += torch.tensor(out.counts)
        modes = modes + out.encoder.modes[0]
    assert sums.all()
    mlm, mrc, itm, words, match = (sums / counts).tolist()
    assert list(scores) == ["mlm", "mrc", "itm", "words", "match"]
    expected = dict(mlm=mlm, mrc=mrc, itm=itm, words=words, match=match)
    assert scores == approx(expected, rel=1e-4)
    assert np.allclose(switches["modes"], modes / 30)


HELD_OUT = [("7", "a"), ("99", "no features"), ("3", "c"), ("7", "d")]


def test_words_are_scored_on_masked_pairs_and_matching_on_whole_ones(data, monkeypatch):
    def is_masked(model, pairs):
        masked = pairs[0]["region_hidden"].any()
        return {"words": masked, "match": masked}, "switches"

    monkeypatch.setattr(train, "evaluate", is_masked)
    task = new_task("", data._replace(held_out_captions=HELD_OUT))
    assert task.evaluate(None) == ({"words": True, "match": False}, "switches")


def test_zero_shot_ranks_by_the_first_caption_of_each_image(data, monkeypatch):
    def match(model, store, tokenizer, texts, ids):
        first = HELD_OUT[:3]
        return torch.tensor([[float((i, text) in first) for i in ids] for text in texts])

    monkeypatch.setattr(train, "match_scores", match)
    task = new_task("", data._replace(held_out_captions=HELD_OUT))
    args, _ = train.parse_args([])
    scores = train.zero_shot(args, task)
    assert scores.pop("images") == 2
    assert set(scores.values()) == {1.0}


def test_match_scores_are_the_log_odds_of_each_pair_alone(model, store, tokenizer):
    """Texts of two lengths; 120 images of one, three and five regions or unknown, in two blocks."""
    texts = ["a red ring", "a large blue circle left of the ring", "a blue ring"]
    ids = ["4", "0", "7", "-"]
    ranker = SwitchBertForRetrieval.from_pretraining(model.config, model.state_dict())
    scores = train.match_scores(ranker, store, tokenizer, texts, ids * 30)
    assert (scores.view(3, 30, 4) - scores[:, None, :4]).abs().max() < 1e-4
    model.eval()
    for t, text in enumerate(texts):
        for i, image in enumerate(ids):
            unknown = image == "-"
            captions = [("9" if unknown else image, text), ("1", "a")]
            pairs = PretrainingDataset(
                store, captions, tokenizer, mismatch=0, masking=False, blind=unknown)
            out = model(**collate([pairs[0]]))
            mismatch, match = model.itm_classifier(out.encoder.pooled)[0].tolist()
            assert scores[t, i].item() == approx(match - mismatch, abs=1e-4)


def brute_force_recall(scores, is_right, k):
    """Of each row, the k best; among equal scores the wrong ones come first."""
    hits = []
    for row, right in zip(scores.tolist(), is_right.tolist()):
        ranked = sorted(zip([-score for score in row], right))
        hits.append(any(right for _, right in ranked[:k]))
    return np.mean(hits)


@parametrize("levels", [1, 3, 1000])
def test_recall_equals_a_brute_force_ranking_also_with_ties(levels):
    """Seven images with 1 to 3 texts each."""
    image_of_text = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5, 6])
    right = image_of_text[:, None] == torch.arange(7)
    for _ in range(20):
        scores = torch.randint(levels, (11, 7)).float()
        expected = {}
        for k in (1, 2, 5):
            expected[f"image R@{k}"] = brute_force_recall(scores, right, k)
            expected[f"text R@{k}"] = brute_force_recall(scores.T, right.T, k)
        assert train.recall_at(scores, image_of_text, (1, 2, 5)) == approx(expected)


def test_scores_that_are_no_numbers_are_no_hits():
    scores = torch.full((6, 3), math.nan)
    recalls = train.recall_at(scores, torch.tensor([0, 0, 1, 1, 2, 2]), ks=(1,))
    assert recalls == {"image R@1": 0, "text R@1": 0}


# --- Data folders ---


def write_store(folder, ids):
    """A store of images with three regions each, without class distributions."""
    writer = FeatureStore.create(folder, ids, 3, 12, detector="made up")
    boxes = np.tile([1.0, 1, 9, 9], (3, 1))
    for row in writer.pending():
        writer.write(row, np.eye(3, 12, row % 9), boxes, (10, 10))
    return writer.finish()


def write_captions(path, captions):
    lines = [f"{image}\t{text}\n" for image, text in captions]
    path.write_text("".join(lines))


def write_splits(path, splits):
    """One of Karpathy's files. splits: (number of an image, its split and caption)."""
    images = [{"filename": f"{image}.jpg", "split": split, "sentences": [{"raw": split}]}
        for image, split in splits]
    path.write_text(json.dumps({"images": images}))


@pytest.fixture
def folder(tmp_path):
    """data/ with features of 40 images without class distributions, and a caption of each."""
    home = tmp_path / "data"
    write_store(home / "features", range(40))
    write_captions(home / "a.tsv", [(i, f"a small dog number {i}") for i in range(40)])
    return home


def pretrain(folder, flags=""):
    """4 steps of the small model, on 16 pairs of the folder, into run/ beside it."""
    places = f"--data {folder} --out {folder.with_name('run')}"
    size = "--model small --epochs 2 --batch 8 --limit 16 --eval-every 2"
    words = f"{places} {size} {flags}".split()
    args, checkpoint = train.parse_args(words)
    return train.pretrain(args, checkpoint)


def test_a_data_folder_is_trained_on_and_the_run_leaves_its_record(folder, tmp_path, capsys):
    scores = pretrain(folder)
    out = tmp_path / "run"
    names = sorted(path.name for path in out.iterdir())
    assert names == ["checkpoint.pt", "config.json", "curves.png", "metrics.jsonl",
        "result.json", "switches.gif", "switches.png"]
    result = read_json(out / "result.json")
    assert result["batch"] == 8
    assert result["results"]["val"]["hard"] == scores
    assert any("R@1" in name for name in scores)
    assert scores["images"] == 5
    assert "mrc" not in scores  # nothing is said of what is not measured
    said = capsys.readouterr().out
    assert "training without MRC" in said
    assert "16 pairs" in said
    evaluations = metrics(out, "scores")
    shares = [line["switches"] for line in evaluations]
    shares += [line["soft_switches"] for line in metrics(out, "soft_switches")]
    for of_line in shares:
        assert np.allclose(np.sum(of_line["modes"], axis=-1), 1)
        shapes = [np.shape(depths) for depths in of_line["depths"]]
        assert shapes == [(2, 1), (2, 2), (2, 3), (2, 4)]
    assert evaluations[-1]["scores"].items() <= scores.items()
    assert pretrain(folder, "--resume") == scores  # by the checkpoint's weights


def test_a_run_starts_from_the_words_and_weights_of_another_that_fit(folder, capsys):
    """Here another one of three layers, and with other captions."""
    pretrain(folder)
    first = folder.with_name("first")
    run = folder.with_name("run")
    run.rename(first)
    write_captions(folder / "a.tsv", [(i, "an unknown cat") for i in range(40)])
    short = "--epochs 1 --lr 1e-12"
    pretrain(folder, f"--init {first} {short} --set num_hidden_layers=3")
    said = capsys.readouterr().out
    assert f"started from {first}; new in this model: nothing; not used: 20 " in said
    one = saved(first)
    two = saved(run)
    assert two["config"]["num_hidden_layers"] == 3
    assert two["vocab"] == one["vocab"]
    assert two["settings"]["set"] == ["num_hidden_layers=3"]
    assert two["step"] == 2
    for name, weights in two["model"].items():
        close(weights, one["model"][name])
    assert pretrain(folder, f"{short} --resume")["words"] >= 0
    with pytest.raises(BadInput, match="first: its layers have another size"):
        pretrain(folder, f"--init {first} --set hidden_size=64")


def test_a_blind_run_sees_no_picture(folder, monkeypatch):
    def fail(*_):
        pytest.fail("a picture was read")

    monkeypatch.setattr(FeatureStore, "__getitem__", fail)
    scores = pretrain(folder, "--blind")
    assert scores.keys() == {"mlm", "words"}  # it learns no matching and no regions


def images_of(captions):
    return {image for image, _ in captions}


def test_held_out_images_are_in_no_training_pair(folder):
    """Without splits, one in a hundred of those with features: those with the smallest crc32."""
    missing = min(range(3000, 9999), key=lambda i: zlib.crc32(b"%d" % i))
    images = list(range(3000)) + [missing] * 500
    write_captions(folder / "b.tsv", [(image, "a") for image in images])
    store = write_store(folder.with_name("larger"), range(3000))
    training, held_out = train.split_captions(folder, store)
    assert not images_of(training) & images_of(held_out)
    assert len(images_of(held_out)) == 30
    assert len(training) + len(held_out) == 3540
    assert str(missing) not in images_of(held_out)


@parametrize("images, number", [(20, 5), (10, 5), (5, 2), (2, 1)])
def test_of_few_images_at_most_half_are_held_out(tmp_path, images, number):
    store = write_store(tmp_path / "few", range(images))
    ids = np.array([b"%d" % image for image in range(images)])
    splits = train.hold_out(ids, np.full(images, b"train"), store)
    assert (splits == b"val").sum() == number


def test_captions_with_features_are_held_out_first(folder):
    """A store may have regions of a few pictures only: here of 40."""
    lost = [(image, "dev") for image in range(5000, 6100)]
    write_splits(folder / "c.json", lost + [(3, "val"), (4, "val")])
    _, held_out = train.split_captions(folder, FeatureStore(folder / "features"))
    assert len(held_out) == 1000
    assert list(held_out[:3]) == [("3", "val"), ("4", "val"), ("5000", "dev")]


def test_captions_without_words_are_counted_in_training_and_in_what_is_held_out(folder, capsys):
    texts = [" ", "a dog"] * 20
    write_captions(folder / "a.tsv", enumerate(texts))
    task = new_task("", train.load_data(folder))
    said = capsys.readouterr().out
    assert "no file names val: 5 of 40 images are held out" in said
    counts = re.findall(r"left out: (\d+) (captions|held-out captions) without words", said)
    (training, _), (held_out, _) = counts
    assert int(training) + int(held_out) == 20
    assert task.missing["without words"] == int(training)
    for pairs in (task.examples, task.mixed, task.whole):
        assert set(pairs.captions.texts) == {"a dog"}


def test_a_held_out_image_leaves_all_files(folder):
    write_splits(folder / "c.json", [(0, "test"), (1, "restval"), (2, "train"), (3, "val")])
    training, held_out = train.split_captions(folder, FeatureStore(folder / "features"))
    assert list(held_out) == [("3", "val")]
    assert list(training[-2:]) == [("1", "restval"), ("2", "train")]
    assert "3" not in images_of(training)


@parametrize("other, image_id, message", [
    ("cc12m/00000/000000012.txt", None, "cc12m .*sbu both have a picture 12"),
    ("coco.tsv", "COCO_val2014_000000000012.jpg", "coco.tsv .*sbu both have a picture 12"),
    ("cc12m/00000/dog_1.txt", None, "cc12m .*sbu both have a picture dog_1"),
    ("coco.tsv", "dog_1", None),
    ("coco.tsv", "13", None),
])
def test_two_data_sets_that_count_from_0_are_not_mixed(folder, other, image_id, message):
    """A table may caption the named pictures of a folder, and two tables those of any."""
    store = write_store(folder.with_name("larger"), list(range(40)) + ["dog_1"])
    for name in ("sbu/00000/000000012.txt", "sbu/00000/dog_1.txt", other):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".tsv":
            write_captions(path, [(image_id, "a ring")])
        else:
            path.write_text("a ring")
            path.with_suffix(".json").write_text("{}")
    write_captions(folder / "a.tsv", [(i, "a ring") for i in range(13, 40)])
    write_captions(folder / "b.tsv", [(14, "in another table")])
    if message is None:
        training, _ = train.split_captions(folder, store)
        assert len(training) > 1
    else:
        with pytest.raises(BadInput, match=message):
            train.split_captions(folder, store)


def test_every_file_of_a_data_folder_is_accounted_for(folder, capsys):
    """What is found of each, what is not read, and splits that are not used."""
    for name in ("00000.tar", "captions.csv", "._b.tsv", "images/3.jpg", "vqa/q.json",
            "uncased/vocab.txt", "frcnn/objects_vocab.txt"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("a cat")
    write_splits(folder / "c.json",
        [(1, "train"), (2, "dev"), (3, "test"), (99, "test"), (98, "test")])
    store = FeatureStore(folder / "features")
    train.split_captions(folder, store)
    said = capsys.readouterr().out.replace(str(folder), "data")
    unread = "00000.tar, captions.csv, frcnn, images, uncased, vqa"
    assert f"data: no captions are read from {unread}\n" in said
    assert "data/a.tsv: captions: 40 of 40 found in data/features\n" in said
    assert "data/c.json: captions: 3 of 5 found in data/features\n" in said
    assert "data: 4 captions are not used: test, val beyond 1,000, or training captions" in said
    write_captions(folder / "d.tsv", [("dog_1", "a dog")])
    with pytest.raises(BadInput, match="d.tsv: captions: 0 of 1 found in .*: 'dog_1' and '0'"):
        train.split_captions(folder, store)


def write_words(folder, words):
    lines = [word + "\n" for word in SPECIALS + words]
    (folder / "vocab.txt").write_text("".join(lines))


def test_no_scene_of_the_toy_world_is_both_trained_on_and_held_out(monkeypatch):
    monkeypatch.setattr(train, "FeatureStore", Mock())
    _, training, held_out = train.toy_world()
    assert not set(training) & set(held_out)


def test_words_come_from_where_the_weights_come_from(folder, tmp_path):
    """Not from the captions, nor from another BERT."""
    def last_word(bert, words=None):
        return train.load_data(folder, bert, words).tokenizer.pieces[-1]

    mine = tmp_path / "mine"
    theirs = folder / "bert"
    mine.mkdir()
    theirs.mkdir()
    write_words(mine, ["mine"])
    write_words(theirs, ["theirs"])
    assert last_word(mine) == "mine"
    assert last_word(theirs) == "theirs"
    write_words(folder, ["mine"])
    assert last_word(mine) == "mine"
    with pytest.raises(BadInput, match="vocab.txt differs in .*bert and .*data; remove that of"):
        last_word(theirs)
    assert last_word(theirs, SPECIALS + ["x"]) == "x"
    (folder / "vocab.txt").unlink()
    with pytest.raises(BadInput, match="empty: expected vocab.txt, the words of its weights"):
        last_word(tmp_path / "empty")


def test_a_run_starts_from_the_bert_of_its_folder_and_uses_its_words(folder, monkeypatch):
    words = [f"word{i}" for i in range(55)]
    write_bert(folder / "bert", bert_weights())
    write_words(folder / "bert", words)
    tiny = SwitchBertConfig.tiny(num_region_classes=0)
    monkeypatch.setattr(train, "model_config", lambda *_: tiny)
    args, _ = train.parse_args(["--data", str(folder)])
    data = train.load_data(folder, args.bert)
    assert list(data.tokenizer.pieces) == SPECIALS + words
    layer = train.Pretraining(args, data).model.bert.layers[1]
    expected = bert_weights()["bert.encoder.layer.1.intermediate.dense.weight"]
    assert layer.intermediate.weight.equal(expected)


# --- Flags, devices, checkpoints, and what is refused ---


@parametrize("flags, expected", [
    ("", ("small", 4, 64, 0.001, 0.9)),
    ("--data x", ("base", 10, 256, 1e-4, None)),
    ("--resume --out run", ("small", 4, 12, 0.07, 0.9)),
])
def test_defaults_follow_the_data_or_the_resumed_run(
        plain, tmp_path, monkeypatch, flags, expected):
    plain("run", "--lr 0.07")
    monkeypatch.chdir(tmp_path)
    args, _ = train.parse_args(flags.split())
    assert (args.model, args.epochs, args.batch, args.lr, args.anneal) == expected


@parametrize("card, precision, workers, compiles", [
    (None, "fp32", 0, False),
    ("P100", "fp32", 4, True),
    ("A100", "bf16", 4, True),
])
def test_defaults_follow_the_card_at_hand(monkeypatch, card, precision, workers, compiles):
    """An old card only emulates bf16, which takes longer than fp32."""
    def supports_bf16(including_emulation=True):
        return card == "A100" or (card == "P100" and including_emulation)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supports_bf16)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for script, flags in ((train, []), (finetune, ["vqa"])):
        args, _ = script.parse_args(flags)
        assert args.precision == precision
        assert args.workers == workers
        assert args.compile == compiles


@pytest.fixture
def in_autocast(monkeypatch):
    """A list: for each linear layer and each backward pass, did it begin inside of autocast?"""
    inside = []
    linear = torch.nn.functional.linear
    backward = torch.Tensor.backward

    def noted_linear(*args):
        inside.append(torch.is_autocast_enabled("cpu"))
        return linear(*args)

    def noted_backward(loss):
        inside.append(torch.is_autocast_enabled("cpu"))
        backward(loss)

    monkeypatch.setattr(torch.nn.functional, "linear", noted_linear)
    monkeypatch.setattr(torch.Tensor, "backward", noted_backward)
    return inside


@parametrize("precision", ["fp32", "bf16"])
def test_evaluation_and_ranking_compute_in_the_precision_of_training(
        data, in_autocast, precision):
    """Gradients do not: a backward pass inside of autocast would round those of the gates."""
    lower = precision == "bf16"
    args, _ = train.parse_args(["--precision", precision])
    task = train.Pretraining(args, data)
    model = train.place(task.model, args)
    for evaluation in (lambda: task.evaluate(model), lambda: train.zero_shot(args, task)):
        in_autocast.clear()
        evaluation()
        assert (True in in_autocast) == lower
    ranker = SwitchBertForRetrieval.from_pretraining(model.config, model.state_dict())
    scores = train.match_scores(train.place(ranker, args), data.store, data.tokenizer,
        ["a red ring", "a ring"], list("0123456789"))
    assert len(scores.unique()) == 20
    assert (scores != scores.bfloat16()).sum() > 15  # they are not rounded
    batch = task.collate([task.examples[0, index] for index in range(9)])
    step_args = SimpleNamespace(seed=0, accum=1)
    in_autocast.clear()
    train.forward_backward(step_args, task, model, [batch], 0, 1.0)
    assert in_autocast[0] == lower
    assert in_autocast[-1] is False


@parametrize("cuda, processes, where", [
    (False, 1, "mps"),
    (False, 2, "cpu"),
    (True, 1, "cuda"),
    (True, 2, "cuda"),
])
def test_several_processes_do_not_share_an_apple(monkeypatch, cuda, processes, where):
    """What they exchange, gloo cannot read from its GPU."""
    apple = torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: apple)
    monkeypatch.setattr("data.WORLD_SIZE", processes)
    assert train.device().type == where


@parametrize("cuda, backend, card", [
    (False, "gloo", None),
    (True, "nccl", torch.device("cuda", 3)),
])
def test_processes_know_their_card_and_wait_for_hours(
        monkeypatch, tmp_path, cuda, backend, card):
    init = Mock(side_effect=BadInput)
    set_device = Mock()
    monkeypatch.setattr(train.dist, "init_process_group", init)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(train, "WORLD_SIZE", 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    args, _ = train.parse_args(["--out", str(tmp_path)])
    with pytest.raises(BadInput):
        train.launch(args, None)
    assert init.call_args.args == (backend,)
    settings = init.call_args.kwargs
    assert settings["device_id"] == card
    assert settings["timeout"].total_seconds() > 12 * 3600
    if cuda:
        set_device.assert_called_once_with(card)


def test_constants_are_not_sent_in_every_step(plain, monkeypatch):
    """Buffers, to the other processes; the flag has changed its name between versions of torch."""
    wrapped = []

    def wrap(model):
        wrapped.append(model)
        return model

    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    monkeypatch.setattr(train, "DistributedDataParallel", wrap)
    plain("run")
    assert wrapped[0].broadcast_buffers is False
    known = getattr(DistributedDataParallel, "broadcast_buffers", None)
    source = inspect.getsource(DistributedDataParallel)
    assert isinstance(known, property) or "self.broadcast_buffers = " in source


def test_layers_run_as_they_are_where_torch_does_not_know_this_python(config, monkeypatch):
    """As torch 2.9 under Python 3.14."""
    refused = Mock(side_effect=RuntimeError("torch.compile is not supported on Python 3.14+"))
    monkeypatch.setattr(torch, "compile", refused)
    model = SwitchBert(config)
    train.compile_layers(SimpleNamespace(bert=model))
    assert refused.called
    assert "block" not in vars(model.layers[0])


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_layers_larger_than_a_bucket_compile_to_one_graph_in_several_processes(
        inputs, process_group, monkeypatch):
    """Buckets of gradients are of 25 MiB. DistributedDataParallel cut larger layers, and compiled
    them for each temperature anew.
    """
    compile_without_compiler = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compile_without_compiler)
    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    config = SwitchBertConfig(vocab_size=60, region_feature_size=12, num_hidden_layers=5)
    layer = SwitchBert(config).layers[1]
    assert 4 * sum(parameter.numel() for parameter in layer.parameters()) > 25 * 2**20
    model = SwitchBertForRetrieval(config)
    args = SimpleNamespace(compile=True)
    wrapped = train.wrap(model, args)
    torch._dynamo.reset()  # of what other tests have compiled
    torch._dynamo.utils.counters.clear()
    for tau in (5.0, 3.0, 0.7, 0.2):
        scores, _ = wrapped(**inputs, temperature=tau)
        scores.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_layers_compile_to_one_graph_for_all_lengths_and_temperatures(
        config, inputs, monkeypatch):
    """And to one each for hard and soft evaluation. All but the compiler itself is torch's own."""
    compile_without_compiler = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compile_without_compiler)
    six_layers = replace(config, num_hidden_layers=6)
    model = SwitchBert(six_layers)
    compiled = SwitchBert(six_layers)
    compiled.load_state_dict(model.state_dict())
    train.compile_layers(SimpleNamespace(bert=compiled))
    torch._dynamo.reset()  # of what other tests have compiled
    torch._dynamo.utils.counters.clear()
    graphs = torch._dynamo.utils.counters["stats"]

    def run(pairs, length, temperature):
        """What the two models make of so many pairs, each of so many word pieces."""
        batch = {name: torch.cat([tensor[:1]] * pairs) for name, tensor in inputs.items()}
        for name in ("input_ids", "text_mask"):
            batch[name] = torch.cat([batch[name]] * 8, dim=1)[:, :length]
        return [m(**batch, temperature=temperature).pooled for m in (compiled, model)]

    lengths_and_temperatures = ((12, 5.0), (9, 2.5), (38, 1.1), (2, 0.9), (17, 0.4), (30, 0.2))
    for pairs, (length, tau) in enumerate(lengths_and_temperatures, 8):
        pooled, _ = run(pairs, length, tau)
        pooled.sum().backward()
    assert graphs["unique_graphs"] == 1
    model.eval()
    compiled.eval()
    with torch.no_grad():
        for tau in (None, 0.2):
            for pairs, length in ((200, 38), (73, 5), (200, 21)):
                found, expected = run(pairs, length, tau)
                close(found, expected)
    assert graphs["unique_graphs"] == 3


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    """Of the weight, which is 1.0, as float32: 00 00 80 3f."""
    path.write_bytes(path.read_bytes().replace(b"\0\0\x80?", b"\0\0\x81?"))


def with_entry(name, value):
    def change(path):
        content = torch.load(path, weights_only=True)
        content[name] = value
        torch.save(content, path)
    return change


@parametrize("change, message", [
    (cut_off, "checkpoint.pt: not a whole checkpoint"),
    (flip_a_bit, "is damaged"),
    (with_entry("vocab", Path()), "checkpoint.pt: not a whole checkpoint"),  # runs no code
    (with_entry("format", "switchbert-6"), "its format is switchbert-6, not switchbert-7"),
])
def test_damaged_checkpoints_are_refused(plain, tmp_path, change, message):
    plain("run", "--lr 1e-12")  # so that the weight is still 1, and its bytes known
    change(tmp_path / "run/checkpoint.pt")
    with pytest.raises(BadInput, match=message):
        plain("run", "--resume")


@parametrize("flags, message", [
    ("--resume --lr 0.5", "--lr 0.5: the run that is resumed has 1e-12"),
    ("--accum 5", "--batch 12, of 50 numbers: expected a multiple of 5"),
    ("--batch 64 --accum 51", "--batch 0, of 50 numbers: expected a multiple of 51"),
])
def test_flags_that_do_not_fit_are_refused(plain, flags, message):
    plain("run", "--lr 1e-12")
    with pytest.raises(BadInput, match=message):
        plain("run", flags)


@parametrize("flags, message", [
    ("--switches both", "--switches both --set: not a model .*4 layers"),
    ("--set layers=6", "--set layers=6: not a model .*no attribute 'layers'"),
    ("--set hidden_size=100 num_attention_heads=8", "100 is not a multiple of .*heads=8"),
    ("--set hidden_size=0", "hidden_size=0: expected 1 or more"),
    ("--set hidden_size=wide", "invalid literal for int.* 'wide'"),
    ("--set hidden_dropout_prob=1.5", "hidden_dropout_prob=1.5: expected 0 to 1"),
    ("--set max_position_embeddings=20", "expected 38 or more"),
    ("--set vocab_size=9", "multiple values for keyword argument 'vocab_size'"),
    ("--bert nowhere", "nowhere: not a Hugging Face BERT"),
])
def test_a_model_that_cannot_be_is_refused(data, flags, message):
    with pytest.raises(BadInput, match=message):
        new_task(flags, data)


@parametrize("entry, value, message", [
    ("detector", "vg", "detector is 'made up', .* trained with 'vg'"),
    ("num_region_classes", 8, "classes is 7, .* with 8"),
])
def test_a_store_that_does_not_fit_is_refused(data, entry, value, message):
    checkpoint = {"store": data.store.meta | {entry: value}}
    with pytest.raises(BadInput, match=message):
        new_task("", data, checkpoint)


# --- Pictures ---


def test_the_picture_shows_each_share_as_a_length_and_as_a_shade():
    """Text chooses 25 % own and 75 % both, vision always the other; text reads depth 0 in 20 %."""
    switches = {
        "modes": [[[1, 0, 0], [1, 0, 0]], [[0.25, 0, 0.75], [0, 1.0, 0]]],
        "depths": [[[1.0], [1.0]], [[0.2, 0.8], [1 - 1e-7, 1e-7]]],
    }
    pixels = np.asarray(train.switches_picture(switches, "title"))
    colours = [ImageColor.getrgb(colour) for colour in train.COLOURS[:3]]
    # Of each row of pixels, how many have the colour of each mode.
    bars = np.stack([(pixels == colour).all(axis=2).sum(axis=1) for colour in colours], axis=1)
    tops = np.flatnonzero(np.diff(bars.sum(axis=1)) > 200)  # of the four bars
    expected = np.array([[1, 0, 0], [0.25, 0, 0.75], [1, 0, 0], [0, 1, 0]])
    assert bars[tops + 5] == approx(expected * train.BAR, abs=2)
    shades = set(map(tuple, pixels.reshape(-1, 3).tolist()))
    assert {(204, 204, 204), (51, 51, 51)} <= shades


def test_pictures_are_stacked_in_rows_as_high_as_their_highest():
    """A row of a high and a low one, a row of a low one: no gap is left for a second high one."""
    red = Image.new("RGB", (5, 9), "red")
    blue = Image.new("RGB", (5, 4), "blue")
    whole = train.stack([red, blue, blue], columns=2)
    assert whole.size == (10, 13)
    assert whole.getpixel((4, 8)) == (255, 0, 0)
    assert whole.getpixel((5, 8)) == (255, 255, 255)
    assert whole.getpixel((5, 3)) == (0, 0, 255)
    assert whole.getpixel((0, 9)) == (0, 0, 255)


SHARES = {"modes": [[[1, 0, 0], [0, 0, 1]]], "depths": [[[1.0], [1.0]]]}


@pytest.fixture
def write_run(tmp_path):
    """write_run(name, {step: entries}) -> a run's folder with these lines of metrics.jsonl."""
    def write(name, lines):
        args = SimpleNamespace(out=tmp_path / name)
        args.out.mkdir(exist_ok=True)
        for step, entries in lines.items():
            train.record(args, step=step, switches=SHARES, **entries)
        return args.out

    return write


def test_show_draws_the_end_of_a_run_and_the_start_of_a_finetuned_one(write_run):
    frame = {"temperature": 1.0, "soft_switches": SHARES}
    heights = []
    for lines in ({5: frame, 10: frame}, {0: frame, 15: frame}):
        run = write_run("run", lines)
        train.main(["show", str(run)])
        heights.append(Image.open(run / "switches.png").height)
    assert heights[1] == 2 * heights[0]
    assert Image.open(run / "switches.gif").n_frames == 4


def test_show_names_a_damaged_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n{\n{}\n")
    with pytest.raises(BadInput, match="metrics.jsonl: not the metrics.jsonl .*near line 2: "):
        train.main(["show", str(tmp_path)])


def drawn(picture, colour, panels=1):
    """(points, 2): x and y of a colour's pixels in the first of a row of panels, the last row.

    The frame of a panel is 144 pixels high, and 20 less wide than the panel.
    """
    width = picture.width // panels
    pixels = np.asarray(picture)[-200:, :width]
    found = (pixels == ImageColor.getrgb(colour)).all(axis=2)
    return np.argwhere(found[48:193, 10 : width - 9])[:, ::-1]


def test_curves_of_all_runs_share_their_axes(write_run):
    """One falls from 3 to 2 in steps 5 to 10, the other, of an older version, is at 1 after 20."""
    new = write_run("new", {5: {"losses": {"mlm": 3.0}}, 10: {"losses": {"mlm": 2.0}}})
    old = write_run("old", {20: {"losses": {"mlm": 1.0}}})
    picture = train.draw_curves([new, old])
    falling = drawn(picture, train.COLOURS[0])
    alone = drawn(picture, train.COLOURS[1])
    width = train.WIDTH - 20
    assert falling.min(axis=0) == approx([width / 4, 0], abs=6)
    assert falling.max(axis=0) == approx([width / 2, 72], abs=6)
    assert alone.min(axis=0) == approx([width, 144], abs=8)


def test_held_out_losses_are_drawn_thick_over_those_of_training(write_run):
    """Both are flat, at 1 and at 2: of 144 pixels, one line is near the top."""
    values = {"losses": {"mlm": 1.0}, "scores": {"mlm": 2.0}}
    picture = train.draw_curves([write_run("run", {0: values, 9: values})])
    heights = set(drawn(picture, train.COLOURS[0])[:, 1])
    held_out = {y for y in heights if y < 72}
    assert len(held_out) > len(heights - held_out) > 0


def test_panels_fill_the_width_and_are_of_losses_rates_and_scores(write_run, monkeypatch):
    """Seven fill rows of three, two and two. What says little has none: speed and time."""
    widths = {}
    panel = train.curve_panel

    def noted_panel(name, lines, width):
        widths[str(name)] = width
        return panel(name, lines, width)

    monkeypatch.setattr(train, "curve_panel", noted_panel)
    entries = dict(losses=dict(mlm=3.0, mrc=2.0, itm=1.0), scores=dict(words=0.5, match=0.5),
        lr=1e-3, temperature=5.0, per_second=99.5, seconds=10.5, examples=64)
    picture = train.draw_curves([write_run("run", {9: entries})])
    assert picture.size == (train.WIDTH, 40 + 20 + 3 * 200)
    assert widths == {"mlm": 276, "mrc": 276, "itm": 276, "lr": 414, "temperature": 414,
        "words": 414, "match": 414}


def test_twelve_curves_are_drawn_losses_first_and_more_runs_than_colours(write_run):
    """Of VQA's 65 types of questions not all."""
    scores = {f"type {number}": 0.5 for number in range(65)}
    runs = []
    for k in range(8):
        last = {"losses": {"loss": 9.0 - k}, "scores": scores, "lr": 1e-3}
        runs.append(write_run(f"{k}", {0: {"scores": scores}, 9: last}))
    picture = train.draw_curves(runs)
    legend = 40 + 20 * 8
    assert picture.size == (train.WIDTH, legend + 4 * 200)
    first_row = picture.crop((0, 0, picture.width, legend + 200))
    heights = [drawn(first_row, colour, panels=3)[:, 1].max() for colour in train.COLOURS[1:7]]
    assert heights == sorted(set(heights))  # a loss each, the higher the earlier
    # The first and the last, of one colour, are not joined.
    alike = drawn(first_row, train.COLOURS[0], panels=3)[:, 1]
    assert not ((20 < alike) & (alike < 120)).any()


def test_show_prints_final_scores_with_recalls(write_run, capsys):
    old = write_run("old", {5: {"scores": {"words": 0.25}}, 9: {"scores": {"words": 0.5}}})
    new = write_run("new", {9: {"scores": {"words": 0.75}}, 10: {"lr": 1.0}})
    test = write_run("test", {9: {"scores": {"accuracy": 0.125}}})
    hard = {"words": 0.7, "image R@1": 0.875, "images": 100}
    write_json(new / "result.json", {"results": {"val": {"hard": hard}}})
    write_json(test / "result.json", {"results": {"test2015": {"hard": {}, "soft": {}}}})
    train.main(["show", str(old), str(new), str(test)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        [str(old), "words", "0.500"],
        [str(new), "words", "0.700", "image", "R@1", "0.875"],
        [str(test), "accuracy", "0.125"],
        [str(old / "switches.png")],
    ]
    curves = Image.open(old / "curves.png")
    assert curves.width == Image.open(old / "switches.png").width


def test_a_run_without_scores_is_shown(write_run):
    """As that of a submission: only the switches are known."""
    run = write_run("run", {0: {"scores": {}}})
    train.main(["show", str(run)])
    assert Image.open(run / "curves.png").height < 100
    assert Image.open(run / "switches.png").height > 100


def test_show_does_not_draw_both_pictures_into_one_file(write_run, capsys):
    run = write_run("run", {9: {"scores": {"words": 0.5}}})
    with pytest.raises(SystemExit):
        train.main(["show", str(run), "-o", str(run / "curves.png")])
    assert "curves.png is the name of the second picture" in capsys.readouterr().err


def test_pictures_name_the_modes_the_runs_and_the_range_of_a_curve(write_run, monkeypatch):
    """The modes of the table of modes, to which a reader may add one."""
    names_of = {}
    canvas = train.canvas

    def noted_canvas(width, height, title, names=()):
        names_of[title] = list(names)
        return canvas(width, height, title, names)

    modes = ["intra", "inter", "joint", "summary"]
    monkeypatch.setattr(train, "canvas", noted_canvas)
    monkeypatch.setattr(train, "MODES", modes)
    runs = [write_run("one", {10: {"lr": 1.0}}), write_run("two", {9: {"lr": 1.0}})]
    train.draw_runs(runs, runs[0] / "switches.png")
    assert names_of.pop("lr: 1 to 1\nsteps 0 to 10") == []
    assert names_of.pop("thin: training, thick: held out") == runs
    assert list(names_of.values()) == [modes, modes]
