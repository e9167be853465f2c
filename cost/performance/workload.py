"""Workload: the shape of a decoder-only transformer, its parameters and its FLOPs per token.

Plain numbers only, so that the planner's estimate and the trainer's measured utilization share one formula.
Invariant: `num_params` of `Workload.from_shape` is the number of weights that `trainer.model.transformer` allocates
for the same shape, whatever its parts (norms, biases, learned positions, scalars, value embeddings).
Source of the formulas: Kaplan et al. 2020 (arXiv:2001.08361), section 2.1, for 6 FLOPs per matrix weight and
token; Chowdhery et al. 2022 (arXiv:2204.02311), appendix B, for attention.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from cost.market.hardware import Precision

Mlp = Literal["swiglu", "gelu", "relu2"]

FLOPS_PER_MATRIX_WEIGHT = 6
"""Per token: a multiply and an add, once forward and twice backward (Kaplan et al. 2020, section 2.1)."""
FLOPS_PER_ATTENTION_PAIR = 12
"""Per layer, unit of query width and pair of positions: two products, 2 FLOPs, forward and twice backward."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One pre-training run. `global_batch_size` is in sequences; `num_tokens` is what the whole run sees.

    A mixture of experts has `num_experts` MLPs per layer, of which each token uses `num_active_experts`.
    """

    num_params: int
    num_tokens: int
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int
    sequence_length: int
    global_batch_size: int
    tied_embeddings: bool = False
    mlp: Mlp = "swiglu"
    qk_norm: bool = True
    layer_norm: bool = False
    learned_positions: bool = False
    biases: bool = False
    residual_scalars: bool = False
    num_value_embeddings: int = 0
    value_gate_inputs: int = 0
    window: int | None = None
    num_windowed_layers: int = 0
    num_experts: int = 1
    num_active_experts: int = 1
    precision: Precision = "bf16"

    @classmethod
    def from_shape(
        cls,
        *,
        num_tokens: int,
        num_layers: int,
        width: int,
        num_heads: int,
        hidden_size: int,
        vocab_size: int,
        sequence_length: int,
        global_batch_size: int,
        num_kv_heads: int | None = None,
        head_size: int | None = None,
        tied_embeddings: bool = False,
        mlp: Mlp = "swiglu",
        qk_norm: bool = True,
        layer_norm: bool = False,
        learned_positions: bool = False,
        biases: bool = False,
        residual_scalars: bool = False,
        num_value_embeddings: int = 0,
        value_gate_inputs: int = 0,
        window: int | None = None,
        num_windowed_layers: int = 0,
        num_experts: int = 1,
        num_active_experts: int = 1,
        precision: Precision = "bf16",
        num_params: int | None = None,
    ) -> Workload:
        """Count the parameters of a shape; `num_params` overrides the count where a source states it."""
        shape = cls(
            num_params=0,
            num_tokens=num_tokens,
            num_layers=num_layers,
            width=width,
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_size=width // num_heads if head_size is None else head_size,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            sequence_length=sequence_length,
            global_batch_size=global_batch_size,
            tied_embeddings=tied_embeddings,
            mlp=mlp,
            qk_norm=qk_norm,
            layer_norm=layer_norm,
            learned_positions=learned_positions,
            biases=biases,
            residual_scalars=residual_scalars,
            num_value_embeddings=num_value_embeddings,
            value_gate_inputs=value_gate_inputs,
            window=window,
            num_windowed_layers=num_windowed_layers,
            num_experts=num_experts,
            num_active_experts=num_active_experts,
            precision=precision,
        )
        counted = shape.matrix_params + shape.vector_params + shape.table_params
        return dataclasses.replace(shape, num_params=counted if num_params is None else num_params)

    @property
    def embedding_params(self) -> int:
        """Weights of the token table: looked up, never multiplied (a tied head multiplies the same table)."""
        return self.vocab_size * self.width

    @property
    def table_params(self) -> int:
        """Weights that are only looked up: tokens (unless the head is that table), positions, value embeddings."""
        tokens = 0 if self.tied_embeddings else self.embedding_params
        positions = self.sequence_length * self.width if self.learned_positions else 0
        return tokens + positions + self.num_value_embeddings * self.vocab_size * self.num_kv_heads * self.head_size

    @property
    def attention_params_per_layer(self) -> int:
        """Query, key, value and output projections of one layer."""
        return 2 * self.width * self.head_size * (self.num_heads + self.num_kv_heads)

    @property
    def expert_params(self) -> int:
        """Matrices of one MLP: three in SwiGLU (Shazeer 2020, arXiv:2002.05202), else two."""
        return (3 if self.mlp == "swiglu" else 2) * self.width * self.hidden_size

    @property
    def router_params_per_layer(self) -> int:
        """One score per expert, only where there is a choice."""
        return self.width * self.num_experts if self.num_experts > 1 else 0

    @property
    def vector_params(self) -> int:
        """Norms (two per layer, one at the end, one per kind of head), biases, and two scalars per layer."""
        norm = self.width * (2 if self.layer_norm else 1)
        biases = (self.num_heads + 2 * self.num_kv_heads) * self.head_size + self.width  # query, key, value; output
        biases += self.num_experts * (self.hidden_size * (2 if self.mlp == "swiglu" else 1) + self.width)
        per_layer = 2 * norm + (2 * self.head_size if self.qk_norm else 0) + (biases if self.biases else 0)
        per_layer += 2 if self.residual_scalars else 0
        return self.num_layers * per_layer + norm

    def _matrix_params(self, num_experts: int) -> int:
        per_layer = self.attention_params_per_layer + self.router_params_per_layer
        per_layer += num_experts * self.expert_params
        gates = self.num_value_embeddings * self.value_gate_inputs * self.num_kv_heads
        return self.num_layers * per_layer + gates + self.vocab_size * self.width

    @property
    def matrix_params(self) -> int:
        """All weights that stand in a matrix product, the output head included, tied or not."""
        return self._matrix_params(self.num_experts)

    @property
    def active_matrix_params(self) -> int:
        """Matrix weights that one token passes through; equals `matrix_params` for a dense model."""
        return self._matrix_params(self.num_active_experts)

    @property
    def active_params(self) -> int:
        """Weights that one token uses; equals `num_params` for a dense model."""
        return self.num_params - self.matrix_params + self.active_matrix_params

    @property
    def attention_flops_per_token(self) -> float:
        """Scores and weighted values, causal: half of PaLM's 12 · layers · heads · head size · T, less in a window."""
        T = self.sequence_length
        W = T if self.window is None else min(self.window, T)
        windowed = W * (1 - W / (2 * T))  # mean over the sequence: it grows to W, and stays there
        mean_keys = (self.num_layers - self.num_windowed_layers) * T / 2 + self.num_windowed_layers * windowed
        return FLOPS_PER_ATTENTION_PAIR * self.num_heads * self.head_size * mean_keys

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of forward and backward, without recomputation: what utilization counts."""
        return FLOPS_PER_MATRIX_WEIGHT * self.active_matrix_params + self.attention_flops_per_token

    @property
    def total_flops(self) -> float:
        """Model FLOPs of the whole run."""
        return self.flops_per_token * self.num_tokens

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all devices."""
        return self.global_batch_size * self.sequence_length

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run, the last one whole."""
        return -(-self.num_tokens // self.tokens_per_step)

    @property
    def tokens_per_param(self) -> float:
        """Tokens seen per trained weight."""
        return self.num_tokens / self.num_params

    def with_tokens(self, num_tokens: int) -> Workload:
        """The same shape, trained for another number of tokens."""
        return dataclasses.replace(self, num_tokens=num_tokens)
