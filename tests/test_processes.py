"""A run in several processes, or killed and resumed, is the run in one process that nothing
disturbed.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SMALL_RUN = Path(__file__).parent / "small_run.py"
PLAIN = [sys.executable, SMALL_RUN]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", SMALL_RUN]
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def start(store, tokenizer, tmp_path_factory):
    """start(out, *flags) begins a run of 15 steps of 6 pairs that evaluates and saves every 4."""
    vocab = tmp_path_factory.mktemp("v") / "vocab.txt"
    vocab.write_text("".join(p + "\n" for p in tokenizer.pieces), encoding="utf-8")

    def begin(out, *flags, program=PLAIN, task="train"):
        size = ["--batch", 6, "--epochs", 3, "--eval-every", 4, "--threads", 1, "--lr", 1]
        command = [*program, store.folder, vocab, *task.split(), "--out", out, *size, *flags]
        return subprocess.Popen([str(c) for c in command], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)

    return begin


def finish(process, status=0):
    out, err = process.communicate(timeout=100)
    assert process.returncode == status, err
    return out if status == 0 else err


def weights(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["model"]


def metrics(out, kind="losses"):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if kind in line]


def wait_for(path, text):
    deadline = time.time() + 60
    while not path.exists() or text not in path.read_text():
        assert time.time() < deadline
        time.sleep(0.01)


def assert_alike(out, expected):
    """The same run but for the order in which numbers were added up."""
    found, whole = weights(out), weights(expected)
    for name in whole:
        torch.testing.assert_close(found[name], whole[name], rtol=1e-3, atol=2e-4)
    one, two = metrics(out), metrics(expected)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-3)
        assert a["scores"]["itm"] == pytest.approx(b["scores"]["itm"], rel=1e-3)
    for a, b in zip(metrics(out, "mixture"), metrics(expected, "mixture")):
        for found, whole in zip(a["mixture"]["modes"], b["mixture"]["modes"]):
            assert found == [pytest.approx(shares, abs=1e-3) for shares in whole]


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(start(out, "--accum", 6))
    return out


@pytest.mark.parametrize("sign", [signal.SIGKILL,
    *(pytest.param(sign, marks=SLOW) for sign in (signal.SIGTERM, signal.SIGINT))])
def test_a_run_that_was_stopped_resumes_to_the_same_weights(start, undisturbed, tmp_path, sign):
    """Bit for bit. Killed where it stands; the other signals save first and exit with 0."""
    process = start(tmp_path / "run", "--accum", 6)
    wait_for(tmp_path / "run" / "metrics.jsonl", '{"step": 6')
    process.send_signal(sign)
    out, _ = process.communicate(timeout=60)
    if sign == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 0 and ("stopped after step" in out or "done" in out)
    said = finish(start(tmp_path / "run", "--accum", 6, "--resume"))
    assert ("resuming after step 4" in said) or sign != signal.SIGKILL
    expected, found = weights(undisturbed), weights(tmp_path / "run")
    assert all(found[k].equal(expected[k]) for k in expected)
    one, two = metrics(tmp_path / "run"), metrics(undisturbed)
    for key in ("step", "losses", "scores", "switches"):
        assert [line[key] for line in one] == [line[key] for line in two]


@pytest.mark.parametrize("program, flags", [
    (PLAIN, ["--gpus", 2]), pytest.param(TORCHRUN, [], marks=SLOW)])
def test_two_processes_train_like_one(start, undisturbed, tmp_path, program, flags):
    """Each takes three of the six parts of a batch; noise belongs to the part, not to the process.
    A gradient that were a mean of means would differ: parts have other numbers of masked places.
    """
    finish(start(tmp_path, "--accum", 3, *flags, program=program))
    assert_alike(tmp_path, undisturbed)


@SLOW
def test_a_run_of_two_processes_is_stopped_as_one_and_resumed_by_one(start, undisturbed, tmp_path):
    """--gpus 2 passes SIGTERM on, and both processes stop after the same step."""
    process = start(tmp_path, "--gpus", 2, "--accum", 3)
    wait_for(tmp_path / "metrics.jsonl", '{"step": 6')
    process.send_signal(signal.SIGTERM)
    assert "stopped after step" in finish(process)
    finish(start(tmp_path, "--accum", 6, "--resume"))
    assert_alike(tmp_path, undisturbed)


@SLOW
@pytest.mark.parametrize("task", ["train", "finetune vqa", "finetune retrieval", "finetune refer"])
def test_every_task_runs_blind_in_two_processes(start, undisturbed, tmp_path, task):
    """A parameter that no loss reaches would stop the second step."""
    flags = ["--checkpoint", undisturbed / "checkpoint.pt"] * (task != "train")
    assert "processes: 2" in finish(start(tmp_path, "--blind", "--gpus", 2, *flags, task=task))


@SLOW
def test_finetuning_in_two_processes_is_finetuning_in_one(start, undisturbed, tmp_path):
    flags = ["--checkpoint", undisturbed / "checkpoint.pt"]
    for name, processes in (("one", ["--accum", 2]), ("two", ["--gpus", 2])):
        finish(start(tmp_path / name, *flags, *processes, task="finetune retrieval"))
    one, two = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("one", "two"))
    assert one["results"] == two["results"]
    for name, weight in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], weight, rtol=1e-3, atol=2e-4)


@SLOW
def test_a_folder_holds_one_run_at_a_time(start, tmp_path):
    first = start(tmp_path, "--epochs", 1000)
    wait_for(tmp_path / "metrics.jsonl", '"step": 4,')
    error = finish(start(tmp_path), status=1)
    assert f"error: {tmp_path}: another run is at work there" in error
    first.terminate()
    assert "stopped after step" in finish(first)
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}-1"))


@SLOW
def test_the_error_of_one_process_ends_all_and_is_one_sentence(start, tmp_path):
    error = finish(start(tmp_path, "--gpus", 2, "--batch", 5), status=1)
    assert "error: --batch 5 cannot be cut into 2 processes x --accum 1 equal parts" in error
    assert "Traceback" not in error


def test_children_of_the_shell_are_not_taken_for_processes_of_the_run(tmp_path):
    """After `exec`, and as process 1 of a container, a program has children it did not start."""
    script = tmp_path / "script.py"
    script.write_text("import os, sys, time\n"
        f"sys.path.insert(0, {str(SMALL_RUN.parents[1])!r})\n"
        "from data import start_processes\n"
        "start_processes(2) if 'RANK' not in os.environ else time.sleep(1)\n"
        "print('done', flush=True)\n")
    command = f"sh -c 'exit 3' & sleep 0.1 & exec '{sys.executable}' '{script}'"
    found = subprocess.run(["sh", "-c", command], text=True, stdout=subprocess.PIPE, timeout=100)
    assert (found.returncode, found.stdout) == (0, 3 * "done\n")
