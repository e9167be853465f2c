"""`python -m tasks generate`: what a run's newest weights go on with after a prompt, written as it comes."""

from __future__ import annotations

import argparse
import codecs
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cost.errors import UserError
from tasks.data.tokenizer import encode
from tasks.hub.weights import newest_weights, tokenizer_in
from tasks.stores.opening import open_store

if TYPE_CHECKING:
    from trainer.model.transformer import Transformer


def main(argv: Sequence[str]) -> int:
    """Load, encode, sample, print."""
    parser = argparse.ArgumentParser(prog="python -m tasks generate", description="Generate text from a checkpoint.")
    parser.add_argument("prompt")
    parser.add_argument("--store", required=True)
    parser.add_argument("--data-dir", type=Path, required=True, help="prepared data, for its tokenizer")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    import torch

    from trainer.model.transformer import build_model

    tokenizer = tokenizer_in(arguments.data_dir)
    weights = newest_weights(open_store(arguments.store, create=False))
    if weights.config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {weights.config.vocab_size}: they are of "
            "different runs."
        )
    model = build_model(weights.config, seed=0)
    model.load_state_dict(weights.tensors, strict=not weights.config.tied_embeddings)
    encoding = tokenizer.encoding()
    prompt = encode(encoding, arguments.prompt) or [tokenizer.end_of_text]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    sys.stdout.write(arguments.prompt)
    generator = torch.Generator().manual_seed(arguments.seed)
    for token in tokens_after(
        model, prompt, arguments.tokens, arguments.temperature, arguments.top_k, generator, tokenizer.vocab_size
    ):
        if token == tokenizer.end_of_text:
            break
        sys.stdout.write(decoder.decode(encoding.decode_single_token_bytes(token)))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")
    return 0


def tokens_after(
    model: Transformer,
    prompt: Sequence[int],
    count: int,
    temperature: float,
    top_k: int,
    generator: object,
    vocab_size: int,
) -> Iterator[int]:
    """Sampled one by one; temperature 0 takes the likeliest. Sees as many tokens back as the model was trained on.

    The prompt may be as long as it likes: only its end counts. `vocab_size` leaves out rows that pad the model's table.
    """
    import torch

    tokens = list(prompt)
    model.eval()
    for _ in range(count):
        seen_BT = torch.tensor([tokens[-model.config.sequence_length :]])
        with torch.no_grad():
            scores_V = model.logits(seen_BT)[0, -1, :vocab_size].float()
        if temperature <= 0:
            token = int(scores_V.argmax())
        else:
            best_K, rows_K = scores_V.topk(min(top_k, vocab_size) if top_k > 0 else vocab_size)
            chances_K = (best_K / temperature).softmax(-1)
            assert isinstance(generator, torch.Generator)
            token = int(rows_K[torch.multinomial(chances_K, 1, generator=generator)])
        tokens.append(token)
        yield token
