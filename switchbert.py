"""switchbert.py: a BERT whose layers learn how text and vision look at each other
=================================================================================

Switch-BERT [Guo, Yao, Chu; ECCV 2022; arXiv 2306.14182]. UNITER lets every layer attend over words
and image regions together; ViLBERT alternates layers that look inside one modality with layers that
look across; LXMERT looks inside first and across later. Each fixes a path by hand. Switch-BERT lets
every layer choose, for text and for vision apart, and lets it choose as well from which earlier
layer it reads.

    input_ids (B, T)                     region_features (B, R, F), region_boxes (B, R, 5)
        | word + position + type              | mean of the regions = global region, put in front
        v                                     v linear(F) + linear(5)
    text (B, T, D)                        vision (B, 1+R, D)                             depth 0
        |                                     |
        |   +-------------------- a switch --------------------+
        |   | masked mean of text, masked mean of vision (2D)  |
        |   |   -> linear -> logits -> Gumbel-softmax(tau)     |
        |   +--------------------------------------------------+
        v                                     v
    +---------------------------------------------------------------+
    | Switch-Input Block   g_0 depth_0 + ... + g_l depth_l          |  which depth to read (l > 0)
    |                                                               |
    | Switch-Attention     g_intra A(own tokens)                    |  whom to attend to
    |                    + g_inter A(other modality's tokens)       |
    |                    + g_joint A(all tokens)                    |
    | + residual, LayerNorm, feed-forward, residual, LayerNorm      |
    +---------------------------------------------------------------+ depth l+1
        |                                     |
    text_states (B, T, D)   global (B, D)   region_states (B, R, D)
        |        \\              |                 |
       MLM     pool([CLS])  *  pool(global)      MRC
                        | pooled (B, P)
                       ITM, VQA, retrieval

    The one switch drawn stands for many: each layer has its own for depth and for attention, and
    each gives one set of probabilities for text and one for vision, for every sample of the batch
    anew.

Letters: B batch, T word pieces, R regions, L = T + 1 + R tokens of both kinds, H heads, d = D / H
head size, D hidden, P pooled, F region feature, C region classes. Masks are 1 = real, 0 = padding,
everywhere.

Map of the file

    1. Configuration      sizes, and which switches are learned or frozen
    2. Switches           Gumbel-softmax, its temperature, and the gate that feeds it
    3. Switch-Attention   three ways of attending from one score matrix
    4. Layers             Switch-Input Block, BERT layer
    5. Embeddings         words, regions and the global region
    6. The encoder        SwitchBert
    7. Heads              pretraining (MLM, MRC, ITM), VQA, retrieval, referring expressions
    8. BERT weights       a Hugging Face folder, read into the encoder

    config = SwitchBertConfig.base()                       # 12 layers x 768
    model = SwitchBertForPretraining(config)
    out = model(**batch, temperature=temperature(pairs_seen))      # batch: see data.collate
    out.loss.backward()

Where the paper is silent the code says ASSUMPTION An; the README lists all of them. Here: A1 to A4
and A6 (the model), A5 (temperature), A7, A8 (heads and losses), A10 (how switches start), A12
(places).
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

TEXT, VISION = 0, 1  # index of the modality in `modes` and `depths`
INTRA, INTER, JOINT = 0, 1, 2  # index of the attention mode in `modes`
MISMATCH, MATCH = 0, 1  # class of the image-text matching head, and itm_labels
IGNORE = -100  # label of a word piece that is not predicted

# --- 1. Configuration -----------------------------------------------------------------------------

# What a frozen layer does, for both modalities: l is its number from 0, n the number of layers.
FROZEN = {
    "intra": lambda l, n: INTRA,  # two encoders that never meet
    "single": lambda l, n: JOINT,  # UNITER, VisualBERT: one stream
    "dual": lambda l, n: INTRA if l % 2 == 0 else INTER,  # like ViLBERT: in turn
    "late": lambda l, n: INTRA if l < n // 2 else JOINT,  # like LXMERT: apart, then together
}


@dataclass
class SwitchBertConfig:
    """Sizes under BERT's names. The defaults are the paper's model: BERT-base and Visual Genome
    regions.
    """

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
    switches: str = "learned"  # or frozen: "intra", "single", "dual", "late"

    def __post_init__(self):
        if self.switches != "learned" and self.switches not in FROZEN:
            raise ValueError(
                f"switches={self.switches!r}: expected 'learned' or one of {sorted(FROZEN)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}")

    @classmethod
    def base(cls, **changes):
        """The paper's size: 12 layers x 768, 12 heads, 36 regions of 2048."""
        return cls(**changes)

    @classmethod
    def tiny(cls, **changes):
        """A few thousand parameters, for tests."""
        small = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=40, region_feature_size=12,
            num_region_classes=7, pooler_size=16)
        return cls(**{**small, **changes})


# --- 2. Switches ----------------------------------------------------------------------------------


def temperature(pairs_seen, initial=5.0, final=0.2, rate=1e-6):
    """Temperature of the Gumbel-softmax after so many training pairs: max(final, initial e^(-rate
    n)).

        pairs_seen   0      100,000   1,000,000   3,000,000   3,218,876 and later
        temperature  5.000  4.524     1.839       0.249       0.200

    ASSUMPTION A5: the paper's anneal_rate 1e-6 [supp. 2] counts training pairs, not optimiser
    steps. Then the floor is reached at n = ln(initial / final) / rate = 3.22 million, one epoch of
    Conceptual Captions (3.3 million). Ten epochs at batch 256 are 130,000 *steps*: counted so,
    training would end at 4.4, with every switch still an even mixture.
    """
    return max(final, initial * math.exp(-rate * pairs_seen))


def switch(logits, temperature, training):
    """Turn gate logits (..., M) into weights (..., M) that sum to 1.

    Training: Gumbel-softmax [Jang et al. 2017]. If G_k are independent Gumbel(0, 1), then
        P(argmax_k (logits_k + G_k) = k) = softmax(logits)_k,
    so taking the arg max would be an exact sample of the switch, but has no gradient. Softmax
    instead of arg max, at temperature tau, does: at tau = 5 it is close to an even mixture, in
    which every mode gets gradient; towards tau = 0 it becomes the one-hot sample. Annealing goes
    from the one to the other. Evaluation: no noise. The most probable mode, one-hot; or, if a
    temperature is given, the mixture softmax(logits / tau). (F.gumbel_softmax(hard=True) would
    sample noise here too.)
    """
    logits = logits.float()  # gates are tiny and steer everything: never in bf16
    if training:
        # -log(E) of an exponential variable E is Gumbel(0, 1); exponential_() never returns 0.
        noise = -torch.empty_like(logits).exponential_().log()
        return torch.softmax((logits + noise) / temperature, dim=-1)
    if temperature is not None:
        return torch.softmax(logits / temperature, dim=-1)
    return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)


class Gate(nn.Module):
    """What a switch decides from: one linear layer on the means of both modalities.

    ASSUMPTION A3.

    forward(summary (B, 2D), temperature) -> (B, 2, M): weights over M options, for text and for
    vision.
    """

    def __init__(self, hidden_size, num_options, last_option_bias=0.0):
        super().__init__()
        self.linear = nn.Linear(2 * hidden_size, 2 * num_options)
        self.num_options, self.last_option_bias = num_options, last_option_bias

    def reset_bias(self):
        with torch.no_grad():
            self.linear.bias.view(2, self.num_options)[:, -1] = self.last_option_bias

    def forward(self, summary, temperature):
        with torch.autocast(summary.device.type, enabled=False):
            logits = self.linear(summary.float()).view(-1, 2, self.num_options)  # (B, 2, M)
        return switch(logits, temperature, self.training)


def averaging_matrix(mask, num_text):
    """mask (B, L) -> (B, 2, L): times the states (B, L, D) it is the mean text state and the mean
    vision state, padding left out; zeros for a modality without a real token.
    """
    sizes = (num_text, mask.shape[1] - num_text)
    own = of_tokens(torch.eye(2, device=mask.device)[None], sizes).transpose(1, 2)  # (1, 2, L)
    weights = own * mask.float()[:, None]  # (B, 2, L)
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1)


def of_tokens(weights, sizes):
    """(B, 2, M) weights of each modality -> (B, L, M), for every token those of its modality."""
    repeats = torch.tensor(sizes, device=weights.device)
    return weights.repeat_interleave(repeats, dim=1, output_size=sum(sizes))  # (B, L, M)


# --- 3. Switch-Attention --------------------------------------------------------------------------


def switch_attention(query, key, value, mask, num_text, modes, dropout=None):
    """Attention of every token, each modality in its own mixture of modes. [abstract]

    ASSUMPTION A1: the modes. ASSUMPTION A2: how they share one attention.

    query, key, value: (B, H, L, d), the first num_text tokens are text, the others vision.
    mask: (B, L), 1 = real. modes: (B, 2, 3), row TEXT or VISION, columns INTRA, INTER, JOINT.
    dropout: a module for the attention probabilities, or None. Returns (B, H, L, d).

    One score matrix serves all three modes. Split a query's scores s into the block of its own
    modality o and the other's x, and let lse be the log of the sum of the exponentials of a block.
    Joint attention normalises over both blocks, and its weights on the own block are

        e^s / (e^lse_o + e^lse_x) = e^s / e^lse_o * e^lse_o / (e^lse_o + e^lse_x) = softmax_o(s) a

    with a = sigmoid(lse_o - lse_x), the share of the own block; on the other one, softmax_x(s) * (1
    - a). Hence for any weights g of the modes the own block counts g_intra + a g_joint and the
    other one g_inter + (1 - a) g_joint: exact, and no mode is computed twice.
    """
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])  # (B, H, L, L)
    scores = scores.float()  # in half precision the log-sum-exp would lose what a is made of
    real = mask[:, None, None, :].bool()  # (B, 1, 1, L)
    scores = scores.masked_fill(~real, torch.finfo(scores.dtype).min)
    sizes = (num_text, scores.shape[-1] - num_text)

    attended, lse = [], []
    for block, values in zip(
        scores.split(sizes, dim=-1), value.split(sizes, dim=2)):  # text keys, vision keys
        probs = block.softmax(dim=-1)  # (B, H, L, T or L-T)
        probs = probs if dropout is None else dropout(probs)
        attended.append(probs.to(value.dtype) @ values)  # (B, H, L, d)
        lse.append(block.logsumexp(dim=-1, keepdim=True))  # (B, H, L, 1)

    text_share = torch.sigmoid(lse[0] - lse[1])  # (B, H, L, 1), a for text
    intra, inter, joint = of_tokens(modes, sizes)[:, None, :, :, None].unbind(
        dim=3)  # (B, 1, L, 1) each
    is_text = (torch.arange(sum(sizes), device=scores.device) < num_text).view(1, 1, -1, 1)
    # A block without any real token spread its attention over padding: attending to nothing is
    # zero.
    exists = [
        part.any(dim=-1, keepdim=True) for part in real.split(sizes, dim=-1)]  # (B, 1, 1, 1) each
    on_text = (torch.where(is_text, intra, inter) + text_share * joint) * exists[0]  # (B, H, L, 1)
    on_vision = (torch.where(is_text, inter, intra) + (1 - text_share) * joint) * exists[1]
    return on_text.to(value.dtype) * attended[0] + on_vision.to(value.dtype) * attended[1]


class SwitchAttention(nn.Module):
    """Multi-head switch-attention; both modalities share its weights. ASSUMPTION A6."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, states, mask, num_text, modes):
        """states (B, L, D), mask (B, L), modes (B, 2, 3) -> (B, L, D)"""
        b, n, _ = states.shape
        q, k, v = (
            project(states).view(b, n, self.num_heads, -1).transpose(1, 2)  # (B, H, L, d)
            for project in (self.query, self.key, self.value)
        )
        context = switch_attention(q, k, v, mask, num_text, modes, self.dropout)
        return self.dense(context.transpose(1, 2).reshape(b, n, -1))  # (B, L, D)


# --- 4. Layers ------------------------------------------------------------------------------------


class SwitchInput(nn.Module):
    """Switch-Input Block before layer l > 0: each modality picks among depths 0..l. [supp. 1]

    ASSUMPTION A4.
    """

    def __init__(self, config, layer):
        super().__init__()
        # ASSUMPTION A10: the gate starts 3 in favour of the newest depth, so that training begins
        # near the ordinary stack of layers and departs from it where that pays. With neutral gates
        # vision fell back to depths 0 and 1, a two-layer model, and retrieval was worse by a third
        # on the toy world.
        self.gate = Gate(config.hidden_size, layer + 1, last_option_bias=3.0)

    def forward(self, depths, summary, num_text, temperature):
        """depths: l+1 states (B, L, D). Returns the mixed states (B, L, D) and the weights (B, 2,
        l+1).
        """
        weights = self.gate(summary, temperature)
        sizes = (num_text, depths[0].shape[1] - num_text)
        per_token = of_tokens(weights, sizes).to(depths[0].dtype)  # (B, L, l+1)
        mixed = sum(per_token[:, :, i, None] * depth for i, depth in enumerate(depths))
        return mixed, weights  # (B, L, D)


class SwitchBertLayer(nn.Module):
    """A post-LayerNorm BERT layer with Switch-Attention; Switch-Input in front of it if it is
    learned.
    """

    def __init__(self, config, layer):
        super().__init__()
        learned = config.switches == "learned"
        self.switch_input = SwitchInput(config, layer) if learned and layer > 0 else None
        self.mode_gate = Gate(config.hidden_size, 3) if learned else None
        self.frozen_mode = (
            None if learned else FROZEN[config.switches](layer, config.num_hidden_layers))
        self.attention = SwitchAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, depths, mask, means, num_text, temperature):
        """depths: the states (B, L, D) of depths 0..l, the newest last. means: see
        averaging_matrix.

        Returns the states of depth l+1, the modes (B, 2, 3), and the depth weights (B, 2, l+1).
        """
        states, batch = depths[-1], len(mask)
        depth_weights = states.new_zeros(batch, 2, len(depths), dtype=torch.float32)
        depth_weights[..., -1] = 1
        if self.switch_input is not None:
            summary = (means @ states).flatten(1)  # (B, 2D)
            states, depth_weights = self.switch_input(depths, summary, num_text, temperature)
        if self.mode_gate is not None:
            modes = self.mode_gate((means @ states).flatten(1), temperature)
        else:
            modes = torch.zeros(batch, 2, 3, device=states.device)
            modes[..., self.frozen_mode] = 1
        attended = self.attention(states, mask, num_text, modes)
        states = self.attention_norm(states + self.dropout(attended))
        forward = self.output(F.gelu(self.intermediate(states)))
        return self.output_norm(states + self.dropout(forward)), modes, depth_weights


# --- 5. Embeddings --------------------------------------------------------------------------------


class TextEmbeddings(nn.Module):
    """BERT's: word + position + type 0, LayerNorm, dropout. input_ids (B, T) -> (B, T, D)"""

    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids):
        positions = self.position_embeddings.weight[: input_ids.shape[1]]  # (T, D)
        states = self.word_embeddings(input_ids) + positions + self.token_type_embeddings.weight[0]
        return self.dropout(self.norm(states))


class RegionEmbeddings(nn.Module):
    """linear(feature) + linear(box), LayerNorm, dropout, with the global region in front (A7).

    ASSUMPTION A12: both parts are normalised before they are added, as in UNITER, and boxes enter
    as 2 b - 1. A layer of 5 inputs that starts like one of 2,048 gives a fifteenth of the other's
    length, most of it the same for every box: on the toy world nothing about places was learned.

    region_features (B, R, F), region_boxes (B, R, 5) in [0, 1], region_mask (B, R) -> (B, 1+R, D)
    """

    def __init__(self, config):
        super().__init__()
        self.feature = nn.Linear(config.region_feature_size, config.hidden_size)
        self.box = nn.Linear(5, config.hidden_size)
        self.feature_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.box_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, region_features, region_boxes, region_mask):
        region_features = region_features.to(region_boxes.dtype)  # stores have float16
        # Masked regions arrive as zeros. They are left out of the mean, in its divisor too: the
        # global region shows what is visible, at the scale it always has.
        visible = region_mask.bool() & (region_features != 0).any(dim=-1)  # (B, R)
        share = visible / visible.sum(dim=1, keepdim=True).clamp(min=1)  # (B, R)
        mean = share[:, None].to(region_features.dtype) @ region_features  # (B, 1, F)
        features = torch.cat([mean, region_features], dim=1)  # (B, 1+R, F)
        whole = region_boxes.new_tensor([0, 0, 1, 1, 1]).expand(len(mean), 1, 5)
        boxes = torch.cat([whole, region_boxes], dim=1)  # (B, 1+R, 5)
        content = self.feature_norm(self.feature(features))
        return self.dropout(self.norm(content + self.box_norm(self.box(2 * boxes - 1))))


class Pooler(nn.Module):
    """pool([CLS]) * pool(global region) -> (B, P), each a linear layer with ReLU (A7: VOLTA's
    fusion).
    """

    def __init__(self, config):
        super().__init__()
        self.text = nn.Linear(config.hidden_size, config.pooler_size)
        self.vision = nn.Linear(config.hidden_size, config.pooler_size)

    def forward(self, cls_state, global_state):
        return F.relu(self.text(cls_state)) * F.relu(self.vision(global_state))


# --- 6. The encoder -------------------------------------------------------------------------------


@dataclass
class SwitchBertOutput:
    """What the encoder returns.

    text_states (B, T, D); region_states (B, R, D), without the global region; pooled (B, P);
    modes (B, layers, 2, 3): how much each sample used INTRA, INTER, JOINT, for TEXT and VISION;
    depths: for each layer (B, 2, l+1), how much of depths 0..l its input was made of.
    """

    text_states: torch.Tensor
    region_states: torch.Tensor
    pooled: torch.Tensor
    modes: torch.Tensor
    depths: list


class SwitchBert(nn.Module):
    """The Switch-BERT encoder. [supp. 1, Fig. 1]

    forward(input_ids (B, T), text_mask (B, T), region_features (B, R, F), region_boxes (B, R, 5),
    region_mask (B, R), temperature=None) -> SwitchBertOutput

    Masks: 1 = real, 0 = padding. Boxes: x1/W, y1/H, x2/W, y2/H, area share. A masked region is a
    row of zeros. temperature: in training that of the Gumbel-softmax (None: 1.0, where finetuning
    starts); in evaluation None takes the best mode of each switch, a number takes the soft mixture
    at it.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.text_embeddings = TextEmbeddings(config)
        self.region_embeddings = RegionEmbeddings(config)
        self.layers = nn.ModuleList(
            SwitchBertLayer(config, i) for i in range(config.num_hidden_layers))
        self.pooler = Pooler(config)
        init_weights(self, config.initializer_range)

    def forward(
        self, input_ids, text_mask, region_features, region_boxes, region_mask, temperature=None
    ):
        if self.training and temperature is None:
            temperature = 1.0
        text = self.text_embeddings(input_ids)  # (B, T, D)
        vision = self.region_embeddings(region_features, region_boxes, region_mask)  # (B, 1+R, D)
        depths = [torch.cat([text, vision], dim=1)]  # (B, L, D)
        mask = torch.cat(
            [text_mask, torch.ones_like(region_mask[:, :1]), region_mask], dim=1)  # (B, L)
        num_text, modes, depth_weights = text.shape[1], [], []
        means = averaging_matrix(mask, num_text).to(text.dtype)  # (B, 2, L)
        for layer in self.layers:
            states, mode, weights = layer(depths, mask, means, num_text, temperature)
            depths.append(states)
            modes.append(mode)
            depth_weights.append(weights)
        text, vision = states[:, :num_text], states[:, num_text:]
        return SwitchBertOutput(text, vision[:, 1:], self.pooler(text[:, 0], vision[:, 0]),
            torch.stack(modes, dim=1), depth_weights)


def init_weights(module, std):
    """BERT's start: normal(0, std) matrices, zero biases; LayerNorms and gate biases have their
    own.
    """
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)
    for part in module.modules():
        if isinstance(part, Gate):
            part.reset_bias()


# --- 7. Heads -------------------------------------------------------------------------------------


class Transform(nn.Sequential):
    """What BERT does to a state before it predicts from it: (K, D) -> (K, D)"""

    def __init__(self, config):
        super().__init__(nn.Linear(config.hidden_size, config.hidden_size), nn.GELU(),
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps))


@dataclass
class PretrainingOutput:
    """The three losses of a batch, as sums and counts, so that several batches can be joined
    exactly.

    sums, counts: (3,) float32, for MLM (masked pieces), MRC (masked regions), ITM (pairs).
    correct: (2,): masked pieces and pairs that were predicted right. match_probability: (B,).
    """

    sums: torch.Tensor
    counts: torch.Tensor
    correct: torch.Tensor
    match_probability: torch.Tensor
    encoder: SwitchBertOutput

    @property
    def losses(self):
        """(3,): the mean of each loss; zero, not NaN, where nothing was masked."""
        return self.sums / self.counts.clamp(min=1)

    @property
    def loss(self):
        """The sum of the three means, each with weight 1. ASSUMPTION A7."""
        return self.losses.sum()


class SwitchBertForPretraining(nn.Module):
    """Masked language modeling, masked region classification and image-text matching. [supp. 1]

    forward(**batch of data.collate, temperature=None) -> PretrainingOutput. mlm_labels (B, T),
    IGNORE where nothing is predicted; mrc_mask (B, R) bool, True = masked; mrc_targets (K, C), the
    distribution of each True of mrc_mask in row order, or None (no MRC); itm_labels (B,), MATCH or
    MISMATCH.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.bert = SwitchBert(config)
        self.mlm_transform = Transform(config)
        # "Reverse embedding lookup" [Fig. 1]: scores are dot products with the word embeddings,
        # which therefore are the output matrix too; only the bias is new.
        self.mlm_bias = nn.Parameter(torch.zeros(config.vocab_size))
        # A parameter that no loss reaches would stop DistributedDataParallel: no classes, no head.
        classes = config.num_region_classes
        self.mrc_transform = Transform(config) if classes else nn.Identity()
        self.mrc_classifier = nn.Linear(config.hidden_size, classes) if classes else nn.Identity()
        self.itm_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.itm_classifier = nn.Linear(config.pooler_size, 2)
        for head in (self.mlm_transform, self.mrc_transform, self.mrc_classifier,
                self.itm_classifier):
            init_weights(head, config.initializer_range)

    def mlm_logits(self, states):
        """(K, D) text states -> (K, V) word scores."""
        return F.linear(self.mlm_transform(states),
            self.bert.text_embeddings.word_embeddings.weight, self.mlm_bias)

    def itm_logits(self, pooled):
        """(B, P) -> (B, 2): scores of MISMATCH and MATCH."""
        return self.itm_classifier(self.itm_dropout(pooled))

    def forward(self, input_ids, text_mask, region_features, region_boxes, region_mask, mlm_labels,
            mrc_mask, mrc_targets, itm_labels, temperature=None):
        out = self.bert(
            input_ids, text_mask, region_features, region_boxes, region_mask, temperature)
        match = itm_labels == MATCH
        mlm_sum, mlm_count, mlm_correct = self._mlm(out.text_states, mlm_labels, match)
        mrc_sum, mrc_count = self._mrc(out.region_states, mrc_mask, mrc_targets, match)
        itm = self.itm_logits(out.pooled).float()
        itm_sum = F.cross_entropy(itm, itm_labels, reduction="sum")
        itm_correct = (itm.argmax(dim=-1) == itm_labels).sum()
        return PretrainingOutput(sums=torch.stack([mlm_sum, mrc_sum, itm_sum]),
            counts=torch.stack([mlm_count, mrc_count, itm_sum.new_tensor(len(itm))]).float(),
            correct=torch.stack([mlm_correct, itm_correct]).float(),
            match_probability=itm.softmax(dim=-1)[:, MATCH], encoder=out)

    # On a mismatched pair the words say nothing of the picture, so neither loss is taken there
    # (A7). The big output layers see only the places that count: 15% of half of the batch.

    def _mlm(self, states, labels, match):
        chosen = (labels != IGNORE) & match[:, None]  # (B, T)
        logits, target = self.mlm_logits(states[chosen]).float(), labels[chosen]  # (K, V), (K,)
        total = F.cross_entropy(
            logits, target, reduction="sum")  # the sum over no place is 0, not NaN
        return total, chosen.sum(), (logits.argmax(dim=-1) == target).sum()

    def _mrc(self, states, mask, targets, match):
        chosen = mask & match[:, None]  # (B, R)
        if targets is None:
            return states.new_zeros((), dtype=torch.float32), chosen.sum() * 0
        targets = targets[match[mask.nonzero()[:, 0]]].float()  # (K, C)
        scores = self.mrc_classifier(self.mrc_transform(states[chosen]))  # (K, C)
        # KL(target || prediction), summed over classes: VOLTA's. UNITER's mean over classes too is
        # 1,601 times smaller. float16 targets sum to 1 within a thousandth.
        total = F.kl_div(scores.float().log_softmax(dim=-1), targets, reduction="sum")
        return total, chosen.sum()


class SwitchBertForVQA(nn.Module):
    """Visual question answering as classification: pooled -> (B, num_answers) logits.

    ASSUMPTION A8, as for the two heads below.

    forward(the encoder's inputs) -> logits, SwitchBertOutput. Train with binary cross entropy.
    """

    def __init__(self, config, num_answers):
        super().__init__()
        self.config = config
        self.bert = SwitchBert(config)
        self.classifier = nn.Sequential(nn.Dropout(config.hidden_dropout_prob),
            nn.Linear(config.pooler_size, 2 * config.hidden_size), nn.GELU(),
            nn.LayerNorm(2 * config.hidden_size, eps=config.layer_norm_eps),
            nn.Linear(2 * config.hidden_size, num_answers))
        init_weights(self.classifier, config.initializer_range)
        # Every answer starts at probability 1/A, not 1/2: sigmoid(-log(A - 1)) = 1/A. From 1/2 the
        # first hundreds of steps only push answers down [focal loss, Lin et al. 2017, 4.1].
        nn.init.constant_(self.classifier[-1].bias, -math.log(max(1, num_answers - 1)))

    def forward(self, *inputs, **named):
        out = self.bert(*inputs, **named)
        return self.classifier(out.pooled), out


class SwitchBertForRetrieval(nn.Module):
    """Image-text retrieval: pooled -> (B,) score of the pair, higher = better match (A8).

    forward(the encoder's inputs) -> scores, SwitchBertOutput. Train with cross entropy over
    candidates.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.bert = SwitchBert(config)
        self.classifier = nn.Sequential(
            nn.Dropout(config.hidden_dropout_prob), nn.Linear(config.pooler_size, 1))
        init_weights(self.classifier, config.initializer_range)

    @classmethod
    def from_pretraining(cls, config, weights):
        """A model that starts where pretraining ended; weights: its state dict.

        The score is then the matching head's log odds of MATCH: log p1 / p0 = logit_1 - logit_0,
        a linear layer whose weights are the difference of the two rows. So the model ranks before
        it is finetuned (zero-shot retrieval), and finetuning need not begin anew. UNITER starts its
        ranking layer from the row of MATCH alone.
        """
        model = cls(config)
        for name in ("weight", "bias"):
            rows = weights[f"itm_classifier.{name}"]
            weights = weights | {f"classifier.1.{name}": (rows[MATCH] - rows[MISMATCH])[None]}
        model.load_state_dict({k: weights[k] for k in model.state_dict()})
        return model

    def forward(self, *inputs, **named):
        out = self.bert(*inputs, **named)
        return self.classifier(out.pooled).squeeze(-1), out


class SwitchBertForReferring(nn.Module):
    """Referring expressions: each region's state -> (B, R) logit of being the one that is meant
    (A8).

    forward(the encoder's inputs) -> logits, SwitchBertOutput; padding regions have the lowest
    number, so that arg max never picks them. Train with binary cross entropy against IoU, on real
    regions only.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.bert = SwitchBert(config)
        self.classifier = nn.Sequential(
            nn.Dropout(config.hidden_dropout_prob), nn.Linear(config.hidden_size, 1))
        init_weights(self.classifier, config.initializer_range)

    def forward(
        self, input_ids, text_mask, region_features, region_boxes, region_mask, temperature=None
    ):
        out = self.bert(
            input_ids, text_mask, region_features, region_boxes, region_mask, temperature)
        logits = self.classifier(out.region_states).squeeze(-1).float()  # (B, R)
        return logits.masked_fill(region_mask == 0, torch.finfo(logits.dtype).min), out


# --- 8. BERT weights ------------------------------------------------------------------------------
#
# Name in Hugging Face's BERT -> name here. Both modalities share these weights (A6), and so start
# as BERT's. Old files say gamma and beta for a LayerNorm's weight and bias.

BERT_NAMES = {
    r"embeddings\.(word|position|token_type)_embeddings\.": r"bert.text_embeddings.\1_embeddings.",
    r"embeddings\.LayerNorm\.": "bert.text_embeddings.norm.",
    r"encoder\.layer\.(\d+)\.attention\.self\.": r"bert.layers.\1.attention.",
    r"encoder\.layer\.(\d+)\.attention\.output\.dense\.": r"bert.layers.\1.attention.dense.",
    r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.": (
        r"bert.layers.\1.attention_norm."),
    r"encoder\.layer\.(\d+)\.intermediate\.dense\.": r"bert.layers.\1.intermediate.",
    r"encoder\.layer\.(\d+)\.output\.dense\.": r"bert.layers.\1.output.",
    r"encoder\.layer\.(\d+)\.output\.LayerNorm\.": r"bert.layers.\1.output_norm.",
    r"cls\.predictions\.transform\.dense\.": "mlm_transform.0.",
    r"cls\.predictions\.transform\.LayerNorm\.": "mlm_transform.2.",
    r"cls\.predictions\.bias$": "mlm_bias",
}
# The sizes of config.json that must be the model's. Positions may be more in the file: cut off.
BERT_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "intermediate_size")


def load_bert(model, folder):
    """Start a model from a Hugging Face BERT folder (A6): (missing, unexpected) parameter names.

    model: a SwitchBert, or a model with one as `.bert`; the MLM head is loaded where there is one.
    folder: config.json with model.safetensors or pytorch_model.bin; names with or without `bert.`.
    missing: what the model has and the file does not (regions, gates, poolers, other heads).
    unexpected: what the file has and the model does not use (its pooler, next-sentence head).
    Raises ValueError, before anything is changed, if a size does not fit or a file is not whole.
    """
    folder = Path(folder)
    inside = isinstance(model, SwitchBert)
    check_bert_config(folder, model.config)
    own, found, unexpected = model.state_dict(), {}, []
    weights = _read_bert_weights(folder)
    for name, tensor in weights.items():
        here = _name_here(name)
        here = here.removeprefix("bert.") if here and inside else here
        if here and here.endswith("position_embeddings.weight"):
            tensor = tensor[: model.config.max_position_embeddings]
        if here not in own:
            if not name.endswith(("position_ids", "predictions.decoder.weight", "decoder.bias")):
                unexpected.append(name)
        elif own[here].shape != tensor.shape:
            raise ValueError(f"{folder}: {name} has the shape {tuple(tensor.shape)}, but "
                f"this model needs {tuple(own[here].shape)}")
        else:
            found[here] = tensor
    if not found:
        raise ValueError(f"{folder}: none of its {len(weights)} weights has a name of BERT's")
    model.load_state_dict(found, strict=False)
    return [name for name in own if name not in found], unexpected


def check_bert_config(folder, config):
    """Raise ValueError unless the BERT of this folder has the sizes of a SwitchBertConfig."""
    path = Path(folder) / "config.json"
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a Hugging Face BERT's config ({error})") from error
    for size in BERT_SIZES:
        if theirs.get(size) != getattr(config, size):
            raise ValueError(f"{path}: {size} is {theirs.get(size)}, but this model has "
                f"{getattr(config, size)}; choose a BERT of the model's size")
    if theirs.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{path}: hidden_act is {theirs['hidden_act']!r}, this model has 'gelu'")


def _name_here(name):
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name.removeprefix("bert."))
    name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
    for theirs, ours in BERT_NAMES.items():
        if re.match(theirs, name):
            return re.sub(f"^{theirs}", ours, name)
    return None


def _read_bert_weights(folder):
    if (folder / "model.safetensors").exists():
        return read_safetensors(folder / "model.safetensors")
    path = folder / "pytorch_model.bin"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{folder}: no model.safetensors or pytorch_model.bin here") from None
    except Exception as error:  # torch.load raises whatever its zip reader or unpickler meets
        raise ValueError(f"{path}: not a whole PyTorch file ({str(error)[:80]})") from error


SAFETENSORS_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
    "BF16": torch.bfloat16, "I64": torch.int64}


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: 8 bytes with the header's length (little-endian), a
    JSON header {name: {dtype, shape, data_offsets}}, and the raw tensors behind it.

    Everything that the header claims is checked against the file before it is used. Raises
    ValueError.
    """
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ValueError(f"{path}: cut off, or no safetensors file (header of {length} bytes in a "
            f"file of {len(data)})")
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
        entries = {k: v for k, v in header.items() if k != "__metadata__"}
        return {name: _safetensor(data, 8 + length, **entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def _safetensor(data, base, dtype, shape, data_offsets):
    kind, (start, end) = SAFETENSORS_TYPES[dtype], data_offsets
    count = math.prod(shape)
    if not 0 <= start <= end <= len(data) - base or end - start != count * kind.itemsize:
        raise ValueError(f"bytes {start} to {end} do not hold {shape} of {dtype}")
    return torch.frombuffer(data, dtype=kind, count=count, offset=base + start).view(shape)
