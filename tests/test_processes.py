"""A run in several processes, or killed and resumed, is the run in one process that nothing
disturbed.
"""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import metrics

import data
import finetune
import train

SMALL_RUN = Path(__file__).parent / "small_run.py"
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def start(store, tokenizer, tmp_path_factory):
    """start(out, *flags) begins a run of 15 steps of 6 pairs that evaluates and saves every 4, in a
    process group of its own; begin: what starts it.
    """
    vocab = tmp_path_factory.mktemp("v") / "vocab.txt"
    vocab.write_text("".join(p + "\n" for p in tokenizer.pieces), encoding="utf-8")

    def popen(command):
        return subprocess.Popen(command, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True)

    def start(out, *flags, task="train", begin=popen):
        size = ["--batch", 6, "--epochs", 3, "--eval-every", 4, "--threads", 1, "--lr", 1]
        words = [SMALL_RUN, store.folder, vocab, *task.split(), "--out", out, *size, *flags]
        return begin([sys.executable, *map(str, words)])

    return start


def finish(process, status=0):
    out, err = process.communicate(timeout=100)
    assert process.returncode == status, out + err
    assert status != 0 or err == ""  # such as warnings of torch
    return err if status == 1 else out


def weights(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["model"]


def wait_for(path, text):
    deadline = time.time() + 60
    while not path.exists() or text not in path.read_text():
        assert time.time() < deadline
        time.sleep(0.01)


def parents():
    """{process: its parent} of all that run, zombies excepted."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rsplit(")", 1)[1].split()[:2]
            if state != "Z":
                found[int(path.parent.name)] = int(parent)
    return found


def descendants(process):
    """The ids of a process's children, of theirs, and so on."""
    found, old = {process.pid}, parents()
    while new := {child for child, parent in old.items() if parent in found} - found:
        found |= new
    return found - {process.pid}


def wait_for_end(processes, seconds):
    deadline = time.time() + seconds
    while alive := parents().keys() & processes:
        assert time.time() < deadline, alive
        time.sleep(0.05)


def assert_alike(out, expected):
    """The same run but for the order in which numbers were added up."""
    torch.testing.assert_close(weights(out), weights(expected), rtol=1e-3, atol=2e-4)
    for a, b in zip(metrics(out, "scores"), metrics(expected, "scores"), strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-3)
        assert a["scores"]["itm"] == pytest.approx(b["scores"]["itm"], rel=1e-3)
    for a, b in zip(metrics(out, "mixture"), metrics(expected, "mixture"), strict=True):
        assert np.allclose(a["mixture"]["modes"], b["mixture"]["modes"], atol=1e-3)


@pytest.fixture(scope="module")
def begun(start, tmp_path_factory):
    """(a run that nothing will disturb, its folder): it has just begun."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    return start(out, "--accum", 6), out


@pytest.fixture(scope="module")
def undisturbed(begun):
    """The folder of that run, which has ended."""
    process, out = begun
    finish(process)
    return out


@pytest.mark.parametrize("sign", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=SLOW)])
def test_a_run_that_was_stopped_resumes_to_the_same_weights(
        start, begun, request, tmp_path, sign):
    """Bit for bit. Killed where it stands; Ctrl-C lets it save first."""
    process = start(tmp_path / "run", "--accum", 6)
    wait_for(tmp_path / "run" / "metrics.jsonl", '{"step": 6')
    process.send_signal(sign)
    finish(process, -9 if sign == signal.SIGKILL else 130)
    said = finish(start(tmp_path / "run", "--accum", 6, "--resume"))
    assert "resuming after step 4" in said or sign == signal.SIGINT
    undisturbed = request.getfixturevalue("undisturbed")
    torch.testing.assert_close(weights(tmp_path / "run"), weights(undisturbed), rtol=0, atol=0)
    assert metrics(tmp_path / "run", "scores") == metrics(undisturbed, "scores")


def test_two_processes_train_like_one(start, undisturbed, tmp_path):
    """Each takes three of the six parts of a batch; noise belongs to the part, not to the process.
    A gradient that were a mean of means would differ: parts have other numbers of masked places.
    """
    finish(start(tmp_path, "--accum", 3, "--gpus", 2))
    assert_alike(tmp_path, undisturbed)


@SLOW
def test_an_accelerator_trains_like_the_cpu(start, undisturbed, tmp_path, monkeypatch):
    """A real run on whatever GPU there is, in the precision that is its default."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("ON_ACCELERATOR", "yes")
    found = subprocess.run([sys.executable, "-c", "import torch; print(torch.accelerator."
        "current_accelerator() if torch.accelerator.is_available() else 'cpu')"],
        capture_output=True, text=True, check=True).stdout.strip()
    if found == "cpu":
        pytest.skip("this machine has no accelerator")
    assert f"on {found.split(':')[0]}" in finish(start(tmp_path, "--accum", 6))
    expected, *_ = metrics(undisturbed, "scores")
    on_gpu, *_ = metrics(tmp_path, "scores")
    assert on_gpu["losses"] == pytest.approx(expected["losses"], rel=0.2)


def one(process, sign):
    process.send_signal(sign)


def group(process, sign):
    os.killpg(process.pid, sign)


def rank(process, sign):
    """The second process of torchrun, which nobody else tells."""
    ranks = [child for child, parent in parents().items() if parent == process.pid]
    os.kill(max(ranks), sign)


TWO = ["--gpus", 2, "--accum", 3]


@pytest.mark.parametrize("whom, sign, flags", [
    (group, signal.SIGTERM, ["--workers", 1]), *(pytest.param(*case, marks=SLOW) for case in (
        (one, signal.SIGTERM, [*TWO, "--workers", 1]), (group, signal.SIGINT, ["--workers", 2]),
        (one, signal.SIGINT, ["--workers", 1]),
        (one, signal.SIGTERM, []), (group, signal.SIGINT, []), (group, signal.SIGTERM, TWO),
        (group, signal.SIGINT, [*TWO, "--workers", 1]), (one, signal.SIGTERM, TWO),
        (one, signal.SIGINT, TWO), (rank, signal.SIGTERM, [*TWO, "--workers", 1]),
        (rank, signal.SIGHUP, TWO)))])
def test_a_stop_saves_and_is_no_success(start, tmp_path, whom, sign, flags):
    """And leaves no process behind: loading ones are beyond the reach of signals to a group."""
    process = start(tmp_path, "--epochs", 2000, *flags)
    wait_for(tmp_path / "metrics.jsonl", '"step": 8,')
    children = descendants(process)
    whom(process, sign)
    said = finish(process, 130)
    step = int(re.search(r"stopped after step (\d+); --resume continues from here\n$", said)[1])
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == step
    wait_for_end(children, seconds=10)


@SLOW
@pytest.mark.parametrize("flags", [["--workers", 2], [*TWO, "--workers", 1]])
def test_what_a_kill_leaves_behind_ends_by_itself(start, tmp_path, flags):
    """Loading processes look for their training every five seconds; torchrun's save first."""
    process = start(tmp_path, "--epochs", 2000, *flags)
    wait_for(tmp_path / "metrics.jsonl", '"step": 8,')
    children = descendants(process)
    process.kill()
    said = finish(process, -9)
    assert "--gpus" not in flags or "stopped after step" in said
    wait_for_end(children, seconds=30)


@SLOW
@pytest.mark.parametrize("flags", [[], [*TWO, "--workers", 1]])
def test_a_run_outlives_its_terminal(start, tmp_path, flags):
    """The terminal closes: its shell ends, the run hears SIGHUP, and nothing can be printed."""
    def begin(command):
        pid, terminal = pty.fork()
        if pid == 0:
            os.execvp("sh", ["sh", "-c", '"$@" & wait', "sh", *command])
        return pid, terminal

    shell, terminal = start(tmp_path, "--accum", 6, *flags, begin=begin)
    wait_for(tmp_path / "metrics.jsonl", '"step": 1,')
    os.close(terminal)
    os.waitpid(shell, 0)
    deadline = time.time() + 60
    with contextlib.suppress(ProcessLookupError):
        while time.time() < deadline:
            os.killpg(shell, 0)
            time.sleep(0.05)
    assert [line["step"] for line in metrics(tmp_path, "scores")] == [4, 8, 12, 15]
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 15


@SLOW
def test_a_run_of_two_processes_is_stopped_as_one_and_resumed_by_one(start, undisturbed, tmp_path):
    """--gpus 2 passes SIGTERM on, and both processes stop after the same step."""
    process = start(tmp_path, "--gpus", 2, "--accum", 3)
    wait_for(tmp_path / "metrics.jsonl", '{"step": 6')
    process.send_signal(signal.SIGTERM)
    assert "stopped after step" in finish(process, 130)
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
    torch.testing.assert_close(
        weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-3, atol=2e-4)


@SLOW
def test_a_folder_holds_one_run_at_a_time(start, tmp_path):
    first = start(tmp_path, "--epochs", 1000)
    wait_for(tmp_path / "metrics.jsonl", '"step": 4,')
    error = finish(start(tmp_path), status=1)
    assert f"error: {tmp_path}: another run is at work there" in error
    first.terminate()
    finish(first, 130)


@SLOW
@pytest.mark.parametrize("batch, words", [(5, "--batch 5 cannot be cut into 2 processes"),
    (6, "Is a directory: .*checkpoint.pt")], ids=["of all", "of the first alone, while it trains"])
def test_the_error_of_one_process_ends_all_and_is_one_sentence(start, tmp_path, batch, words):
    (tmp_path / ".checkpoint.pt.tmp").mkdir()  # so that no checkpoint can be written
    error = finish(start(tmp_path, "--gpus", 2, "--batch", batch), status=1)
    assert re.search(f"^error: .*{words}.*\n$", error) and error.count("\n") == 1


@SLOW
@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_batches_do_not_depend_on_how_loading_processes_start(
        store, tokenizer, context, monkeypatch):
    """Of pretraining and of a task, whose data set is the task itself: its model stays behind."""
    args, _ = train.parse_args(["--batch", "6", "--accum", "2"])
    captions = [(str(i), f"a {word} ring") for i in range(10) for word in ("small", "red", "large")]
    items = [dict(image_id=i, text=text, box=(0, 0, 9, 9)) for i, text in captions]
    task = finetune.Refer(store, tokenizer, {"train": items}, args)
    task.model = threading.Lock()  # which cannot be pickled
    pairs = train.Pretraining(args, train.Data(store, captions, captions, tokenizer))
    here = {each: [*train.load_parts(args, each, 0, 3)] for each in (pairs, task)}
    args.workers = 1
    real = data.DataLoader
    monkeypatch.setattr(data, "DataLoader",
        lambda *given, **named: real(*given, **named | {"multiprocessing_context": context}))
    for each, batches in here.items():
        torch.testing.assert_close([*train.load_parts(args, each, 0, 3)], batches)
        assert len(batches) == 6
