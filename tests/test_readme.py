"""The README and the code say the same."""

import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import finetune
import train
from extract_features import build_detector
from switchbert import SwitchBertConfig, SwitchBertForPretraining

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {p.name: p.read_text(encoding="utf-8") for p in sorted(ROOT.glob("*.py"))}
TABLE = set(re.findall(r"^\| ([AD]\d+) \|", README, flags=re.M))
ROWS = re.findall(r"^\| `(\w+\.py)` \| ([\d,]+) \|", README, flags=re.M)


def test_assumptions_and_deviations_of_table_and_code_are_the_same():
    code = re.findall(r"(?:ASSUMPTION|DEVIATION) ([AD]\d+)", "".join(SCRIPTS.values()))
    assert TABLE == set(code)


@pytest.mark.parametrize("name", SCRIPTS)
def test_ids_that_a_script_mentions_are_in_the_table(name):
    assert set(re.findall(r"\b([AD]\d{1,2})\b", SCRIPTS[name])) <= TABLE


def test_the_table_of_files_has_every_script_and_its_length_within_a_tenth():
    assert sorted(name for name, _ in ROWS) == list(SCRIPTS)
    for name, lines in ROWS:
        true = len(SCRIPTS[name].splitlines())
        assert abs(int(lines.replace(",", "")) - true) <= true / 10, f"{name} has {true} lines"


@pytest.mark.parametrize("line", re.findall(r"python train\.py[^\n`#|)&;]*", README))
def test_commands_of_the_readme_are_understood(line):
    words = shlex.split(line)[2:]
    if words[:1] == ["show"]:
        assert len(words) > 1
    else:
        train.parse_args([word for word in words if word != "--resume"])


@pytest.mark.parametrize("line", re.findall(r"python finetune\.py[^\n`#|)&;]*", README))
def test_finetuning_commands_of_the_readme_are_understood(line):
    words = shlex.split(line)[2:]
    finetune.parse_args([word for word in words if word != "--resume"])


def test_the_lines_for_a_notebook_give_features_states_and_attention(
        tokenizer, tmp_path, monkeypatch):
    """On an untrained detector and model, in the places that the README names."""
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/world", "runs/pretrain"):
        Path(folder).mkdir(parents=True)
    Path("assets").symlink_to(ROOT / "assets")
    config = SwitchBertConfig.tiny(vocab_size=len(tokenizer), region_feature_size=128)
    torch.save(build_detector("toy").state_dict(), "runs/world/detector.pt")
    torch.save({"format": train.CHECKPOINT_FORMAT, "task": "pretraining", "labels": None,
        "config": asdict(config), "vocab": tokenizer.pieces,
        "model": SwitchBertForPretraining(config).state_dict()}, "runs/pretrain/checkpoint.pt")
    snippet, = (code for code in re.findall("```python\n(.*?)```", README, flags=re.S)
        if "attention.weights" in code)
    names = {}
    exec(snippet, names)
    length, regions = len(names["ids"]), len(names["features"])
    assert names["features"].shape == (regions, 128) and names["score"].shape == (1,)
    assert names["out"].text_states.shape == (1, length, 16)
    assert names["out"].region_states.shape == (1, regions, 16)
    assert names["weights"].shape == (1, 2, length + 1 + regions, length + 1 + regions)


@pytest.mark.parametrize("path", re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", README))
def test_pictures_of_the_readme_exist(path):
    assert path.startswith(("assets/", "https://")) and (":" in path or (ROOT / path).is_file())


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_line_of_a_script_is_longer_than_100_characters(name):
    long = [n for n, line in enumerate(SCRIPTS[name].splitlines(), 1) if len(line) > 100]
    assert long == []
