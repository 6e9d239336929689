"""BERT weights in every published form start the model as the BERT that they are."""

import json
import struct

import pytest
import torch
import torch.nn.functional as F

from switchbert import SwitchBert, SwitchBertConfig, SwitchBertForPretraining, load_bert

SIZES = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=32, max_position_embeddings=48, type_vocab_size=2)


def bert_weights():
    """A random BERT with Hugging Face's names, its MLM head, pooler and next-sentence head."""
    g, d, i = torch.Generator().manual_seed(5), 16, 32
    shapes = {"embeddings.word_embeddings": (60, d), "embeddings.position_embeddings": (48, d),
        "embeddings.token_type_embeddings": (2, d), "pooler.dense": (d, d)}
    norms = ["embeddings.LayerNorm"]
    for n in range(2):
        layer = f"encoder.layer.{n}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes[f"{layer}.attention.{part}"] = (d, d)
        shapes |= {f"{layer}.intermediate.dense": (i, d), f"{layer}.output.dense": (d, i)}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    weights = {}
    for name, shape in shapes.items():
        weights[f"bert.{name}.weight"] = torch.randn(shape, generator=g) / 4
        if "embeddings" not in name:
            weights[f"bert.{name}.bias"] = torch.randn(shape[0], generator=g) / 4
    for name in [*(f"bert.{n}" for n in norms), "cls.predictions.transform.LayerNorm"]:
        weights[f"{name}.weight"] = 1 + torch.randn(d, generator=g) / 4
        weights[f"{name}.bias"] = torch.randn(d, generator=g) / 4
    weights["cls.predictions.transform.dense.weight"] = torch.randn(d, d, generator=g) / 4
    weights["cls.predictions.transform.dense.bias"] = torch.randn(d, generator=g) / 4
    weights["cls.predictions.bias"] = torch.randn(60, generator=g)
    weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"]
    weights["cls.seq_relationship.weight"] = torch.randn(2, d, generator=g)
    return weights


def plain_bert(w, ids):
    """Text states and word scores of that BERT, computed from its names alone."""
    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(x, name):
        return F.layer_norm(x, (16,), w[name + ".weight"], w[name + ".bias"], 1e-12)

    e = "bert.embeddings."
    x = w[e + "word_embeddings.weight"][ids] + w[e + "position_embeddings.weight"][: len(ids)]
    x = norm(x + w[e + "token_type_embeddings.weight"][0], e + "LayerNorm")
    for n in range(2):
        layer = f"bert.encoder.layer.{n}."
        heads = []
        for h in (slice(0, 8), slice(8, 16)):
            q, k, v = (linear(x, f"{layer}attention.self.{p}")[:, h]
                       for p in ("query", "key", "value"))
            heads.append((q @ k.T / 8**0.5).softmax(-1) @ v)
        y = linear(torch.cat(heads, -1), layer + "attention.output.dense")
        x = norm(x + y, layer + "attention.output.LayerNorm")
        y = linear(F.gelu(linear(x, layer + "intermediate.dense")), layer + "output.dense")
        x = norm(x + y, layer + "output.LayerNorm")
    head = norm(F.gelu(linear(x, "cls.predictions.transform.dense")),
        "cls.predictions.transform.LayerNorm")
    return x, head @ w[e + "word_embeddings.weight"].T + w["cls.predictions.bias"]


def safetensors(weights):
    """The bytes of a .safetensors file: header length, JSON header, raw tensors."""
    types = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, t in weights.items():
        raw = t.contiguous().view(torch.uint8).numpy().tobytes() if t.ndim else b""
        header[name] = {"dtype": types[t.dtype], "shape": list(t.shape),
            "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def write_bert(folder, weights, kind="model.safetensors", **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SIZES, "hidden_act": "gelu", **config}))
    if kind == "model.safetensors":
        (folder / kind).write_bytes(safetensors(weights))
    else:
        torch.save(weights, folder / kind)
    return folder


def plain_names(w):
    return {k.removeprefix("bert."): v for k, v in w.items()}


def old_names(w):
    old = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    return {k.replace(*old[0]).replace(*old[1]): v for k, v in w.items()}


@pytest.fixture
def model():
    config = SwitchBertConfig.tiny(switches="intra", max_position_embeddings=40)
    return SwitchBertForPretraining(config).eval()


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("rename", [dict, plain_names, old_names])
def test_with_frozen_intra_switches_text_is_that_bert(model, tmp_path, inputs, kind, rename):
    weights = bert_weights()
    extra = {"bert.embeddings.position_ids": torch.arange(48)[None]}
    load_bert(model, write_bert(tmp_path / "bert", rename({**weights, **extra}), kind))
    states = model.bert(**inputs).text_states
    for b, length in enumerate((5, 3, 5)):
        expected, scores = plain_bert(weights, inputs["input_ids"][b, :length])
        torch.testing.assert_close(states[b, :length], expected, rtol=1e-4, atol=1e-5)
        found = model.mlm_logits(states[b, :length])
        torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_read(model, tmp_path, dtype):
    weights = {k: v.to(dtype) for k, v in bert_weights().items()}
    load_bert(model, write_bert(tmp_path / "bert", weights))
    expected = weights["bert.encoder.layer.1.output.dense.weight"].float()
    assert model.bert.layers[1].output.weight.equal(expected)


def test_what_was_not_found_and_not_used_is_named(tmp_path):
    folder = write_bert(tmp_path / "bert", bert_weights())
    missing, unexpected = load_bert(SwitchBertForPretraining(SwitchBertConfig.tiny()), folder)
    assert unexpected == ["bert.pooler.dense.weight", "bert.pooler.dense.bias",
        "cls.seq_relationship.weight"]
    new = ("region_embeddings", "gate", "bert.pooler", "mrc_", "itm_")
    assert missing and all(any(part in name for part in new) for name in missing)
    missing, unexpected = load_bert(SwitchBert(SwitchBertConfig.tiny()), folder)
    assert "cls.predictions.bias" in unexpected and "layers.0.attention.query.weight" not in missing


@pytest.mark.parametrize("change, message", [
    (dict(hidden_size=768), r"config.json: hidden_size is 768, but this model has 16"),
    (dict(num_hidden_layers=12), r"num_hidden_layers is 12, but this model has 2"),
    (dict(vocab_size=30522), r"vocab_size is 30522, but this model has 60"),
    (dict(hidden_act="relu"), r"hidden_act is 'relu'")])
def test_sizes_that_do_not_fit_are_refused_and_nothing_is_changed(model, tmp_path, change, message):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_bert(model, write_bert(tmp_path / "bert", bert_weights(), **change))
    weights = bert_weights()
    weights["bert.encoder.layer.1.output.dense.bias"] = torch.zeros(17)
    with pytest.raises(ValueError, match=r"layer.1.output.dense.bias has the shape \(17,\).*16"):
        load_bert(model, write_bert(tmp_path / "bert", weights))
    assert all(before[k].equal(v) for k, v in model.state_dict().items())


def test_damaged_safetensors_files_are_named(model, tmp_path):
    folder = write_bert(tmp_path / "bert", bert_weights())
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[:40], whole[:-4], b"\xff" * 100,
                    struct.pack("<Q", 5) + b"hello", struct.pack("<Q", 2) + b"[]" + whole,
                    whole.replace(b'"F32"', b'"F99"', 1),
                    whole.replace(b"[60, 16]", b"[61, 16]", 1)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors: (cut off|not a whole)"):
            load_bert(model, folder)
    path.unlink()
    with pytest.raises(ValueError, match="no model.safetensors or pytorch_model.bin here"):
        load_bert(model, folder)
    (folder / "pytorch_model.bin").write_bytes(b"hello")
    with pytest.raises(ValueError, match="pytorch_model.bin: not a whole PyTorch file"):
        load_bert(model, folder)
    with pytest.raises(ValueError, match="config.json: expected"):
        load_bert(model, tmp_path)
