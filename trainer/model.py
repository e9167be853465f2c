"""A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention with QK-norm, SwiGLU.

Invariant: the weights depend on the configuration and the seed alone, never on the device or the world size.
Shapes: B batch, T tokens, D width, V vocabulary, H query heads, G key-value heads, K head size, F hidden size.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from trainer.attention import attend
from trainer.config import ModelConfig

IGNORED = -100
"""A target that counts for nothing: no loss, no gradient, not among the target tokens."""


class Rope(NamedTuple):
    """Rotary tables, T x K/2: position t turns pair k by t / base^(2k/K). Source: Su et al. 2021 (arXiv:2104.09864)."""

    cos: Tensor
    sin: Tensor

    def turn(self, x_BTHK: Tensor) -> Tensor:
        """Rotate the pairs (k, k + K/2), the layout of Llama checkpoints."""
        low, high = x_BTHK.chunk(2, dim=-1)
        cos, sin = self.cos.to(x_BTHK.dtype)[:, None], self.sin.to(x_BTHK.dtype)[:, None]
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def rope_tables(num_tokens: int, head_size: int, base: float, device: torch.device) -> Rope:
    """Computed anew in each forward pass: no buffer that data-parallel training would broadcast."""
    frequency_K = base ** (-torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size)
    angle_TK = torch.outer(torch.arange(num_tokens, device=device, dtype=torch.float32), frequency_K)
    return Rope(angle_TK.cos(), angle_TK.sin())


class RMSNorm(nn.Module):
    """Scale to unit root mean square, then by a weight. Source: Zhang and Sennrich 2019 (arXiv:1910.07467).

    Computed in fp32 and cast once to the type of the products that follow, not once in each of them.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        out = functional.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)
        return out.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else out


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_size = config.width // config.num_heads
        kv_width = config.num_kv_heads * self.head_size
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, kv_width, bias=False)
        self.value = nn.Linear(config.width, kv_width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)
        self.query_norm = RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, rope: Rope) -> Tensor:
        q_BTHK = self.query(x_BTD).unflatten(-1, (-1, self.head_size))
        k_BTGK = self.key(x_BTD).unflatten(-1, (-1, self.head_size))
        v_BTGK = self.value(x_BTD).unflatten(-1, (-1, self.head_size))
        q_BTHK = rope.turn(self.query_norm(q_BTHK))
        k_BTGK = rope.turn(self.key_norm(k_BTGK))
        mixed_BHTK = attend(q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2))
        out: Tensor = self.output(mixed_BHTK.transpose(1, 2).flatten(-2))
        return out


class Mlp(nn.Module):
    """SwiGLU. Source: Shazeer 2020 (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden_size, bias=False)
        self.up = nn.Linear(config.width, config.hidden_size, bias=False)
        self.down = nn.Linear(config.hidden_size, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = self.down(functional.silu(self.gate(x_BTD)) * self.up(x_BTD))
        return out


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x_BTD: Tensor, rope: Rope) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope)
        out: Tensor = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return out


class Transformer(nn.Module):
    """Called with tokens and targets it gives the loss; `logits` is for generation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy in nats, summed over the targets that are not IGNORED."""
        logits_BTV = self.logits(tokens_BT)
        return functional.cross_entropy(
            logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Scores of every next token, at every position: B x T x V."""
        config = self.config
        head_size = config.width // config.num_heads
        rope = rope_tables(tokens_BT.shape[1], head_size, config.rope_base, tokens_BT.device)
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, rope)
        out: Tensor = self.head(self.norm(x_BTD))
        return out


def build_model(config: ModelConfig, seed: int) -> Transformer:
    """A model with fresh weights that depend on the seed alone; the caller's random state stays as it was.

    Matrices keep the scale of what passes through them (std 1/sqrt(row length)), the rows of the embedding included;
    those that write into the residual stream and an untied head begin at zero: the first guess is uniform.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(config)
        for name, parameter in model.named_parameters():
            if name.endswith(("attention.output.weight", "mlp.down.weight", "head.weight")):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def weights_sha256(model: nn.Module) -> str:
    """Of all parameters' names and fp32 bytes in the order of their names, whole even where they are sharded."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        value = parameter.detach()
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        digest.update(name.encode())
        digest.update(whole.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
