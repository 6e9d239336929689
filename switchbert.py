r"""switchbert.py: a BERT whose layers learn how text and vision attend to each other
=================================================================================

Switch-BERT [Guo, Yao, Chu; ECCV 2022; arXiv 2306.14182]. In UNITER every layer attends over
words and image regions jointly; ViLBERT alternates layers that attend within a modality with
layers that attend across; LXMERT first has only layers within, and later alternates across and
within. In each, this path through the modes of attention is fixed by hand. In Switch-BERT every
layer learns its own step, separately for text and vision, and which earlier layer to read.

    input_ids (B, T)                        region_features (B, R, F), region_boxes (B, R, 5)
        | word + position + type                | prepend the mean region: the global region
        v                                       v linear(F) + linear(5)
    text (B, T, D)                          vision (B, 1+R, D)                           depth 0
        |                                       |
        v                                       v
    +-----------------------------------------------------------------+
    | Switch-Input       s_0 depth_0 + ... + s_l depth_l              |<-- s: which depth to read
    |                                                                 |
    | Switch-Attention   to its own modality, weighted g_intra+g_joint|<-- g: what to attend to
    |                    to the other one,    weighted g_inter+g_joint|
    | + residual, LayerNorm, feed-forward, residual, LayerNorm        |
    +-----------------------------------------------------------------+                  depth l+1
        |                   |                   |
    text_states (B, T, D)   global (B, D)   region_states (B, R, D)
        |          \         /                  |
       MLM     pool([CLS]) * pool(global)      MRC
                        | pooled (B, P)
                       ITM, VQA, retrieval                          referring reads region_states

    In every layer one gate gives s (not in layer 0, which has one depth to read), and one gives
    g. A gate feeds two switches, one for text and one for vision:

        mean text and vision state (B, 2D) --linear--> logits --Gumbel-softmax(tau)--> s, g

    The Layout holds what all layers share: each token's modality, the matrix that averages
    each modality, what each mode sees, and the bias that closes padding. It is computed once
    per forward pass and handed to every layer.

Letters: B batch, T word pieces, R regions, L = T + 1 + R tokens of both modalities, H heads,
D hidden, d = D / H head size, M options of a switch, l a layer's number from 0, P pooled, F
region feature, C region classes, V vocabulary, K the number of words, regions or pairs that a
loss predicts in a batch. Masks are 1 = real, 0 = padding, everywhere.

Keys are open or closed to a query. A switch is soft (a mixture of its options) or hard (one
of them: its weights are one-hot). In signatures, `modes` are the weights of the modes.

Map of the file (* = read these first)

    1. Configuration      sizes, and which switches are learned or frozen
    2. Switches         * Gumbel-softmax, its temperature, and the gate that feeds it
    3. Switch-Attention * three ways of attending in one softmax; the Layout
    4. Layers           * Switch-Input Block, BERT layer
    5. Embeddings         words, regions and the global region
    6. The encoder      * SwitchBert
    7. Heads and losses * pretraining (MLM, MRC, ITM), VQA, retrieval, referring expressions
    8. BERT weights       loading a Hugging Face folder

    config = SwitchBertConfig.base()                               # 12 layers x 768
    model = SwitchBertForPretraining(config)
    batch = class_targets(collate(examples), store)                # both of data.py
    out = model(**batch, temperature=temperature(pairs_seen))
    out.loss.backward()

[abstract] cites the paper's abstract; [supp. 1], [supp. 2] and [Fig. 1] cite its supplement.
Where these are silent the code says ASSUMPTION An; the README lists all of them. Here: A1 to
A8, A10 (how switches start) and A12 (boxes).
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Names and indices that code, metrics and pictures share.
MODALITIES = ("text", "vision")
TEXT, VISION = range(2)
MISMATCH, MATCH = range(2)  # classes of image-text matching; in ViLBERT and VOLTA 0 means match
# The modes of attention. A row says what a query sees (1) or not (0): the first token of its
# own modality, the rest of it, the first token of the other modality, and the rest of that.
# The first token is [CLS] or the global region. No mode here tells first and rest apart; one
# that you add, as a row, may do so.
#           own first, own rest, other first, other rest
MODES = {
    "intra": (1, 1, 0, 0),
    "inter": (0, 0, 1, 1),
    "joint": (1, 1, 1, 1),
}

# --- 1. Configuration -------------------------------------------------------------------
# Field names are those of Hugging Face's config.json for BERT. Modes form a path: two letters
# per layer, text first, each I (own modality, intra), X (across, inter) or J (both, joint). A
# path shorter than the model repeats. The value of `switches` is a path, or the name of one:

PATHS = {
    "learned": "II,XX",  # both switches are learned; modes start on this path (A10)
    "attention": "II,XX",  # only modes are learned; they start on this path, too
    "input": "JJ",  # only depths are learned
    "intra": "II",  # nothing is learned, here and below: two encoders that never meet
    "single": "JJ",  # UNITER, VisualBERT: one stream
    "dual": "II,XX",  # ViLBERT: within and across alternate
    "late": None,  # LXMERT: within in the first half, then across and within alternate
}
LETTERS = "IXJ"  # in the order of MODES


def path_of(switches, num_layers):
    """The path: [(mode of text, mode of vision)], one pair per layer.

    Where modes are learned, this is the path on which they start.

    >>> path_of("dual", 3), path_of("IJ,XX", 2)
    ([(0, 0), (1, 1), (0, 0)], [(0, 2), (1, 1)])
    """
    if switches == "late":
        path = ["II"] * (num_layers // 2) + ["XX", "II"] * num_layers
    else:
        path = PATHS.get(switches, switches).split(",") * num_layers
    return [tuple(map(LETTERS.index, letters)) for letters in path[:num_layers]]


@dataclass
class SwitchBertConfig:
    """Sizes and switches. The defaults are the paper's: BERT-base, Visual Genome regions."""

    vocab_size: int = 30522
    hidden_size: int = 768  # D
    num_hidden_layers: int = 12
    num_attention_heads: int = 12  # H
    intermediate_size: int = 3072
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2  # only type 0 is used: kept so that BERT's weights fit
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    region_feature_size: int = 2048  # F
    num_region_classes: int = 1601  # C, with background as class 0; 0: no MRC head
    pooler_size: int = 1024  # P, as in VOLTA (A7)
    switches: str = "learned"  # or "attention", "input"; or frozen: "single", "II,XX", ...

    def __post_init__(self):
        # In a model of N layers: [IXJ]{2}(,[IXJ]{2}){0,N-1}
        pair = f"[{LETTERS}]{{2}}"
        path = f"{pair}(,{pair}){{0,{self.num_hidden_layers - 1}}}"
        if self.switches not in PATHS and not re.fullmatch(path, self.switches):
            raise ValueError(f"switches={self.switches!r}: expected one of "
                f"{', '.join(PATHS)}, or two letters of {', '.join(LETTERS)} for each of at "
                f"most {self.num_hidden_layers} layers, as in II,XX")
        for name, value in vars(self).items():
            least = {"num_region_classes": 0, "max_position_embeddings": 38}.get(name, 1)
            if isinstance(value, int) and value < least:  # 38: the longest text [supp. 2]
                raise ValueError(f"{name}={value}: expected {least} or more")
            if "dropout" in name and not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: expected 0 to 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}")

    @classmethod
    def base(cls, **changes):
        """The paper's size: 12 layers x 768, 12 heads, region features of 2,048 numbers."""
        return cls(**changes)

    @classmethod
    def tiny(cls, **changes):
        """A few thousand parameters, for tests."""
        small = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=40, region_feature_size=12,
            num_region_classes=7, pooler_size=16)
        return cls(**(small | changes))


# --- 2. Switches ------------------------------------------------------------------------
# A switch turns a gate's logits into weights that sum to 1. In training it is soft, so that
# every option gets a gradient, and noisy. As the temperature falls, each draw becomes nearly
# one-hot.
#
# The gradient comes from the loss of the task: through the bias of attention scores (section 3)
# for modes, through the mixture (section 4) for depths. At the logit of an option of weight g it
# is proportional to g (1 - g). So a gate learns little while one option outweighs the others, and
# most from samples in which noise brings two options near a tie.

FINAL_TEMPERATURE = 0.2  # [supp. 2]


def temperature(pairs_seen, initial=5.0, rate=1e-6):
    """The Gumbel-softmax's temperature after n = pairs_seen: max(.2, initial e^(-rate n)).

        pairs_seen   0      100,000   1,000,000   3,000,000   3,218,876 and later
        temperature  5.000  4.524     1.839       0.249       0.200

    ASSUMPTION A5: the paper's anneal_rate 1e-6 [supp. 2] counts training pairs, not optimiser
    steps. The floor is then reached at n = ln(initial / .2) / rate = 3.22 million, one
    epoch of Conceptual Captions (3.3 million). Ten epochs at batch 256 are 130,000 *steps*:
    counted in steps, training would end at 4.4, where one logit more is still worth a factor
    of only e^(1 / 4.4) = 1.26. A run with fewer pairs takes a faster rate: see train.py.
    """
    return max(FINAL_TEMPERATURE, initial * math.exp(-rate * pairs_seen))


def switch(logits, temperature, training, start=0.0):
    """Turn gate logits (..., M) into weights (..., M) that sum to 1.

    temperature None: hard, the best option is one-hot. A number: soft, the mixture
    softmax(logits / temperature); in training with noise, the Gumbel-softmax [Jang et al. 2017].
    If all G_j are independent Gumbel(0, 1), then
        P(argmax_j (logits_j + G_j) = k) = softmax(logits)_k,
    so the arg max would sample the switch exactly, but it has no gradient; a softmax at a
    temperature has. start (M,): log odds that are added to the logits, but are not made smaller
    by temperatures above 1 (see HEAD_START). Logits (2, 1, 0) without noise:

    >>> for tau in (5.0, 1.0, 0.2):
    ...     print(tau, switch(torch.tensor([2.0, 1.0, 0.0]), tau, training=False))
    5.0 tensor([0.4018, 0.3289, 0.2693])
    1.0 tensor([0.6652, 0.2447, 0.0900])
    0.2 tensor([9.9326e-01, 6.6925e-03, 4.5094e-05])
    >>> switch(torch.tensor([2.0, 1.0, 0.0]), None, training=False)
    tensor([1., 0., 0.])
    """
    if temperature is None:
        best = (logits + start).argmax(dim=-1)
        return F.one_hot(best, logits.shape[-1]).to(logits.dtype)
    if training:
        # -log(E) of an exponential variable E is Gumbel(0, 1):
        # P(-log(E) < x) = P(E > e^-x) = exp(-e^-x). On Apple's GPUs a draw can be 0.
        draws = torch.empty_like(logits).exponential_().clamp(min=1e-30)
        logits = logits - draws.log()
    log_odds = logits / temperature + start / min(temperature, 1)
    return torch.softmax(log_odds, dim=-1)


# ASSUMPTION A10: one option of each switch starts ahead. It is the newest depth, or the mode of
# ViLBERT's path, in which layers within a modality and layers across alternate. Its odds are high
# against all other options together. So training begins with a network that is known to work, and
# departs from it where that pays. If all options start with equal odds, nearly every layer learns
# joint attention. Joint attention is probably a local optimum: it can imitate the other modes, and
# a single layer that leaves it loses sight of one modality. The alternation predicts masked words
# better, but to reach it, several layers must change at once.
#
# The temperature divides logits and noise always, but the start only below 1. So at a high
# temperature a switch hardly feels logits and noise, and takes the option that is ahead: training
# does not begin with an average of all options. Below 1, logits, noise and start are divided
# alike. So for given logits and noise, a lower temperature makes the choice sharper and never
# another one: the option with the largest sum stays the same. (If the start were never divided, a
# sum at .2 would be (z + G) / .2 + 5 = (z + G + 1) / .2: the start would count as one logit, and
# noise, whose standard deviation is 1.3, would decide.)
#
# The odds of the start are e^5 = 148 to 1 in a model of four layers, and in one of N layers N / 4
# times as high. So with four layers, from temperature 1 down to the end, noise overrules an
# untrained switch in one of 149 training samples. Four layers have 14 switches: for text and for
# vision, one for modes in each of the 4 layers, and one for depths in each but the first. With any
# number of layers, about a tenth of the samples then leave the starting path somewhere. (With 148
# to 1 in twelve layers more than a quarter did, and retrieval suffered. What was tried, and what
# it gave: tests/ABLATION.md.)
HEAD_START = 5.0


def full_precision(states):
    """A context in which autocast, if it is on, does not round products to bf16."""
    return torch.autocast(states.device.type, enabled=False)


class Gate(nn.Module):
    """A linear layer on the mean states of both modalities, and the two switches that it feeds.

    ASSUMPTION A3: it reads both means, and decides per sample, for text and vision separately.
    forward(states (B, L, D), averages (B, 2, L) of the Layout, temperature) -> weights
    (B, 2, M) of M options, in rows TEXT and VISION. ahead: the option that starts ahead.
    """

    def __init__(self, config, num_options, ahead):
        super().__init__()
        self.linear = nn.Linear(2 * config.hidden_size, 2 * num_options)
        # The M - 1 other options weigh e^0 = 1 each. For odds of e^5 N / 4 to 1 against all of
        # them, this one must weigh (M - 1) e^5 N / 4 = e^(5 + log((M - 1) N / 4)).
        factor = (num_options - 1) * config.num_hidden_layers / 4
        start = torch.zeros(num_options)  # (M,)
        start[ahead] = HEAD_START + math.log(factor)
        self.register_buffer("start", start, persistent=False)

    def forward(self, states, averages, temperature):
        with full_precision(states):  # gates are tiny and steer everything
            means = averages @ states.float()  # (B, 2, D)
            logits = self.linear(means.flatten(1))  # (B, 2M)
            logits = logits.unflatten(-1, (2, -1))  # (B, 2, M)
        return switch(logits, temperature, self.training, self.start)


# --- 3. Switch-Attention ----------------------------------------------------------------
# Attention gives a query a distribution over keys. ASSUMPTION A1: every layer chooses among
# three modes, separately for text and vision queries. They are the rows of MODES:
#
#     intra   the query's own modality       inter   the other one       joint   all tokens
#
# A switch g = (g_intra, g_inter, g_joint) says how open a key is to a query. It adds up the
# modes that let the query see it:
#
#     open(q, k)  =  sum over modes m of  g_m [mode m lets q see k]
#
#                    text key              vision key
#     text query     g_intra + g_joint     g_inter + g_joint
#     vision query   g_inter + g_joint     g_intra + g_joint
#
# Padding is closed. ASSUMPTION A2: the modes share queries, keys, values and one softmax over
# all keys, in which a key counts as much as it is open. With score(q, k) = q . k / sqrt(d),
#
#     weight of key k for query q  =  open(q, k) e^score(q, k) / sum over all k' of the same
#
# A hard switch makes `open` 1 or 0: exactly the attention of its mode. An even switch makes
# it 2/3 everywhere, which cancels: joint attention. (Mixing three softmaxes by g instead was
# measured, and is no better.)
#
# Because open e^score = e^(score + log open), a factor on a weight is a bias on its score. So
# this is plain attention with a bias, for which torch has one fused operation. The bias has
# eight values per sample: one for each modality of a query and each group of a key, which is
# [CLS], the other words, the global region, or the other regions. (In the three modes here the
# first token and the rest are alike. A mode that you add may tell them apart.) The Layout
# spreads them over the L x L pairs of tokens.

# The bias of a closed key. A score that is added to it vanishes, in float32 and in bf16, so
# the key has weight 0, however high its score, as long as another key is open. One always is:
# every mode sees [CLS] or the global region, and these are never padding. It is not -inf, which
# turns into NaN where it meets a 0 in a product, and not the lowest float32, which bf16 rounds to
# -inf.
CLOSED = -1e30


def sees_of(table):
    """What text and vision queries see in each mode: (2, M, 4), a key's group last.

    table: a dict like MODES, whose rows begin with the query's own modality. So for vision, whose
    own groups are the last two, the halves of a row change places.
    """
    for_text = torch.tensor([*table.values()], dtype=torch.float32)  # (M, 4)
    for_vision = for_text.roll(2, dims=1)
    return torch.stack([for_text, for_vision])  # (2, M, 4)


SEES = sees_of(MODES)


class Layout(NamedTuple):
    """What every layer needs to know of the sequence [text | vision]: the kinds of its tokens,
    its padding, and what each mode lets a query see.
    """

    modality: Tensor  # (L, 2): of each token, TEXT or VISION, one-hot
    group: Tensor  # (L, 4): of each token, [CLS], word, global region or region, one-hot
    averages: Tensor  # (B, 2, L): rows that average the real tokens of TEXT and of VISION
    padding: Tensor  # (B, 1, L): 0 for a real key, CLOSED for padding
    sees: Tensor  # (2, M, 4): see sees_of


def layout_of(mask, num_text, sees=SEES):
    """The Layout of a mask (B, L), 1 = real, whose first num_text tokens are text."""
    position = torch.arange(mask.shape[1], device=mask.device)  # (L,)
    is_vision = (position >= num_text).long()
    is_rest = (position != 0) & (position != num_text)  # not [CLS], not the global region
    modality = F.one_hot(is_vision, 2).float()  # (L, 2)
    # 0 [CLS], 1 word, 2 global region, 3 region
    group = F.one_hot(2 * is_vision + is_rest, 4).float()  # (L, 4)
    averages = averaging(modality.T * mask[:, None])  # (B, 2, L)
    padding = CLOSED * (mask[:, None] == 0)  # (B, 1, L)
    return Layout(modality, group, averages, padding, sees)


def averaging(mask):
    """Rows that average the real tokens of a mask: (..., L) -> (..., L); zeros if none is real.

    >>> averaging(torch.tensor([[1, 1, 0], [0, 0, 0]]))
    tensor([[0.5000, 0.5000, 0.0000],
            [0.0000, 0.0000, 0.0000]])
    """
    return mask / mask.sum(dim=-1, keepdim=True).clamp(min=1)


def open_to(modes, layout):
    """How open a key of each group is to text and vision queries: (B, 2, M) -> (B, 2, 4).

    >>> layout = layout_of(torch.ones(1, 2), num_text=1)
    >>> open_to(torch.tensor([[[0.2, 0.5, 0.3], [0.0, 0.0, 1.0]]]), layout)  # vision is joint
    tensor([[[0.5000, 0.5000, 0.8000, 0.8000],
             [1.0000, 1.0000, 1.0000, 1.0000]]])
    """
    seen = modes.unsqueeze(-1) * layout.sees  # (B, 2, M, 1) x (2, M, 4)
    return seen.sum(dim=2)  # over modes


def switch_bias(modes, layout):
    """log open(q, k) of all pairs of tokens, CLOSED where it is 0: (B, 2, M) -> (B, L, L)"""
    opened = open_to(modes, layout)  # (B, 2, 4)
    # masked_fill replaces the logarithm of a 0, and gives it the gradient 0. The clamp keeps the
    # slope of that logarithm finite: 0 times an infinite slope would be a gradient of NaN.
    logarithm = opened.clamp(min=1e-18).log()
    bias = logarithm.masked_fill(opened == 0, CLOSED)  # (B, 2, 4)
    with full_precision(modes):
        spread = layout.modality @ bias @ layout.group.T  # (L, 2) (B, 2, 4) (4, L)
        return spread + layout.padding  # (B, L, L)


def switch_attention(query, key, value, modes, layout, dropout=0.0):
    """Attention of every token, each modality in its own modes: (B, H, L, d). [abstract]

    query, key, value (B, H, L, d); modes (B, 2, M), rows TEXT and VISION, columns as MODES;
    dropout: the share of attention weights that is dropped.

    One text and one vision token with equal scores and the values 1 and 0. The text token's
    switch is that of open_to's example: .5 e^0 / (.5 e^0 + .8 e^0) = .3846. The vision token
    attends jointly: .5.
    >>> layout = layout_of(torch.ones(1, 2), num_text=1)
    >>> modes = torch.tensor([[[0.2, 0.5, 0.3], [0.0, 0.0, 1.0]]])
    >>> query = key = torch.zeros(1, 1, 2, 1)
    >>> value = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)
    >>> switch_attention(query, key, value, modes, layout).flatten()
    tensor([0.3846, 0.5000])
    """
    bias = switch_bias(modes, layout).unsqueeze(1)  # (B, 1, L, L): the same for all heads
    bias = bias.to(query.dtype)  # as the fused operation wants it
    return F.scaled_dot_product_attention(query, key, value, bias, dropout)


def attention_weights(query, key, modes, layout):
    """The definition: the weights (B, H, L, L) by which switch_attention averages values.

    For tests and pictures. The fused operation computes the same, but does not keep them.
    """
    head_size = query.shape[-1]
    scores = query @ key.mT / math.sqrt(head_size)  # (B, H, L, L)
    bias = switch_bias(modes, layout).unsqueeze(1)  # (B, 1, L, L)
    return (scores + bias).softmax(dim=-1)


class SwitchAttention(nn.Module):
    """Multi-head switch-attention. ASSUMPTION A6: modalities share its weights (UNITER)."""

    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self.dropout = config.attention_probs_dropout_prob
        self.keep_weights = False  # True, for pictures: forward leaves them in .weights
        self.dense = nn.Linear(size, size)

    def heads(self, projected):
        """(B, L, D) -> (B, H, L, d)"""
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, states, modes, layout):
        """states (B, L, D), modes (B, 2, M) -> (B, L, D)"""
        query = self.heads(self.query(states))
        key = self.heads(self.key(states))
        value = self.heads(self.value(states))
        dropout = self.dropout * self.training
        context = switch_attention(query, key, value, modes, layout, dropout)  # (B, H, L, d)
        if self.keep_weights:
            self.weights = attention_weights(query, key, modes, layout)  # (B, H, L, L)
        return self.dense(context.transpose(1, 2).flatten(2))  # (B, L, D)


# --- 4. Layers --------------------------------------------------------------------------
# A layer first decides which depths to read (Switch-Input), then how to attend
# (Switch-Attention). The gate for depths reads the newest depth; the gate for modes reads what
# Switch-Input returns, the mixture of depths.


def layer_norm(config):
    """A LayerNorm over states (..., D)."""
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


def mixture(shares, *depths):
    """Each token's own weighted sum of depths: sum over i of shares[..., i] depths[i].

    shares (B, L, l+1), l+1 depths (B, L, D) -> (B, L, D), as one batched matrix product.
    """
    stack = torch.stack(depths, dim=2)  # (B, L, l+1, D)
    return (shares.unsqueeze(2) @ stack).squeeze(2)  # (B, L, 1, l+1) x (B, L, l+1, D)


class SwitchInput(nn.Module):
    """Switch-Input Block before layer l > 0: each modality picks among depths 0..l. [supp. 1]
    ASSUMPTION A4: the input is a mixture of the outputs of all depths, by its own gate.
    """

    def __init__(self, config, layer):
        super().__init__()
        self.gate = Gate(config, layer + 1, ahead=layer)

    def forward(self, depths, layout, temperature):
        """l+1 states (B, L, D) -> their mixture (B, L, D), and its weights (B, 2, l+1)."""
        newest = depths[-1]
        weights = self.gate(newest, layout.averages, temperature)  # (B, 2, l+1)
        with full_precision(newest):
            shares = layout.modality @ weights  # (B, L, l+1): each token, as its modality
        # The backward pass needs the stack of depths again. Keeping the stacks of all twelve
        # layers, with the copies that the product makes, took 15 MB per sample, beside 64 MB for
        # everything else. So `checkpoint` keeps none and stacks anew. Nothing in `mixture` is
        # random, so no random state is kept.
        mixed = checkpoint(mixture, shares.to(newest.dtype), *depths, use_reentrant=False,
            preserve_rng_state=False)
        return mixed, weights


class SwitchBertLayer(nn.Module):
    """A post-LayerNorm BERT layer with Switch-Attention, and Switch-Input in front of it.
    A switch that is not learned is constant: the newest depth, the modes of path_of.
    """

    def __init__(self, config, layer):
        super().__init__()
        learns_depths = config.switches in ("learned", "input") and layer > 0
        learns_modes = config.switches in ("learned", "attention")
        self.switch_input = SwitchInput(config, layer) if learns_depths else None
        path = path_of(config.switches, config.num_hidden_layers)[layer]  # (text, vision)
        # On the starting path, text and vision have the same mode.
        self.mode_gate = Gate(config, len(MODES), ahead=path[0]) if learns_modes else None
        constant = F.one_hot(torch.tensor(path), len(MODES)).float()  # (2, M)
        self.register_buffer("constant_modes", constant, persistent=False)
        self.attention = SwitchAttention(config)
        self.attention_norm = layer_norm(config)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_norm = layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, depths, layout, temperature):
        """The states (B, L, D) of depths 0..l, the newest last -> those of depth l+1, the
        modes (B, 2, M) and the weights of the depths (B, 2, l+1).
        """
        if self.switch_input:
            states, depth_weights = self.switch_input(depths, layout, temperature)
        else:
            states = depths[-1]
            depth_weights = torch.zeros(len(states), 2, len(depths), device=states.device)
            depth_weights[..., -1] = 1
        states, modes = self.block(states, layout, temperature)
        return states, modes, depth_weights

    def block(self, states, layout, temperature):
        """All that follows Switch-Input: (B, L, D) -> (B, L, D), modes (B, 2, M). `train.py
        --compile` compiles it.
        """
        if self.mode_gate:
            modes = self.mode_gate(states, layout.averages, temperature)
        else:
            modes = self.constant_modes.expand(len(states), -1, -1)
        attended = self.attention(states, modes, layout)
        states = self.attention_norm(states + self.dropout(attended))
        processed = self.output(F.gelu(self.intermediate(states)))
        return self.output_norm(states + self.dropout(processed)), modes


# --- 5. Embeddings ----------------------------------------------------------------------
# Depth 0. A word is embedded by its id and position, a region by its feature and box.


class TextEmbeddings(nn.Module):
    """BERT's: word + position + type 0, LayerNorm, dropout. input_ids (B, T) -> (B, T, D)"""

    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids):
        positions = self.position_embeddings.weight[: input_ids.shape[1]]  # (T, D)
        states = self.word_embeddings(input_ids) + positions + self.token_type_embeddings.weight[0]
        return self.dropout(self.norm(states))


class RegionEmbeddings(nn.Module):
    """linear(feature) + linear(box), LayerNorm, dropout, with the global region in front (A7).

    ASSUMPTION A12: both parts are normalised before they are added, as in UNITER, and boxes
    enter as 2 b - 1. Otherwise the box layer, with 5 inputs, would start with outputs whose norm
    is a fifteenth of the feature layer's and that hardly differ between regions: on the toy
    world the model learned nothing about boxes. Inputs as SwitchBert's; returns (B, 1+R, D).
    """

    def __init__(self, config):
        super().__init__()
        self.feature = nn.Linear(config.region_feature_size, config.hidden_size)
        self.box = nn.Linear(5, config.hidden_size)
        self.feature_norm = layer_norm(config)
        self.box_norm = layer_norm(config)
        self.norm = layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, region_features, region_boxes, region_mask, region_hidden=None):
        features = region_features.float()  # stores hold float16
        visible = region_mask  # (B, R)
        if region_hidden is not None:
            features = features.masked_fill(region_hidden[..., None], 0)
            visible = region_mask * ~region_hidden
        # The global region is a mean, as in VOLTA, but only of the visible regions (A7). Hidden
        # features must not leak into it, so they are already 0. They are left out of the count,
        # too: otherwise they would shrink the mean.
        mean = averaging(visible)[:, None] @ features  # (B, 1, F)
        features = torch.cat([mean, features], dim=1)  # (B, 1+R, F)
        # One row of ones in front, then x1 = y1 = 0: 0, 0, 1, 1, 1 is the whole picture's box.
        boxes = F.pad(region_boxes, (0, 0, 1, 0), value=1)  # (B, 1+R, 5)
        boxes[:, 0, :2] = 0
        # Pitfall: of a hidden region, `feature` returns its bias alone, which starts at 0. There
        # the slope of LayerNorm is 1e6. So at first the gradient of this bias outweighs all others,
        # and clipping shrinks them, for 60 of the toy run's 900 steps. AdamW evens most of that
        # out, and another start of the bias was no better (tests/ABLATION.md).
        content = self.feature_norm(self.feature(features))  # (B, 1+R, D)
        position = self.box_norm(self.box(2 * boxes - 1))
        return self.dropout(self.norm(content + position))  # (B, 1+R, D)


class Pooler(nn.Module):
    """pool([CLS]) * pool(global region) -> (B, P): a linear layer with ReLU each (A7: VOLTA's)."""

    def __init__(self, config):
        super().__init__()
        self.text = nn.Linear(config.hidden_size, config.pooler_size)
        self.vision = nn.Linear(config.hidden_size, config.pooler_size)

    def forward(self, cls_state, global_state):
        text = F.relu(self.text(cls_state))  # (B, P)
        vision = F.relu(self.vision(global_state))
        return text * vision


# --- 6. The encoder ---------------------------------------------------------------------
# Text and vision become one sequence [text | global region | regions]. The states before each
# layer are appended to the list of depths that it and the layers above may read.


@dataclass
class SwitchBertOutput:
    """What the encoder returns."""

    text_states: Tensor  # (B, T, D)
    region_states: Tensor  # (B, R, D), without the global region
    pooled: Tensor  # (B, P)
    modes: Tensor  # (B, layers, 2, M): weights of MODES, for TEXT and VISION
    depths: list  # for each layer (B, 2, l+1): weights, not states, of depths 0..l in its input


class SwitchBert(nn.Module):
    """The Switch-BERT encoder. [supp. 1, Fig. 1]

    forward(input_ids (B, T), text_mask (B, T), region_features (B, R, F),
    region_boxes (B, R, 5), region_mask (B, R), temperature=None, region_hidden=None)
    -> SwitchBertOutput. Masks: 1 = real, 0 = padding. Boxes: x1/W, y1/H, x2/W, y2/H, area
    share. region_hidden (B, R) bool: True = masked, its feature is not seen. temperature: see
    switch; in training, None becomes 1.0, the temperature at which finetuning starts.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.text_embeddings = TextEmbeddings(config)
        self.region_embeddings = RegionEmbeddings(config)
        layers = [SwitchBertLayer(config, layer) for layer in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.pooler = Pooler(config)
        # As a buffer, it moves with the model; copying it in every step would make a GPU wait.
        self.register_buffer("sees", sees_of(MODES), persistent=False)
        init_weights(self, config.initializer_range)

    def forward(self, input_ids, text_mask, region_features, region_boxes, region_mask,
            temperature=None, region_hidden=None):
        if self.training and temperature is None:
            temperature = 1.0
        text = self.text_embeddings(input_ids)  # (B, T, D)
        vision = self.region_embeddings(
            region_features, region_boxes, region_mask, region_hidden)  # (B, 1+R, D)
        states = torch.cat([text, vision], dim=1)  # (B, L, D)
        global_mask = torch.ones_like(region_mask[:, :1])
        mask = torch.cat([text_mask, global_mask, region_mask], dim=1)  # (B, L)
        num_text = text.shape[1]
        layout = layout_of(mask, num_text, self.sees)
        # Under autocast, LayerNorm returns float32 on a GPU. Depths are stored in the precision
        # of matrix products: bf16.
        device = states.device.type
        rounds = torch.is_autocast_enabled(device)
        precision = torch.get_autocast_dtype(device) if rounds else states.dtype
        depths = []
        modes = []
        depth_weights = []
        for layer in self.layers:
            depths.append(states.to(precision))
            states, mode, weights = layer(depths, layout, temperature)
            modes.append(mode)
            depth_weights.append(weights)
        text = states[:, :num_text]
        vision = states[:, num_text:]
        pooled = self.pooler(text[:, 0], vision[:, 0])
        modes = torch.stack(modes, dim=1)  # (B, layers, 2, M)
        return SwitchBertOutput(text, vision[:, 1:], pooled, modes, depth_weights)


def init_weights(module, std):
    """BERT's initialisation: normal(0, std) matrices, zero biases; LayerNorms keep torch's."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


# --- 7. Heads and losses ----------------------------------------------------------------
# The loss of pretraining is the sum of three means [supp. 1]. Their equal weights and what follows
# are ASSUMPTION A7:
#
#     MLM   mean over masked words w            -log p(w)                     p from text_states
#     MRC   mean over masked regions            sum_k c_k log(c_k / p_k)      p from region_states
#     ITM   mean over whole pairs y (match?)    -log p(y)                     p from pooled
#
# c is the detector's distribution over C classes, p the model's: MRC is KL(c || p), summed
# over classes as in VOLTA. A pair either has words and regions masked and counts in MLM and
# MRC, or it is whole and counts in ITM, with its own picture or another one: see data.py.


def transform(config):
    """BERT's layer between a state and the prediction from it: (K, D) -> (K, D)"""
    linear = nn.Linear(config.hidden_size, config.hidden_size)
    return nn.Sequential(linear, nn.GELU(), layer_norm(config))


def label_loss(logits, labels):
    """Sum of -log p(label) over K places: logits (K, V), labels (K,). MLM; ITM with V = 2.

    A pair that matches, logits (0, 2) for (MISMATCH, MATCH): -log(e^2 / (1 + e^2)) = 0.127.
    >>> round(label_loss(torch.tensor([[0.0, 2.0]]), torch.tensor([MATCH])).item(), 3)
    0.127
    """
    return F.cross_entropy(logits.float(), labels, reduction="sum")  # K = 0: 0, not NaN


def region_loss(logits, targets):
    """Sum of KL(target || prediction) over K regions: logits (K, C), targets (K, C).

    Target (.7 .2 .1), prediction (.5 .3 .2): .7 ln 1.4 + .2 ln (2/3) + .1 ln .5 = 0.085.
    >>> p, target = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.7, 0.2, 0.1]])
    >>> round(region_loss(p.log(), target).item(), 3)
    0.085
    """
    log_prediction = logits.float().log_softmax(dim=-1)
    return F.kl_div(log_prediction, targets.float(), reduction="sum")


@dataclass
class PretrainingOutput:
    """The losses and accuracies of a batch as sums and counts, so that parts of it add up exactly.
    """

    sums: Tensor  # (5,) float32: the losses MLM, MRC and ITM, then pieces and pairs that are right
    counts: tuple  # five integers: pieces, regions, pairs, and again pieces and pairs
    encoder: SwitchBertOutput

    @property
    def loss(self):
        """MLM + MRC + ITM, each a mean; zero, not NaN, where nothing was masked."""
        # Divided by plain numbers: copying a list to the GPU would make the host wait.
        means = [total / max(1, n) for total, n in zip(self.sums, self.counts)]
        return sum(means[:3])


class SwitchBertForPretraining(nn.Module):
    """Masked language modeling, masked region classification, image-text matching. [supp. 1]

    forward(**batch of data.collate, temperature=None) -> PretrainingOutput. mlm_positions (K,)
    in 0 .. B T - 1, mlm_labels (K,); mrc_positions (K',) in 0 .. B R - 1, mrc_targets (K', C),
    made by data.class_targets (None: no MRC); itm_positions (K",) in 0 .. B - 1, itm_labels (K",).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.bert = SwitchBert(config)
        self.mlm_transform = transform(config)
        # "Reverse embedding lookup" [Fig. 1]: scores are dot products with the word
        # embeddings (tied weights); only the bias is new.
        self.mlm_bias = nn.Parameter(torch.zeros(config.vocab_size))
        # Without region classes there is no MRC head: DistributedDataParallel fails on
        # parameters that get no gradient.
        if config.num_region_classes:
            self.mrc_transform = transform(config)
            self.mrc_classifier = nn.Linear(config.hidden_size, config.num_region_classes)
        self.itm_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.itm_classifier = nn.Linear(config.pooler_size, 2)
        for head in list(self.children())[1:]:  # all but the encoder, which has initialised itself
            init_weights(head, config.initializer_range)

    def forward(self, mlm_positions, mlm_labels, mrc_positions, mrc_targets, itm_positions,
            itm_labels, temperature=None, **inputs):
        out = self.bert(**inputs, temperature=temperature)
        # The output layers run only at the places that are predicted. These come as indices:
        # with a boolean mask, the host would have to wait for the GPU to count them.
        states = self.mlm_transform(out.text_states.flatten(0, 1)[mlm_positions])  # (K, D)
        embeddings = self.bert.text_embeddings.word_embeddings.weight  # (V, D)
        words = F.linear(states, embeddings, self.mlm_bias)  # (K, V)
        mlm_sum = label_loss(words, mlm_labels)
        mrc_sum = mlm_sum.new_zeros(())
        if mrc_targets is not None:
            states = self.mrc_transform(out.region_states.flatten(0, 1)[mrc_positions])  # (K', D)
            mrc_sum = region_loss(self.mrc_classifier(states), mrc_targets)
        pairs = self.itm_dropout(out.pooled[itm_positions])  # (K", P)
        itm = self.itm_classifier(pairs)  # (K", 2)
        itm_sum = label_loss(itm, itm_labels)
        words_right = (words.argmax(dim=-1) == mlm_labels).sum()
        pairs_right = (itm.argmax(dim=-1) == itm_labels).sum()
        sums = torch.stack([mlm_sum, mrc_sum, itm_sum, words_right, pairs_right])
        counts = (len(words), len(mrc_positions), len(itm), len(words), len(itm))
        return PretrainingOutput(sums, counts, out)


class TaskModel(nn.Module):
    """The encoder with a head: inputs as SwitchBert's -> the head's output, SwitchBertOutput.
    ASSUMPTION A8: the heads of the three tasks are VOLTA's.
    """

    def __init__(self, config, *head):
        super().__init__()
        self.config = config
        self.bert = SwitchBert(config)
        self.classifier = nn.Sequential(nn.Dropout(config.hidden_dropout_prob), *head)
        init_weights(self.classifier, config.initializer_range)

    def forward(self, **inputs):
        out = self.bert(**inputs)
        return self.score(out.pooled), out

    def score(self, states):
        """The head in fp32, always: among thousands of images, many scores in bf16 would tie."""
        with full_precision(states):
            return self.classifier(states.float())


class SwitchBertForVQA(TaskModel):
    """Visual question answering as classification: pooled -> (B, num_answers) logits, for
    binary cross entropy against soft targets.
    """

    def __init__(self, config, num_answers):
        wide = 2 * config.hidden_size
        super().__init__(config,
            nn.Linear(config.pooler_size, wide),
            nn.GELU(),
            nn.LayerNorm(wide, eps=config.layer_norm_eps),
            nn.Linear(wide, num_answers))
        # Each of n answers starts at probability 1/n: sigmoid(-log(n - 1)) = 1/n. From 1/2,
        # hundreds of steps would only push answers down [focal loss, Lin et al. 2017, 4.1].
        others = max(1, num_answers - 1)
        nn.init.constant_(self.classifier[-1].bias, -math.log(others))


class SwitchBertForRetrieval(TaskModel):
    """Image-text retrieval: pooled -> (B,) scores of pairs, for cross entropy over candidates."""

    def __init__(self, config):
        super().__init__(config, nn.Linear(config.pooler_size, 1), nn.Flatten(0))  # (B, 1) -> (B,)

    @classmethod
    def from_pretraining(cls, config, weights):
        """A model that starts where pretraining ended; weights: the pretrained state dict.

        The score is then the matching head's log odds of MATCH: log(p1 / p0) = logit_1 -
        logit_0, a linear layer whose weights are the difference of the two rows. So the model
        can rank without finetuning (zero-shot retrieval), and finetuning starts from there.
        """
        model = cls(config)
        for name in ("weight", "bias"):  # of classifier.1; classifier.0 is the dropout
            # Along dimension 0, `diff` gives row MATCH, 1, minus row MISMATCH, 0.
            difference = weights[f"itm_classifier.{name}"].diff(dim=0)  # (1, P) or (1,)
            weights = weights | {f"classifier.1.{name}": difference}
        model.load_state_dict(weights, strict=False)  # the heads of pretraining are left out
        return model


class SwitchBertForReferring(TaskModel):
    """Referring expressions: region_states -> (B, R), the logit that each region is meant.

    Padding gets the lowest float, so arg max never picks it. The loss is binary cross entropy. A
    region's target is its overlap (IoU, intersection over union) with the box that is meant.
    """

    def __init__(self, config):
        super().__init__(config, nn.Linear(config.hidden_size, 1))
        # No loss reaches the pooler, and several processes would wait for its gradient.
        self.bert.pooler.requires_grad_(False)

    def forward(self, region_mask, **inputs):
        out = self.bert(region_mask=region_mask, **inputs)
        logits = self.score(out.region_states).squeeze(-1)  # (B, R)
        lowest = torch.finfo(logits.dtype).min
        return logits.masked_fill(region_mask == 0, lowest), out


# --- 8. BERT weights --------------------------------------------------------------------
# Name in Hugging Face's BERT -> name here. In old files a LayerNorm has gamma and beta.

BERT_NAMES = {
    r"^bert\.": "",
    r"LayerNorm\.gamma$": "LayerNorm.weight",
    r"LayerNorm\.beta$": "LayerNorm.bias",
    r"^embeddings\.(word|position|token_type)_": r"bert.text_embeddings.\1_",
    r"^embeddings\.LayerNorm\.": "bert.text_embeddings.norm.",
    r"^encoder\.layer\.": "bert.layers.",
    r"\.attention\.self\.": ".attention.",
    r"\.attention\.output\.dense\.": ".attention.dense.",
    r"\.attention\.output\.LayerNorm\.": ".attention_norm.",
    r"\.intermediate\.dense\.": ".intermediate.",
    r"\.output\.dense\.": ".output.",
    r"\.output\.LayerNorm\.": ".output_norm.",
    r"^cls\.predictions\.transform\.dense\.": "mlm_transform.0.",
    r"^cls\.predictions\.transform\.LayerNorm\.": "mlm_transform.2.",
    r"^cls\.predictions\.bias$": "mlm_bias",
}
# Entries of config.json that must equal the model's. More positions are allowed, and cut off.
BERT_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "intermediate_size", "layer_norm_eps")
BERT_COPIES = ("position_ids", "predictions.decoder.weight", "decoder.bias")  # redundant entries


def load_bert(model, folder):
    """Load a Hugging Face BERT folder, from which both modalities then start (A6). Returns
    (missing, unexpected) names.

    model: a SwitchBert, or a model with one as `.bert`; the MLM head is loaded where there is
    one. folder: config.json with model.safetensors or pytorch_model.bin; names may begin with
    `bert.`. missing: what only the model has (regions, gates, poolers, other heads);
    unexpected: what only the file has. Raises ValueError, RuntimeError or KeyError if a size
    does not fit; for a damaged file, its reader's error.
    """
    folder = Path(folder)
    # What BERT assumes where config.json is silent. This file supports no other activation or
    # positions.
    defaults = {"hidden_act": "gelu", "position_embedding_type": "absolute",
        "layer_norm_eps": 1e-12}
    expected = defaults | {size: getattr(model.config, size) for size in BERT_SIZES}
    theirs = defaults | json.loads((folder / "config.json").read_bytes())
    for name, value in expected.items():
        if theirs[name] != value:
            raise ValueError(f"{name} is {theirs[name]!r}, but this model has {value!r}")
    renamed = {}
    prefix = "bert." if isinstance(model, SwitchBert) else ""
    if (folder / "model.safetensors").exists():
        weights = read_safetensors(folder / "model.safetensors")
    else:
        weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    for name, tensor in weights.items():
        for pattern, replacement in BERT_NAMES.items():
            name = re.sub(pattern, replacement, name)
        if name.endswith("position_embeddings.weight"):
            tensor = tensor[: model.config.max_position_embeddings]
        if not name.endswith(BERT_COPIES):
            renamed[name.removeprefix(prefix)] = tensor
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    if len(unexpected) == len(renamed):
        raise ValueError("no weight has a name of BERT's")
    return missing, unexpected


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: 8 bytes with the header's length (little-endian), a
    JSON header {name: {dtype, shape, data_offsets}}, and the raw tensors behind it.
    """
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
    data = bytearray(path.read_bytes())
    tensors = {}
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            raw = memoryview(data)[start + begin : start + end]
            values = torch.frombuffer(raw, dtype=types[entry["dtype"]])
            tensors[name] = values.view(entry["shape"])
    return tensors
