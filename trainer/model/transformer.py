"""A decoder-only transformer whose parts are fields of ModelConfig; trainer.model.presets names the usual choices of
them.

Invariant: the weights depend on the configuration and the seed alone, never on the device or the world size.
Shapes: B batch, T tokens, D width, V vocabulary, H query heads, G key-value heads, K head size, F hidden size.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cost.errors import UserError
from trainer.config import GATE_INPUTS, ModelConfig
from trainer.model.attention import attend
from trainer.model.documents import document_offsets, document_positions
from trainer.model.loss import IGNORED as IGNORED
from trainer.model.loss import capped, linear_cross_entropy

PLAIN_STD = 0.02
"""GPT-2's initialization: this, and 1/sqrt(2 layers) of it where a matrix writes into the residual stream."""


class Place(NamedTuple):
    """Where each token stands, and which tokens share a document with it; the same for all layers."""

    positions: Tensor
    """B x T, or 1 x T where all rows are alike; from 0 in each document."""
    cu_seqlens: Tensor | None
    rope: Rope | None


class Rope(NamedTuple):
    """Rotary tables, B x T x K/2: position t turns pair k by t / base^(2k/K). Source: Su et al. 2021 (2104.09864)."""

    cos: Tensor
    sin: Tensor

    def turn(self, x_BTHK: Tensor) -> Tensor:
        """Rotate the pairs (k, k + K/2), the layout of Llama checkpoints."""
        low, high = x_BTHK.chunk(2, dim=-1)
        cos, sin = self.cos.to(x_BTHK.dtype).unsqueeze(-2), self.sin.to(x_BTHK.dtype).unsqueeze(-2)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def rope_tables(positions_BT: Tensor, head_size: int, base: float) -> Rope:
    """Computed anew in each forward pass: no buffer that data-parallel training would broadcast."""
    pair_K = torch.arange(0, head_size, 2, device=positions_BT.device, dtype=torch.float32)
    angle_BTK = positions_BT.float()[..., None] * base ** (-pair_K / head_size)
    return Rope(angle_BTK.cos(), angle_BTK.sin())


def in_autocast(x: Tensor) -> Tensor:
    """Cast once to the type of the products that follow, not once in each of them; the stream has that type too."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class Norm(nn.Module):
    """To unit root mean square (Zhang and Sennrich 2019, arXiv:1910.07467), or LayerNorm; computed in fp32."""

    def __init__(self, size: int, kind: str, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if kind == "layer" else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            out = functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        else:
            out = functional.layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps)
        return in_autocast(out.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.head_size = config.size_of_heads
        self.max_seqlen = config.sequence_length
        self.window = config.layer_window(layer)
        q_width, kv_width = config.num_heads * self.head_size, config.num_kv_heads * self.head_size
        self.query = nn.Linear(config.width, q_width, bias=config.biases)
        self.key = nn.Linear(config.width, kv_width, bias=config.biases)
        self.value = nn.Linear(config.width, kv_width, bias=config.biases)
        self.output = nn.Linear(q_width, config.width, bias=config.biases)
        self.query_norm = Norm(self.head_size, "rms", config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = Norm(self.head_size, "rms", config.norm_eps) if config.qk_norm else nn.Identity()
        if config.has_value_embedding(layer):
            self.value_embedding = nn.Embedding(config.vocab_size, kv_width)
            self.value_gate = nn.Linear(min(GATE_INPUTS, config.width), config.num_kv_heads, bias=False)

    def forward(self, x_BTD: Tensor, tokens_BT: Tensor, place: Place) -> Tensor:
        q_BTHK = self.query_norm(self.query(x_BTD).unflatten(-1, (-1, self.head_size)))
        k_BTGK = self.key_norm(self.key(x_BTD).unflatten(-1, (-1, self.head_size)))
        v_BTGK = self.value(x_BTD).unflatten(-1, (-1, self.head_size))
        if place.rope is not None:
            q_BTHK, k_BTGK = place.rope.turn(q_BTHK), place.rope.turn(k_BTGK)
        if hasattr(self, "value_embedding"):
            gate_BTG = 2 * torch.sigmoid(self.value_gate(x_BTD[..., : self.value_gate.in_features]))
            extra_BTGK = self.value_embedding(tokens_BT).view_as(v_BTGK).to(v_BTGK.dtype)
            v_BTGK = v_BTGK + gate_BTG[..., None] * extra_BTGK
        mixed_BTHK = attend(q_BTHK, k_BTGK, v_BTGK, place.cu_seqlens, self.max_seqlen, self.window)
        out: Tensor = self.output(mixed_BTHK.flatten(-2))
        return out


class Mlp(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202), ReLU² (So et al. 2021, arXiv:2109.08668), or GPT-2's GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        if self.kind == "swiglu":
            self.gate = nn.Linear(config.width, config.hidden_size, bias=config.biases)
        self.up = nn.Linear(config.width, config.hidden_size, bias=config.biases)
        self.down = nn.Linear(config.hidden_size, config.width, bias=config.biases)

    def forward(self, x_BTD: Tensor) -> Tensor:
        h_BTF = self.up(x_BTD)
        if self.kind == "swiglu":
            h_BTF = functional.silu(self.gate(x_BTD)) * h_BTF
        elif self.kind == "relu2":
            h_BTF = functional.relu(h_BTF).square()
        else:
            h_BTF = functional.gelu(h_BTF, approximate="tanh")
        out: Tensor = self.down(h_BTF)
        return out


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = Norm(config.width, config.norm, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = Norm(config.width, config.norm, config.norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x_BTD: Tensor, tokens_BT: Tensor, place: Place) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), tokens_BT, place)
        out: Tensor = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return out


class Transformer(nn.Module):
    """Called with tokens and targets it gives the loss; `logits` is for generation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.cross_entropy: Callable[..., Tensor] = linear_cross_entropy
        self.max_documents: int | None = None
        """Of one row; None: as many as it has tokens."""
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.sequence_length, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        if config.residual_scalars:
            self.stream_scale = nn.Parameter(torch.ones(config.num_layers))
            self.first_scale = nn.Parameter(torch.zeros(config.num_layers))
        self.norm = Norm(config.width, config.norm, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats, summed over the targets that are not IGNORED.

        `documents_BT` numbers each token's document in its row, below `max_documents`; without, each row is one.
        """
        x_ND = self.last_layer(tokens_BT, documents_BT).flatten(0, 1)
        return self.cross_entropy(x_ND, self.head.weight, targets_BT.flatten(), self.config.logit_softcap)

    def logits(self, tokens_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """Scores of every next token, at every position: B x T x V."""
        return capped(self.head(self.last_layer(tokens_BT, documents_BT)), self.config.logit_softcap)

    def last_layer(self, tokens_BT: Tensor, documents_BT: Tensor | None) -> Tensor:
        """What the head reads: B x T x D."""
        place = self.place(tokens_BT, documents_BT)
        x_BTD = in_autocast(self.embedding(tokens_BT))
        if self.config.positions == "learned":
            x_BTD = x_BTD + in_autocast(self.position_embedding(place.positions))
        if self.config.residual_scalars:
            x_BTD = functional.rms_norm(x_BTD, x_BTD.shape[-1:], eps=self.config.norm_eps)
        first_BTD = x_BTD
        for layer, block in enumerate(self.blocks):
            if self.config.residual_scalars:
                stream, first = self.stream_scale[layer], self.first_scale[layer]
                x_BTD = stream.to(x_BTD.dtype) * x_BTD + first.to(x_BTD.dtype) * first_BTD
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, tokens_BT, place, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, tokens_BT, place)
        out: Tensor = self.norm(x_BTD)
        return out

    def place(self, tokens_BT: Tensor, documents_BT: Tensor | None) -> Place:
        """Positions begin anew in each document."""
        config = self.config
        if documents_BT is None:
            positions_BT, cu_seqlens = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None], None
        else:
            most = self.max_documents or tokens_BT.shape[1]
            positions_BT, cu_seqlens = document_positions(documents_BT), document_offsets(documents_BT, most)
        rotary = config.positions == "rotary"
        rope = rope_tables(positions_BT, config.size_of_heads, config.rope_base) if rotary else None
        return Place(positions_BT, cu_seqlens, rope)


def build_model(config: ModelConfig, seed: int) -> Transformer:
    """A model with fresh weights that depend on the seed alone; the caller's random state stays as it was.

    With `zero_init`, matrices keep the scale of what passes through them (std 1/sqrt(row length)), the rows of the
    embedding included; those that write into the residual stream and an untied head begin at zero: the first guess
    is uniform. Without, all begin as GPT-2's. Gates of value embeddings begin at zero: half open.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(config)
        for name, parameter in model.named_parameters():
            writes = name.endswith(("attention.output.weight", "mlp.down.weight"))
            if name.endswith((".bias", "value_gate.weight")):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2 and config.zero_init:
                if writes or name == "head.weight":
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=PLAIN_STD * ((2 * config.num_layers) ** -0.5 if writes else 1.0))
    return model


def load_initial(model: Transformer, path: Path) -> None:
    """Begin with the weights of a file that `slm import` wrote.

    Raises:
        UserError: There is none, or it is of a model of another shape.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        own = dict(model.named_parameters())
        differing = sorted(
            name
            for name in own.keys() | found.keys()
            if name not in own or name not in found or own[name].shape != found[name].shape
        )
    except (OSError, RuntimeError, ValueError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot read the initial weights {path} ({error}); import them again.") from None
    if differing:
        raise UserError(
            f"the initial weights {path} are of another model: {len(differing)} parameters differ, {differing[0]} for "
            "one; set the recipe's model to what `slm import` printed."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(found[name])


def weights_sha256(model: nn.Module) -> str:
    """Of all parameters' names and fp32 bytes in the order of their names."""
    return parameters_sha256(dict(model.named_parameters()))


def parameters_sha256(parameters: Mapping[str, Tensor]) -> str:
    """The same of parameters by name, whole even where they are sharded."""
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        value = parameter.detach()
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        digest.update(name.encode())
        digest.update(whole.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
