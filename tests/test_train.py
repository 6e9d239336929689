"""What train.py promises: its loop, schedules, evaluation, data folders and records."""

import functools
import inspect
import json
import math
import os
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
from switchbert import (SwitchBert, SwitchBertConfig, SwitchBertForPretraining,
    SwitchBertForRetrieval)

# --- The loop, on the smallest task there is ------------------------------------------------------


class Plain(torch.utils.data.Dataset):
    """50 numbers x; one weight w, 1 at first; losses w x of all numbers and of the odd ones."""

    name, unit, loss_names = "pretraining", "numbers", ("all", "odd")
    clip, weight_decay, initial_temperature = 1.05, 0.0, 3.0
    gate_rate, evaluates_at_start, headline, labels = 0.1, False, str, None
    steep_at = None
    score, stop_at, not_a_number, lengths, missing = 0.5, None, None, np.arange(50) % 7, {}
    captions = Captions((i, f"number {i}") for i in range(50))

    def __init__(self, store, tokenizer):
        self.store, self.tokenizer, self.examples = store, tokenizer, self
        self.model = torch.nn.Linear(1, 1, bias=False)
        self.model.config = SwitchBertConfig.tiny(num_hidden_layers=1)
        torch.nn.init.ones_(self.model.weight)
        self.keys, self.noise, self.taus = [], [], []

    def __len__(self):
        return 50

    def __getitem__(self, key):
        if len(self.keys) == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        self.keys.append(key)
        return math.nan if key == self.not_a_number else (7 * key[1] % 50) / 50, key[1] % 2 > 0

    def collate(self, examples):
        return dict(zip(("x", "odd"), map(torch.tensor, zip(*examples))))

    def counts(self, batch):
        return torch.tensor([len(batch["x"]), batch["odd"].sum()])

    def sums(self, model, batch, tau):
        self.noise.append(torch.rand(1).item())
        self.taus.append(tau)
        loss, n = model(batch["x"][:, None])[:, 0], len(batch["x"])
        out = SimpleNamespace(modes=torch.full((n, 1, 2, 3), 1 / 3), depths=[torch.ones(n, 2, 1)])
        sums = torch.stack([loss.sum(), loss[batch["odd"]].sum()])
        steep = 0 * model.weight.sum() if len(self.noise) == self.steep_at else torch.ones(())
        return sums + steep.sqrt() - steep.detach().sqrt(), out  # the slope of a root at 0

    def evaluate(self, model):
        return {"score": self.score}, {"modes": [], "depths": []}


@pytest.fixture
def plain(store, tokenizer, tmp_path, monkeypatch):
    """plain(name, *flags, **attributes) -> the task after 16 steps of SGD on 12 numbers each."""
    def start(name, *flags, **attributes):
        task = Plain(store, tokenizer)
        vars(task).update(attributes)
        size = ["--batch", 12, "--epochs", 4, "--eval-every", 5, "--out", tmp_path / name]
        args, checkpoint = train.parse_args([*map(str, (*size, *flags))])
        task.result = train.fit(args, task, checkpoint)
        return task

    monkeypatch.setattr(train, "make_optimizer", lambda model, *_: torch.optim.SGD(
        [{"params": list(model.parameters()), "scale": 0.5}], lr=1.0, momentum=0.9))
    monkeypatch.setattr(train, "switches_picture", lambda *_: Image.new("RGB", (800, 9)))
    return start


def metrics(out, kind):
    """The lines of metrics.jsonl that hold this, without times."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines if kind in line]


@pytest.mark.parametrize("accum, flags, tau", [
    (1, ["--anneal", 0.5], lambda step: max(0.2, 3 * (1 / 15) ** (step / 8))),  # 8 of 16 steps
    *((parts, ["--data", "x"], lambda step: max(0.2, 3 * (1 / 15) ** (step / 14.4)))  # 9 tenths
        for parts in (2, 3, 6))])
def test_a_step_is_gradient_descent_on_the_whole_batch_in_any_number_of_parts(
        plain, tmp_path, accum, flags, tau):
    """Parts hold different numbers of odd ones: a mean of their means would differ."""
    task = plain("run", "--accum", accum, "--lr", 1e-3, *flags)
    weight, velocity, losses, clipped = 1.0, 0, [], []
    for step in range(16):
        indices = [index for _, index in task.keys[12 * step : 12 * step + 12]]
        mean, odd = (np.mean([7 * i % 50 / 50 for i in part])
            for part in (indices, [i for i in indices if i % 2]))
        losses.append((weight * mean, weight * odd))
        rate = 1e-3 * min((step + 1) / 2, (16 - step) / 14)  # a tenth of 16 steps is 2
        clipped.append(mean + odd > 1.05)
        velocity = 0.9 * velocity + min(mean + odd, 1.05)
        weight -= 0.5 * rate * velocity
    assert any(clipped) and not all(clipped) and abs(weight - 1) > 1e-3
    assert task.model.weight.item() == pytest.approx(weight, abs=1e-6)
    assert task.taus[::accum] == pytest.approx([*map(tau, range(16))], rel=1e-9)
    for line in metrics(tmp_path / "run", "mixture"):  # of every step, as there are under thirty
        since = losses[(line["step"] - 1) // 5 * 5 : line["step"]]
        mean = np.mean(since, axis=0).tolist()
        assert list(line["losses"].values()) == pytest.approx(mean, rel=1e-4)
        assert line["lr"] == train.learning_rate(line["step"] - 1, 16, 1e-3)
    recorded = metrics(tmp_path / "run", "scores")
    assert [line["step"] for line in recorded] == [5, 10, 15, 16]
    for line, (first, last) in zip(recorded, ((0, 5), (5, 10), (10, 15), (15, 16))):
        mean = np.mean(losses[first:last], axis=0).tolist()
        assert list(line["losses"].values()) == pytest.approx(mean, rel=1e-4)


def test_batches_depend_on_seed_and_epoch_and_noise_on_seed_step_and_part(plain):
    one, parts, same, other = (plain("run", "--accum", accum, "--seed", seed)
        for accum, seed in ((2, 0), (3, 0), (2, 0), (2, 1)))
    assert one.keys == parts.keys == same.keys != other.keys
    epochs = [one.keys[k : k + 48] for k in range(0, 192, 48)]  # 4 whole batches of the 50
    assert [{epoch for epoch, _ in keys} for keys in epochs] == [{0}, {1}, {2}, {3}]
    orders = [tuple(index for _, index in keys) for keys in epochs]
    assert len({*orders}) == 4 and all(len({*order}) == 48 for order in orders)
    assert one.noise == same.noise and len({*one.noise, *other.noise}) == 64  # 16 steps of 2 parts


def test_an_epoch_has_every_example_once_in_batches_of_like_length_in_random_order():
    """5,000 examples of 1 to 40 words: windows of 2,000 hold 50 of each length, batches 20."""
    lengths = np.random.default_rng(0).integers(1, 41, 5000)
    examples = type("Examples", (), {"__len__": lambda self: 5000, "lengths": lengths})()
    indices = train.epoch_batches(0, 3, 20, examples)
    assert indices.shape == (250, 20) and sorted(indices.flatten()) == [*range(5000)]
    found = lengths[indices]
    assert np.ptp(found, axis=1).max() <= 2 and np.ptp(found, axis=1).mean() < 1
    longest = found.max(axis=1)
    assert abs(np.corrcoef(longest[1:], longest[:-1])[0, 1]) < 0.2


@pytest.mark.parametrize("stop_at, step", [(0, 1), (12 * 7, 8), (12 * 9, 10), (12 * 16 - 1, None)])
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(plain, tmp_path, stop_at, step):
    """SIGTERM in step 1, 8, 10 (which is evaluated, too) and 16 of 16 (too late)."""
    whole = plain("whole", "--accum", 2)
    first = plain("run", "--accum", 2, stop_at=stop_at)
    assert (first.result is None) == bool(step)
    saved = train.load_checkpoint(tmp_path / "run" / "checkpoint.pt", "pretraining")["step"]
    assert saved == (step or 16)
    if stop_at == 12 * 7:  # as older checkpoints have it: the number of steps comes last
        path = tmp_path / "run/checkpoint.pt"
        old = torch.load(path, weights_only=True)
        torch.save(old | {"interval": torch.cat([old["interval"], torch.tensor([3.0])])}, path)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:  # a killed run knows later steps
        file.write(f'{{"step": {saved + 1}, "losses": {{}}}}\n{{"step": 99, "lo')
    again = plain("run", "--accum", 2, "--resume")
    assert again.result == {"score": 0.5} and again.model.weight.equal(whole.model.weight)
    assert first.keys + again.keys == whole.keys and first.noise + again.noise == whole.noise
    assert metrics(tmp_path / "run", "step") == metrics(tmp_path / "whole", "step")


@pytest.mark.parametrize("score", [math.nan, 1e30, -1000.0])
def test_what_has_diverged_stops_the_run_and_is_not_saved(plain, tmp_path, score):
    """Scores, if they are a thousand or more; and a loss in any step, if it is not finite: a run
    looks at that every ten steps, and before it records (here every six), evaluates or saves.
    """
    keys, path = plain("clean", score=999.0).keys[12 * 6 : 12 * 7], tmp_path / "run/checkpoint.pt"
    with pytest.raises(BadInput, match="step 5: .*diverged.*lower --lr"):
        plain("run", score=score)
    assert not path.exists()
    for stop_at, every, steps in (
            (None, 5, "7 to 10"), (12 * 7, 5, "7 to 8"), (None, 16, "7 to 10")):
        flags = ["--eval-every", every, "--epochs", 40]
        with pytest.raises(BadInput, match=rf"steps {steps}: .*diverged.*all nan.*lower --lr"):
            plain(f"run{every}", *flags, not_a_number=keys[0], stop_at=stop_at)
    saved = train.load_checkpoint(tmp_path / "run5/checkpoint.pt", "pretraining")
    assert saved["step"] == 5 and saved["model"]["weight"].isfinite()
    assert not (tmp_path / "run16/checkpoint.pt").exists()
    with pytest.raises(BadInput, match="steps 10 to 10: .*diverged"):  # a gradient, not a loss
        plain("steep", steep_at=10)
    saved = train.load_checkpoint(tmp_path / "steep/checkpoint.pt", "pretraining")
    assert saved["step"] == 5 and saved["model"]["weight"].isfinite()


@pytest.mark.parametrize("captions", [[(i, f"number {i}") for i in range(49)],
    [(i, f"number {50 - i}") for i in range(50)]], ids=["fewer", "others"])
def test_a_run_is_not_resumed_on_other_examples(plain, captions):
    plain("run", stop_at=12)
    with pytest.raises(BadInput, match="resumed had other numbers, 50 of them, here are .*--out"):
        plain("run", "--resume", captions=Captions(captions))


def test_a_run_that_cannot_be_moved_says_what_to_type(plain, tmp_path, monkeypatch):
    """As a mounted folder."""
    plain("run")
    monkeypatch.setattr(Path, "rename", Mock(side_effect=OSError(16, "Device or resource busy")))
    with pytest.raises(BadInput, match="cannot be renamed .*busy.* --resume, or .* --out .*/new"):
        plain("run")


def test_the_lock_stays_with_the_name_when_an_earlier_run_is_moved(plain, tmp_path):
    plain("run")
    with only_run_in(tmp_path / "run"):
        held = (tmp_path / "run/.lock").stat().st_ino
        plain("run")
        assert (tmp_path / "run/.lock").stat().st_ino == held
        assert (tmp_path / "run-1/checkpoint.pt").exists()


def test_a_new_run_moves_an_earlier_one_to_the_next_free_name(plain, tmp_path):
    for rate in (0.1, 0.2, 0.3):
        plain("run", "--lr", rate)
    for name, rate in (("run-1", 0.1), ("run-2", 0.2), ("run", 0.3)):
        saved = train.load_checkpoint(tmp_path / name / "checkpoint.pt", "pretraining")
        assert saved["settings"]["lr"] == rate


def test_gates_learn_at_a_tenth_and_biases_and_norms_do_not_decay(config):
    model = SwitchBertForPretraining(config)
    groups = train.make_optimizer(model).param_groups
    group_of = {parameter: group for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        spared = name.endswith("bias") or "norm" in name or name.endswith("transform.2.weight")
        scale = 0.1 if "mode_gate" in name or "switch_input" in name else 1
        expected = {"weight_decay": 0 if spared else 0.01, "scale": scale}
        assert expected.items() <= group_of[parameter].items(), name


# --- Pretraining ----------------------------------------------------------------------------------

CAPTIONS = [(str(i), f"a {word} ring") for i in range(10) for word in ("small", "red", "large")]


@pytest.fixture
def data(store, tokenizer):
    return train.Data(store, CAPTIONS, CAPTIONS[::3], tokenizer)


@pytest.fixture
def model(store, tokenizer):
    return SwitchBertForPretraining(train.model_config("small", store, tokenizer, "learned"))


@pytest.mark.parametrize("flags, classes", [([], 7), ([], 0), (["--blind"], 7), (["--blind"], 0)])
def test_losses_belong_to_counts_and_reach_every_parameter(data, flags, classes, monkeypatch):
    """Several processes wait for the gradient of each."""
    monkeypatch.setattr(data.store, "num_region_classes", classes)
    task = train.Pretraining(train.parse_args(flags)[0], data)
    batch = task.collate([task.examples[i] for i in range(8)])
    sums, whole = task.sums(task.model.eval(), batch, 9.0)[0], task.model(**batch, temperature=9.0)
    assert sums.equal(whole.sums) and task.counts(batch).tolist() == [*whole.counts]
    sums.sum().backward()
    for name, p in task.model.named_parameters():
        assert not p.requires_grad or (p.grad is not None and p.grad.isfinite().all()), name


def test_an_evaluation_is_the_mean_over_examples_one_by_one(model, store, tokenizer):
    model.mlm_bias.data[tokenizer.encode("ring", 3)[1]] = 99  # so that some words are right
    pairs = PretrainingDataset(store, CAPTIONS, tokenizer)
    found, switches = train.evaluate(model, pairs, batch_size=7)
    assert model.training  # again, as the loop needs it
    with torch.no_grad():
        outs = [model.eval()(**collate([pairs[k]])) for k in range(30)]
    sums, counts, right = (sum(torch.as_tensor(getattr(o, k)) for o in outs)
        for k in ("sums", "counts", "correct"))
    assert [*found] == ["mlm", "mrc", "itm", "words", "match"] and right.all()
    means = [*(sums / counts).tolist(), *(right / counts[[0, 2]]).tolist()]
    assert [*found.values()] == pytest.approx(means, rel=1e-4)
    assert np.allclose(switches["modes"], sum(o.encoder.modes[0] for o in outs) / 30)


def test_words_are_scored_masked_matching_whole_and_ranks_by_first_captions(data, monkeypatch):
    pairs = [("7", "a"), ("99", "no features"), ("3", "c"), ("7", "d")]
    data = data._replace(held_out_captions=pairs)
    task = train.Pretraining(train.parse_args([])[0], data)
    monkeypatch.setattr(train, "evaluate", lambda model, pairs: (
        dict.fromkeys(("words", "match"), pairs[0]["region_hidden"].any()), "switches"))
    assert task.evaluate(None) == ({"words": True, "match": False}, "switches")
    monkeypatch.setattr(train, "match_scores", lambda model, store, tokenizer, texts, ids:
        torch.tensor([[float((i, text) in pairs[:3]) for i in ids] for text in texts]))
    found = train.zero_shot(train.parse_args([])[0], task)
    assert found.pop("images") == 2 and set(found.values()) == {1.0}


def test_match_scores_are_the_log_odds_of_each_pair_alone(model, store, tokenizer):
    """Texts of two lengths; 120 images of one, three and five regions or unknown, in two blocks."""
    texts, ids = ["a red ring", "a large blue circle left of the ring", "a blue ring"], [*"407-"]
    ranker = SwitchBertForRetrieval.from_pretraining(model.config, model.state_dict())
    scores = train.match_scores(ranker, store, tokenizer, texts, ids * 30)
    assert (scores.view(3, 30, 4) - scores[:, None, :4]).abs().max() < 1e-4
    for t, i in np.ndindex(3, 4):
        pairs = [(ids[i].replace("-", "9"), texts[t]), ("1", "a")]
        pair = PretrainingDataset(store, pairs, tokenizer, mismatch=0, masking=False,
            blind=ids[i] == "-")[0]
        odds = model.itm_classifier(model.eval()(**collate([pair])).encoder.pooled)[0]
        assert scores[t, i].item() == pytest.approx((odds[1] - odds[0]).item(), abs=1e-4)


@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_recall_equals_a_brute_force_ranking_also_with_ties(levels):
    """Seven images with 1 to 3 texts each. Among equal scores the wrong ones come first."""
    image_of_text = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5, 6])
    right, expected = image_of_text[:, None] == torch.arange(7), {}
    for _ in range(20):
        scores = torch.randint(levels, (11, 7)).float()
        for name, s, own in (("image", -scores, right), ("text", -scores.T, right.T)):
            ranked = [sorted(zip(*row)) for row in zip(s.tolist(), own.tolist())]
            for k in (1, 2, 5):
                expected[f"{name} R@{k}"] = np.mean([any(own for _, own in r[:k]) for r in ranked])
        assert train.recall_at(scores, image_of_text, (1, 2, 5)) == pytest.approx(expected)


def write_store(folder, ids):
    """A store of images with three regions each, without class distributions."""
    writer = FeatureStore.create(folder, ids, 3, 12, detector="made up")
    for row in writer.pending():
        writer.write(row, np.eye(3, 12, row % 9), np.tile([1.0, 1, 9, 9], (3, 1)), (10, 10))
    return writer.finish()


@pytest.fixture
def folder(tmp_path):
    """data/ with features of 40 images without class distributions, and a caption of each."""
    home = tmp_path / "data"
    write_store(home / "features", range(40))
    (home / "a.tsv").write_text("".join(f"{i}\ta small dog number {i}\n" for i in range(40)))
    return home


def pretrain(folder, *flags):
    """4 steps of the small model, on 16 pairs of the folder, into run/ beside it."""
    size = "--model small --epochs 2 --batch 8 --limit 16 --eval-every 2".split()
    places = ["--data", str(folder), "--out", str(folder.with_name("run"))]
    return train.pretrain(*train.parse_args([*places, *size, *flags]))


def test_a_data_folder_is_trained_on_and_the_run_leaves_its_record(folder, tmp_path, capsys):
    scores, out = pretrain(folder), tmp_path / "run"
    names = "checkpoint.pt config.json curves.png metrics.jsonl result.json switches.gif".split()
    assert sorted(p.name for p in out.iterdir()) == [*names, "switches.png"]
    result = read_json(out / "result.json")
    assert result["batch"] == 8 and result["results"]["val"]["hard"] == scores
    assert any("R@1" in name for name in scores)
    said = capsys.readouterr().out
    assert "training without MRC" in said and scores["mrc"] == 0 and "16 pairs" in said
    evaluations, mixtures = metrics(out, "scores"), metrics(out, "mixture")
    for found in (*(e["switches"] for e in evaluations), *(m["mixture"] for m in mixtures)):
        assert np.allclose(np.sum(found["modes"], axis=-1), 1)
        assert [np.shape(d) for d in found["depths"]] == [(2, 1), (2, 2), (2, 3), (2, 4)]
    assert evaluations[-1]["scores"].items() <= scores.items() and scores["images"] == 5
    assert pretrain(folder, "--resume") == scores  # by the checkpoint's weights


def test_a_run_that_is_too_short_for_the_papers_rate_closes_its_switches_at_nine_tenths(capsys):
    """From 5 to .2 at a rate of 1e-6 takes ln 25 = 3.22 million pairs."""
    task = SimpleNamespace(initial_temperature=5.0, unit="pairs")

    def last_temperatures(batch, *flags):
        """At nine tenths, and a tenth earlier, of a run of 10,000 steps."""
        args = train.parse_args(["--data", "x", "--batch", str(batch), *flags])[0]
        rate = train.anneal_rate(args, task, 10_000)
        return [train.temperature(share * 10_000 * batch, rate=rate) for share in (0.8, 0.9)]

    short = [5 * 25 ** (-8 / 9), 0.2]
    assert last_temperatures(100) == pytest.approx(short)
    assert "its 1,000,000 pairs are fewer than the 3,218,876 of" in capsys.readouterr().out
    assert last_temperatures(330) == pytest.approx([5 * math.exp(-2.64), 5 * math.exp(-2.97)])
    assert last_temperatures(330, "--anneal", "0.9") == pytest.approx(short)
    assert not capsys.readouterr().out


def test_a_batch_is_cut_to_the_data(plain, capsys):
    task = plain("run", "--batch", 64, "--accum", 4)
    assert "--batch 64 is cut: there are only 50 training numbers" in capsys.readouterr().out
    assert [len({index for _, index in task.keys[k : k + 48]}) for k in (0, 48)] == [48, 48]
    assert len(task.keys) == 4 * 48


def test_a_run_starts_from_the_words_and_weights_of_another_that_fit(folder, capsys):
    """Here another one of three layers, and with other captions."""
    pretrain(folder)
    first = folder.with_name("run").rename(folder.with_name("first"))
    (folder / "a.tsv").write_text("".join(f"{i}\tan unknown cat\n" for i in range(40)))
    init = ["--init", str(first)]
    pretrain(folder, *init, "--epochs", "1", "--lr", "1e-12", "--set", "num_hidden_layers=3")
    said = capsys.readouterr().out
    assert f"started from {first}; new in this model: nothing; not used: 20 " in said
    one, two = (train.load_checkpoint(run, "pretraining") for run in (first, folder / "../run"))
    assert two["config"]["num_hidden_layers"] == 3 and two["vocab"] == one["vocab"]
    assert two["settings"]["set"] == ["num_hidden_layers=3"] and two["step"] == 2
    for name, weights in two["model"].items():
        torch.testing.assert_close(weights, one["model"][name])
    assert pretrain(folder, "--epochs", "1", "--lr", "1e-12", "--resume")["words"] >= 0
    with pytest.raises(BadInput, match="first: its layers have another size"):
        pretrain(folder, *init, "--set", "hidden_size=64")


def test_a_blind_run_sees_no_picture(folder, monkeypatch):
    monkeypatch.setattr(FeatureStore, "__getitem__", lambda *_: pytest.fail("a picture was read"))
    assert "R@" not in " ".join(pretrain(folder, "--blind"))


def test_held_out_images_are_in_no_training_pair(folder):
    """Without splits, one in a hundred of those with features: those with the smallest crc32."""
    missing = min(range(3000, 9999), key=lambda i: zlib.crc32(b"%d" % i))
    (folder / "b.tsv").write_text("".join(f"{i}\ta\n" for i in (*range(3000), *[missing] * 500)))
    store = write_store(folder.with_name("larger"), range(3000))
    training, held_out = train.split_captions(folder, store)
    assert not {i for i, _ in training} & {i for i, _ in held_out}
    assert len({i for i, _ in held_out}) == 30 and len(training) + len(held_out) == 3540
    assert str(missing) not in {i for i, _ in held_out}
    (folder / "c.json").write_text(json.dumps({"images": [
        {"filename": f"{n}.jpg", "split": split, "sentences": [{"raw": split}]}
        for n, split in enumerate(("test", "restval", "train", "val"))]}))
    training, held_out = train.split_captions(folder, store)
    assert list(held_out) == [("3", "val")]
    assert list(training[-2:]) == [("1", "restval"), ("2", "train")]
    assert "3" not in {i for i, _ in training}  # nor in another file


@pytest.mark.parametrize("other, image_id, message", [
    ("cc12m/00000/000000012.txt", None, "cc12m .*sbu both have a picture 12"),
    ("coco.tsv", "COCO_val2014_000000000012.jpg", "coco.tsv .*sbu both have a picture 12"),
    ("cc12m/00000/dog_1.txt", None, "cc12m .*sbu both have a picture dog_1"),
    ("coco.tsv", "dog_1", None), ("coco.tsv", "13", None)])
def test_two_data_sets_that_count_from_0_are_not_mixed(folder, other, image_id, message):
    """A table may caption the named pictures of a folder, and two tables those of any."""
    store = write_store(folder.with_name("larger"), [*range(40), "dog_1"])
    for name in ("sbu/00000/000000012", "sbu/00000/dog_1", other.removesuffix(".txt")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".tsv":
            path.write_text(f"{image_id}\ta ring\n")
        else:
            path.with_suffix(".txt").write_text("a ring")
            path.with_suffix(".json").write_text("{}")
    (folder / "a.tsv").write_text("".join(f"{i}\ta ring\n" for i in range(13, 40)))
    (folder / "b.tsv").write_text("14\tin another table\n")
    if message is None:
        assert len(train.split_captions(folder, store)[0]) > 1
    else:
        with pytest.raises(BadInput, match=message):
            train.split_captions(folder, store)


def test_every_file_of_a_data_folder_is_accounted_for(folder, capsys):
    """What is found of each, what is not read, and splits that are not used."""
    for name in ("00000.tar", "captions.csv", "._b.tsv", "images/3.jpg", "vqa/q.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "c.json").write_text(json.dumps({"images": [
        {"filename": f"{n}.jpg", "split": split, "sentences": [{"raw": split}]}
        for n, split in ((1, "train"), (2, "dev"), (3, "test"), (99, "test"), (98, "test"))]}))
    train.split_captions(folder, FeatureStore(folder / "features"))
    said = capsys.readouterr().out.replace(f"{folder}", "data")
    assert "data: no captions are read from 00000.tar, captions.csv, images, vqa\n" in said
    assert "data/a.tsv: captions: 40 of 40 found in data/features\n" in said
    assert "data/c.json: captions: 3 of 5 found in data/features\n" in said
    assert "data: 4 captions are not used: test, val beyond 1,000, or training captions" in said
    (folder / "d.tsv").write_text("dog_1\ta dog\n")
    with pytest.raises(BadInput, match="d.tsv: captions: 0 of 1 found in .*: 'dog_1' and '0'"):
        train.split_captions(folder, FeatureStore(folder / "features"))


def test_words_come_from_where_the_weights_come_from(folder, tmp_path):
    """Not from the captions, nor from another BERT."""
    for home, word in ((tmp_path / "mine", "mine"), (folder / "bert", "theirs")):
        home.mkdir()
        (home / "vocab.txt").write_text("\n".join([*SPECIALS, word]))
    assert train.load_data(folder, tmp_path / "mine").tokenizer.pieces[-1] == "mine"
    assert train.load_data(folder, folder / "bert").tokenizer.pieces[-1] == "theirs"
    (folder / "vocab.txt").write_text("\n".join([*SPECIALS, "mine"]))
    assert train.load_data(folder, tmp_path / "mine").tokenizer.pieces[-1] == "mine"
    with pytest.raises(BadInput, match="vocab.txt differs in .*bert and .*data; remove that of"):
        train.load_data(folder, folder / "bert")
    assert train.load_data(folder, folder / "bert", [*SPECIALS, "x"]).tokenizer.pieces[-1] == "x"
    (folder / "vocab.txt").unlink()
    with pytest.raises(BadInput, match="empty: expected vocab.txt, the words of its weights"):
        train.load_data(folder, tmp_path / "empty")


def test_a_run_starts_from_the_bert_of_its_folder_and_uses_its_words(folder, monkeypatch):
    words = [*SPECIALS, *(f"word{i}" for i in range(55))]
    write_bert(folder / "bert", bert_weights())
    (folder / "bert" / "vocab.txt").write_text("".join(w + "\n" for w in words))
    monkeypatch.setattr(
        train, "model_config", lambda *_: SwitchBertConfig.tiny(num_region_classes=0))
    args = train.parse_args(["--data", str(folder)])[0]
    found = train.load_data(folder, args.bert)
    assert list(found.tokenizer.pieces) == words
    expected = bert_weights()["bert.encoder.layer.1.intermediate.dense.weight"]
    assert train.Pretraining(args, found).model.bert.layers[1].intermediate.weight.equal(expected)


# --- Flags, checkpoints, pictures, and what is refused --------------------------------------------


@pytest.mark.parametrize("flags, settings", [
    ([], ("small", 4, 64, 0.001, 0.9)), (["--data", "x"], ("base", 10, 256, 1e-4, None)),
    (["--resume", "--out", "run"], ("small", 4, 12, 0.07, 0.9))])
def test_defaults_follow_the_data_or_the_resumed_run(plain, tmp_path, monkeypatch, flags, settings):
    plain("run", "--lr", 0.07)
    monkeypatch.chdir(tmp_path)
    args, _ = train.parse_args(flags)
    assert (args.model, args.epochs, args.batch, args.lr, args.anneal) == settings


@pytest.mark.parametrize("card, expected", [
    (None, ("fp32", 0, False)), ("P100", ("fp32", 4, True)), ("A100", ("bf16", 4, True))])
def test_defaults_follow_the_card_at_hand(monkeypatch, card, expected):
    """An old card only emulates bf16, which takes longer than fp32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
        lambda including_emulation=True: card == "A100" or card == "P100" and including_emulation)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for args in (train.parse_args([])[0], finetune.parse_args(["vqa"])[0]):
        assert (args.precision, args.workers, args.compile) == expected


def test_evaluation_and_ranking_compute_in_the_precision_of_training(
        data, monkeypatch):
    """Gradients do not: a backward pass inside of autocast would round those of the gates."""
    inside = []
    real, backward = torch.nn.functional.linear, torch.Tensor.backward
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: (
        inside.append(torch.is_autocast_enabled("cpu")) or real(*args)))
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: (
        inside.append(torch.is_autocast_enabled("cpu")) or backward(self)))
    for precision in ("fp32", "bf16"):
        args, lower = train.parse_args(["--precision", precision])[0], precision == "bf16"
        task = train.Pretraining(args, data)
        train.place(task.model, args)
        for evaluation in (lambda: task.evaluate(task.model), lambda: train.zero_shot(args, task)):
            inside.clear()
            evaluation()
            assert (True in inside) == lower
        inside.clear()
        ranker = SwitchBertForRetrieval.from_pretraining(task.model.config, task.model.state_dict())
        ranks = train.match_scores(train.place(ranker, args), data.store, data.tokenizer,
            ["a red ring", "a ring"], [*"0123456789"])
        assert len(ranks.unique()) == 20 and (ranks != ranks.bfloat16()).sum() > 15  # not rounded
        inside.clear()
        batch = task.collate([task.examples[0, i] for i in range(9)])
        train.forward_backward(SimpleNamespace(seed=0, accum=1), task, task.model, [batch], 0, 1.0)
        assert (inside[0], inside[-1]) == (lower, False)


@pytest.mark.parametrize("cuda, processes, where", [
    (False, 1, "mps"), (False, 2, "cpu"), (True, 1, "cuda"), (True, 2, "cuda")])
def test_several_processes_do_not_share_an_apple(monkeypatch, cuda, processes, where):
    """What they exchange, gloo cannot read from its GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator",
        lambda: torch.device("cuda" if cuda else "mps"))
    monkeypatch.setattr(train, "WORLD_SIZE", processes)
    assert train.device().type == where


@pytest.mark.parametrize("cuda, backend, card", [
    (False, "gloo", None), (True, "nccl", torch.device("cuda", 3))])
def test_processes_know_their_card_and_wait_for_hours(monkeypatch, tmp_path, cuda, backend, card):
    asked = Mock(side_effect=BadInput)
    monkeypatch.setattr(train.dist, "init_process_group", asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: chosen == card or pytest.fail())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(train, "WORLD_SIZE", 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(BadInput):
        train.launch(train.parse_args(["--out", str(tmp_path)])[0], None)
    (found,), more = asked.call_args
    assert (found, more["device_id"]) == (backend, card)
    assert more["timeout"].total_seconds() > 12 * 3600


def test_constants_are_not_sent_in_every_step(plain, monkeypatch):
    """Buffers, to the other processes; the flag has changed its name between versions of torch."""
    wrapped = []
    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    monkeypatch.setattr(train, "DistributedDataParallel", lambda m: wrapped.append(m) or m)
    plain("run")
    assert wrapped[0].broadcast_buffers is False
    assert isinstance(getattr(DistributedDataParallel, "broadcast_buffers", None), property) or (
        "self.broadcast_buffers = " in inspect.getsource(DistributedDataParallel))


@pytest.mark.slow
def test_layers_compile_to_one_graph_for_all_lengths_and_temperatures(config, inputs, monkeypatch):
    """And to one each for hard and soft evaluation. All but the compiler itself is torch's own."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model, compiled = (SwitchBert(replace(config, num_hidden_layers=6)) for _ in range(2))
    compiled.load_state_dict(model.state_dict())
    train.compile_layers(SimpleNamespace(bert=compiled))
    torch._dynamo.reset()  # of what other tests have compiled
    torch._dynamo.utils.counters.clear()
    graphs = torch._dynamo.utils.counters["stats"]

    def run(pairs, length, temperature):
        each = {name: torch.cat([t[:1]] * pairs) for name, t in inputs.items()}
        for name in ("input_ids", "text_mask"):
            each[name] = torch.cat([each[name]] * 8, dim=1)[:, :length]
        return [m(**each, temperature=temperature).pooled for m in (compiled, model)]

    for k, length in enumerate((12, 9, 38, 2, 17, 30)):
        run(8 + k, length, 5 - k / 7)[0].sum().backward()
    assert graphs["unique_graphs"] == 1
    model.eval(), compiled.eval()
    with torch.no_grad():
        for tau in (None, 0.2):
            for pairs, length in ((200, 38), (73, 5), (200, 21)):
                torch.testing.assert_close(*run(pairs, length, tau))
    assert graphs["unique_graphs"] == 3


@pytest.mark.parametrize("flags, change, message", [
    ("--resume", lambda whole: whole[:-100], "checkpoint.pt: not a whole checkpoint"),
    ("--resume", lambda whole: whole.replace(b"\0\0\x80?", b"\0\0\x81?"), "is damaged"),
    ("--resume", {"vocab": Path()}, "checkpoint.pt: not a whole checkpoint"),  # runs no code
    ("--resume", {"format": "switchbert-3"}, "its format is switchbert-3, not switchbert-4"),
    ("--resume --lr 0.5", {}, "--lr 0.5: the run that is resumed has 1e-12"),
    ("--accum 5", {}, "--batch 12: 50 numbers cannot be cut into equal parts for 1 processes x "),
    ("--batch 64 --accum 51", {}, "--batch 0: 50 numbers cannot be cut into equal parts")])
def test_damaged_checkpoints_and_wrong_flags_are_refused(plain, tmp_path, flags, change, message):
    plain("run", "--lr", 1e-12)  # so that the weight is still 1, and its bytes known
    path = tmp_path / "run/checkpoint.pt"
    if callable(change):
        path.write_bytes(change(path.read_bytes()))
    else:
        torch.save({**torch.load(path, weights_only=True), **change}, path)
    with pytest.raises(BadInput, match=message):
        plain("run", *flags.split())


@pytest.mark.parametrize("flags, change, message", [
    ("--switches both", None, "--switches both --set: not a model .*4 layers"),
    ("--set layers=6", None, "--set layers=6: not a model .*no attribute 'layers'"),
    ("--set hidden_size=100 num_attention_heads=8", None, "100 is not a multiple of .*heads=8"),
    ("--set hidden_size=0", None, "hidden_size=0: expected 1 or more"),
    ("--set hidden_size=wide", None, "invalid literal for int.* 'wide'"),
    ("--set hidden_dropout_prob=1.5", None, "hidden_dropout_prob=1.5: expected 0 to 1"),
    ("--set max_position_embeddings=20", None, "expected 38 or more"),
    ("--set vocab_size=9", None, "multiple values for keyword argument 'vocab_size'"),
    ("--bert nowhere", None, "nowhere: not a Hugging Face BERT"),
    ("", {"detector": "vg"}, "detector is 'made up', .* trained with 'vg'"),
    ("", {"num_region_classes": 8}, "classes is 7, .* with 8")])
def test_a_start_that_does_not_fit_is_refused(data, flags, change, message):
    checkpoint = None if change is None else {"store": data.store.meta | change}
    with pytest.raises(BadInput, match=message):
        train.Pretraining(train.parse_args(flags.split())[0], data, checkpoint)


def test_the_picture_shows_each_share_as_a_length_and_as_a_shade():
    """Text chooses 25 % own and 75 % both, vision always the other; text reads depth 0 in 20 %."""
    switches = {"modes": [[[1, 0, 0], [1, 0, 0]], [[0.25, 0, 0.75], [0, 1.0, 0]]],
        "depths": [[[1.0], [1.0]], [[0.2, 0.8], [1 - 1e-7, 1e-7]]]}
    pixels = np.asarray(train.switches_picture(switches, "title"))
    colours = [ImageColor.getrgb(colour) for colour in train.COLOURS[:3]]
    bars = np.stack([(pixels == colour).all(axis=2).sum(axis=1) for colour in colours], axis=1)
    starts = np.flatnonzero(np.diff(bars.sum(axis=1)) > 200) + 5  # of the four rows
    expected = np.array([[1, 0, 0], [0.25, 0, 0.75], [1, 0, 0], [0, 1, 0]])
    assert bars[starts] == pytest.approx(expected * train.BAR, abs=2)
    assert {(204, 204, 204), (51, 51, 51)} <= {*map(tuple, pixels.reshape(-1, 3).tolist())}


def test_pictures_are_stacked_in_rows_as_high_as_their_highest():
    """A row of a high and a low one, a row of a low one: no gap is left for a second high one."""
    red = Image.new("RGB", (5, 9), "red")
    blue = Image.new("RGB", (5, 4), "blue")
    pixels = np.asarray(train.stack([red, blue, blue], columns=2))
    assert pixels.shape == (13, 10, 3)
    assert pixels[8, 4].tolist() == [255, 0, 0] and pixels[8, 5].tolist() == [255] * 3
    assert pixels[3, 5].tolist() == pixels[9, 0].tolist() == [0, 0, 255]


def test_show_draws_the_end_of_a_run_and_the_start_of_a_finetuned_one(tmp_path):
    shares, heights = {"modes": [[[1, 0, 0], [0, 0, 1]]], "depths": [[[1.0], [1.0]]]}, []
    for steps in ((5, 10), (0, 15)):
        for step in steps:
            train.record(SimpleNamespace(out=tmp_path), step=step, temperature=1.0, mixture=shares,
                switches=shares)
        train.main(["show", str(tmp_path)])
        heights.append(Image.open(tmp_path / "switches.png").height)
    assert heights[1] == 2 * heights[0] and Image.open(tmp_path / "switches.gif").n_frames == 4
    (tmp_path / "metrics.jsonl").write_text("{}\n{\n{}\n")
    with pytest.raises(BadInput, match="metrics.jsonl: not the metrics.jsonl .*near line 2: "):
        train.main(["show", str(tmp_path)])


@pytest.fixture
def write_run(tmp_path):
    """write_run(name, *lines) -> a run's folder with these lines of metrics.jsonl."""
    switches = {"modes": [[[1, 0, 0], [0, 0, 1]]], "depths": [[[1.0], [1.0]]]}

    def write(name, *lines):
        folder = tmp_path / name
        folder.mkdir()
        for step, values in lines:
            train.record(SimpleNamespace(out=folder), step=step, switches=switches, **values)
        return folder

    return write


def drawn(picture, colour, panels=1):
    """(points, 2): x and y of a colour's pixels in the first of a row of panels.

    The frame of a panel is 144 pixels high, and 20 less wide than the panel.
    """
    width = picture.width // panels
    pixels = np.asarray(picture)[-200:, :width]
    found = (pixels == ImageColor.getrgb(colour)).all(axis=2)
    return np.argwhere(found[48:193, 10 : width - 9])[:, ::-1]


def test_curves_of_all_runs_share_their_axes(write_run):
    """One falls from 3 to 2 in steps 5 to 10, the other, of an older version, is at 1 after 20."""
    new = write_run("new", (5, {"losses": {"mlm": 3.0}}), (10, {"losses": {"mlm": 2.0}}))
    old = write_run("old", (20, {"losses": {"mlm": 1.0}}))
    picture = train.draw_curves([new, old])
    falling = drawn(picture, train.COLOURS[0])
    alone = drawn(picture, train.COLOURS[1])
    assert falling.min(axis=0) == pytest.approx([808 / 4, 0], abs=6)
    assert falling.max(axis=0) == pytest.approx([808 / 2, 72], abs=6)
    assert alone.min(axis=0) == pytest.approx([808, 144], abs=8)


def test_held_out_losses_are_drawn_thick_over_those_of_training(write_run):
    """Both are flat, at 1 and at 2: of 256 x 144 pixels, one line is near the top."""
    values = {"losses": {"mlm": 1.0}, "scores": {"mlm": 2.0}}
    curves = drawn(train.draw_curves([write_run("run", (0, values), (9, values))]),
        train.COLOURS[0])
    heights = [len({*curves[part, 1]}) for part in (curves[:, 1] < 72, curves[:, 1] > 72)]
    assert heights[0] > heights[1] > 0


def test_twelve_curves_are_drawn_losses_first_and_more_runs_than_colours(write_run):
    """Of VQA's 65 types of questions not all. Numbers of another kind are no curves."""
    scores = {f"type {number}": 0.5 for number in range(65)}
    runs = [write_run(f"{k}", (0, {"scores": scores}), (9, {"losses": {"loss": 9.0 - k},
        "scores": scores, "lr": 1e-3, "examples": 9})) for k in range(8)]
    picture = train.draw_curves(runs)
    assert picture.size == (train.WIDTH, 40 + 20 * 8 + 4 * 200)
    first_row = picture.crop((0, 0, picture.width, 40 + 20 * 8 + 200))
    heights = [drawn(first_row, colour, panels=3)[:, 1].max() for colour in train.COLOURS[1:7]]
    assert heights == sorted({*heights})  # a loss each, the higher the earlier


def test_show_prints_final_scores_with_recalls_and_legends_the_table_of_modes(
        write_run, capsys, monkeypatch):
    old = write_run("old", (5, {"scores": {"words": 0.25}}), (9, {"scores": {"words": 0.5}}))
    new = write_run("new", (9, {"scores": {"words": 0.75}}), (10, {"lr": 1.0}))
    test = write_run("test", (9, {"scores": {"accuracy": 0.125}}))
    write_json(new / "result.json",
        {"results": {"val": {"hard": {"words": 0.7, "image R@1": 0.875}}}})
    write_json(test / "result.json", {"results": {"test2015": {"hard": {}, "soft": {}}}})
    written = []
    canvas = train.canvas
    monkeypatch.setattr(train, "canvas", lambda width, height, title, names=(): (
        written.append((title, [*names])) or canvas(width, height, title, names)))
    monkeypatch.setattr(train, "MODES", ("intra", "inter", "joint", "summary"))
    train.main(["show", *map(str, (old, new, test))])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [[str(old), "words", "0.500"],
        [str(new), "words", "0.700", "image", "R@1", "0.875"], [str(test), "accuracy", "0.125"],
        [str(old / "switches.png")]]
    assert "lr: 1 to 1\nsteps 0 to 10" in dict.fromkeys(title for title, _ in written)
    names = [names for _, names in written if names]
    assert names == [["intra", "inter", "joint", "summary"]] * 3 + [[old, new, test]]
    assert Image.open(old / "curves.png").width == Image.open(old / "switches.png").width
