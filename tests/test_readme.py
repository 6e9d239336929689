"""The README and the code say the same."""

import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import finetune
import train
from data import caption_records
from extract_features import build_detector, read_boxes
from switchbert import SwitchBertConfig, SwitchBertForPretraining

parametrize = pytest.mark.parametrize
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {p.name: p.read_text(encoding="utf-8") for p in sorted(ROOT.glob("*.py"))}


# --- Commands ---


def commands(script, text):
    """The words behind `python SCRIPT` in each command of a text."""
    found = re.findall(rf"python {script}[^\n`#|)&;]*", text)
    return [line.removeprefix(f"python {script}").strip() for line in found]


def test_a_command_ends_where_its_line_comment_quotation_or_pipe_does():
    text = """Type `python train.py --seed 1` (or python train.py), then
        python train.py --gpus 2 | tee log    # two processes
        python finetune.py vqa && python train.py show runs/pretrain
    """
    assert commands("train.py", text) == ["--seed 1", "", "--gpus 2", "show runs/pretrain"]
    assert commands("finetune.py", text) == ["vqa"]


@parametrize("command", commands("train.py", README))
def test_train_understands_the_commands_of_the_readme(command):
    words = shlex.split(command)
    if words[:1] == ["show"]:
        assert len(words) > 1
    else:
        parse_without_resume(train, words)


@parametrize("command", commands("finetune.py", README))
def test_finetune_understands_the_commands_of_the_readme(command):
    parse_without_resume(finetune, shlex.split(command))


def parse_without_resume(script, words):
    """--resume looks for the run at once."""
    script.parse_args([word for word in words if word != "--resume"])


# --- Tables and pictures ---


TABLE = set(re.findall(r"^\| ([AD]\d+) \|", README, flags=re.M))
LENGTHS = dict(re.findall(r"^\| `(\w+\.py)` \| ([\d,]+) \|", README, flags=re.M))


def test_assumptions_and_deviations_of_table_and_code_are_the_same():
    code = "".join(SCRIPTS.values())
    tagged = re.findall(r"(?:ASSUMPTION|DEVIATION) ([AD]\d+)", code)
    assert set(tagged) == TABLE


@parametrize("name", SCRIPTS)
def test_ids_that_a_script_mentions_are_in_the_table(name):
    mentioned = re.findall(r"\b([AD]\d{1,2})\b", SCRIPTS[name])
    assert set(mentioned) <= TABLE


def test_the_table_of_files_has_every_script():
    assert sorted(LENGTHS) == list(SCRIPTS)


@parametrize("name", SCRIPTS)
def test_the_table_of_files_gives_the_length_of_a_script_within_a_tenth(name):
    told = int(LENGTHS[name].replace(",", ""))
    true = len(SCRIPTS[name].splitlines())
    assert told == pytest.approx(true, rel=0.1)


@parametrize("path", re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", README))
def test_pictures_of_the_readme_exist(path):
    if not path.startswith("https://"):
        assert path.startswith("assets/")
        assert (ROOT / path).is_file()


@parametrize("name", SCRIPTS)
def test_no_line_of_a_script_is_longer_than_100_characters(name):
    lines = enumerate(SCRIPTS[name].splitlines(), 1)
    assert [number for number, line in lines if len(line) > 100] == []


# --- The lines for a notebook ---


def test_the_lines_for_a_notebook_give_features_states_and_attention(
        tokenizer, tmp_path, monkeypatch):
    """With an untrained detector and model, in the places that the README names."""
    monkeypatch.chdir(tmp_path)
    Path("assets").symlink_to(ROOT / "assets")
    Path("runs/world").mkdir(parents=True)
    torch.save(build_detector("toy").state_dict(), "runs/world/detector.pt")
    config = SwitchBertConfig.tiny(vocab_size=len(tokenizer), region_feature_size=128)
    checkpoint = {
        "format": train.CHECKPOINT_FORMAT,
        "task": "pretraining",
        "labels": None,
        "config": asdict(config),
        "vocab": tokenizer.pieces,
        "model": SwitchBertForPretraining(config).state_dict(),
    }
    Path("runs/pretrain").mkdir()
    torch.save(checkpoint, "runs/pretrain/checkpoint.pt")

    snippets = re.findall("```python\n(.*?)```", README, flags=re.S)
    about_attention = [code for code in snippets if "attention.weights" in code]
    assert len(about_attention) == 1
    names = {}
    exec(about_attention[0], names)

    pieces = len(names["ids"])
    regions = len(names["features"])
    tokens = pieces + 1 + regions
    assert names["features"].shape == (regions, 128)
    assert names["score"].shape == (1,)
    assert names["out"].text_states.shape == (1, pieces, 16)
    assert names["out"].region_states.shape == (1, regions, 16)
    assert names["weights"].shape == (1, 2, tokens, tokens)


# --- The blocks to copy ---

# The name of a file, in backquotes, alone on its line, and the block below it.
BLOCKS = dict(re.findall(r"\n`([^`\n]+)`\n```(?:json|python)\n(.*?)```", README, flags=re.S))


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """copy(names): a folder with these blocks as files."""
    def write(*names):
        for name in names:
            (tmp_path / name).write_text(BLOCKS[name], encoding="utf-8")
        return tmp_path

    return write


def test_there_is_a_block_for_each_format():
    assert sorted(BLOCKS) == ["annotations.json", "boxes.json", "captions.json", "instances.json",
        "questions.json", "refs(unc).p", "splits.json"]


def test_the_blocks_of_captions_are_read(copy):
    folder = copy("captions.json", "splits.json")
    dog = ("dog", "a dog on a sofa", "train")
    assert list(caption_records(folder / "captions.json")) == [
        dog, ("cat", "a cat", "train"), ("cat", "a cat asleep in the sun", "train")]
    assert list(caption_records(folder / "splits.json")) == [dog, ("cat", "a cat", "test")]


def test_the_blocks_of_vqa_are_read(copy):
    (item,) = finetune.VQA.from_folder(copy("questions.json", "annotations.json"), None)["train"]
    assert item["image_id"] == "dog.jpg"
    assert item["text"] == "Where is the dog?"
    assert item["answers"] == ["sofa", "on a sofa"]


def test_the_blocks_of_referring_expressions_are_read(copy, monkeypatch):
    folder = copy("instances.json")
    monkeypatch.chdir(folder)
    exec(BLOCKS["refs(unc).p"], {})
    (item,) = finetune.Refer.from_folder(folder, None)["train"]
    assert item["text"] == "the brown dog"
    assert item["box"] == [10, 20, 210, 170]


def test_the_block_of_boxes_is_read(copy):
    boxes = read_boxes(copy("boxes.json") / "boxes.json")
    assert boxes["dog"].tolist() == [[10, 20, 210, 170], [5, 180, 305, 240]]
