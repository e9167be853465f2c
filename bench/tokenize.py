"""How fast `slm prepare` encodes text, against tiktoken alone, and whether it gives the same ids and bytes.

    python bench/tokenize.py [--rounds 5] [--megabytes 40] [--json]

The text is the standard library of this Python. One core: processor time of tiktoken's `encode_ordinary` and of ours,
one after the other in each round, and the median of the rounds' ratios. Two cores: wall time of one worker and of two,
each once warm; only there must the machine be idle.
"""

from __future__ import annotations

import sys

if __name__ == "tokenize":  # a script beside this one wants the standard library's module of that name
    import importlib.util
    import sysconfig

    _spec = importlib.util.spec_from_file_location("tokenize", f"{sysconfig.get_path('stdlib')}/tokenize.py")
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["tokenize"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["tokenize"])
else:
    import argparse
    import json
    import os
    import random
    import statistics
    import tempfile
    import time
    from collections.abc import Callable, Iterator
    from itertools import chain, cycle
    from pathlib import Path
    from typing import Any

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

    import numpy as np

    from tasks.data.corpus import open_corpus
    from tasks.data.encode import BATCH_CHARACTERS, EncodedText, Text, encoder
    from tasks.data.tokenizer import encode_bytes, train_tokenizer
    from tasks.recipe.load import load_recipe
    from tasks.recipe.sections import END_OF_TEXT

    VOCAB_SIZE = 16_384
    FLOOR_OF_TIKTOKEN = 0.95
    FLOOR_OF_TWO_CORES = 1.8
    SAMPLE_BYTES = 4_000_000
    NUM_RANDOM_BYTES = 2_000


def texts_of(num_bytes: int) -> list[Text]:
    """The standard library's text and code, from the start again when it ends."""
    corpus = open_corpus(load_recipe("demo").data)
    all_texts = [document.text for source in ("text", "code") for document in corpus.documents(source)]
    texts: list[Text] = []
    for text in cycle(all_texts):
        texts.append(Text(text, len(text.encode()), heldout=False))
        num_bytes -= texts[-1].num_bytes
        if num_bytes <= 0:
            return texts
    return texts


def ids_of(encoded: Iterator[EncodedText]) -> np.ndarray[Any, Any]:
    """All of them in one piece."""
    return np.frombuffer(b"".join(each.tokens for each in encoded), dtype=np.uint16)


def on_one_core(path: Path, texts: list[Text], rounds: int) -> dict[str, Any]:
    """Million tokens per processor second of tiktoken and of ours, and their ratio."""
    from tasks.data.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(path)
    encoding = tokenizer.encoding()
    rates: dict[str, list[float]] = {"tiktoken": [], "slm": []}
    with encoder(path, 1) as encoded:

        def tiktoken_alone() -> int:
            return sum(len(encoding.encode_ordinary(text.text)) for text in texts)

        def ours() -> int:
            return sum(len(each.tokens) // 2 - 1 for each in encoded(texts))

        for number in range(rounds + 1):
            order: list[tuple[str, Callable[[], int]]] = [("tiktoken", tiktoken_alone), ("slm", ours)]
            for name, work in order if number % 2 else reversed(order):
                began = time.process_time()
                tokens = work()
                if number:  # the first round warms caches up
                    rates[name].append(tokens / (time.process_time() - began) / 1e6)
        mine = ids_of(encoded(texts))
    end = [tokenizer.end_of_text]
    theirs = np.fromiter(chain.from_iterable(encoding.encode_ordinary(text.text) + end for text in texts), np.uint16)
    ratios = [ours / alone for ours, alone in zip(rates["slm"], rates["tiktoken"], strict=True)]
    return {
        "million_tokens_per_cpu_second": {name: round(statistics.median(values), 2) for name, values in rates.items()},
        "of_tiktoken": round(statistics.median(ratios), 3),
        "of_tiktoken_rounds": [round(ratio, 3) for ratio in ratios],
        "num_tokens": len(mine),
        "ids_identical": bool(np.array_equal(mine, theirs)),
    }


def on_two_cores(path: Path, texts: list[Text], rounds: int) -> dict[str, Any]:
    """Wall seconds with one worker and with two, after a batch for each worker to start with."""
    first = [Text("x " * (BATCH_CHARACTERS // 2), BATCH_CHARACTERS, heldout=False)] * 2
    seconds: dict[int, list[float]] = {1: [], 2: []}
    processor_seconds: dict[int, list[float]] = {1: [], 2: []}
    ids = {}
    with encoder(path, 1) as item, encoder(path, 2) as two:
        for work in (item, two):
            ids_of(work(first))
        for number in range(rounds):
            for workers, work in ((1, item), (2, two)) if number % 2 else ((2, two), (1, item)):
                began, spent = time.perf_counter(), processor_time()
                encoded = list(work(texts))
                seconds[workers].append(time.perf_counter() - began)
                processor_seconds[workers].append(processor_time() - spent)
                ids[workers] = ids_of(iter(encoded))
    ratios = [alone / both for alone, both in zip(seconds[1], seconds[2], strict=True)]
    work_ratios = [alone / both for alone, both in zip(processor_seconds[1], processor_seconds[2], strict=True)]
    return {
        "seconds": {str(workers): round(statistics.median(values), 2) for workers, values in seconds.items()},
        "speedup": round(statistics.median(ratios), 3),
        "speedup_where_both_cores_are_free": round(2 * statistics.median(work_ratios), 3),
        "speedup_rounds": [round(ratio, 3) for ratio in ratios],
        "ids_identical": bool(np.array_equal(ids[1], ids[2])),
    }


def processor_time() -> float:
    """Of this process and those that it started and that live."""
    import psutil

    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children())]
    return sum(each.user + each.system for each in times)


def bytes_come_back(path: Path) -> bool:
    """Random bytes, every byte in a row, and a piece of this Python's own program."""
    from tasks.data.tokenizer import read_tokenizer

    encoding = read_tokenizer(path).encoding()
    draw = random.Random(0)
    contents = [draw.randbytes(draw.randrange(400)) for _ in range(NUM_RANDOM_BYTES)]
    contents += [bytes(range(256)) * 4, Path(sys.executable).read_bytes()[:300_000]]
    return all(encoding.decode_bytes(encode_bytes(encoding, content)) == content for content in contents)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=40.0, help="of text, for the two cores")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    texts = texts_of(int(options.megabytes * 1e6))
    with tempfile.TemporaryDirectory(prefix="slm-tokenize-") as name:
        path = Path(name) / "tokenizer.json"
        sample, left = [], SAMPLE_BYTES
        for text in texts:
            sample.append(text.text)
            left -= text.num_bytes
            if left <= 0:
                break
        path.write_bytes(train_tokenizer(iter(sample), VOCAB_SIZE, [END_OF_TEXT]).to_bytes())
        single = on_one_core(path, texts_of(6_000_000), options.rounds)
        both = on_two_cores(path, texts, options.rounds)
        exact = bytes_come_back(path)
    claims = {
        f"at least {FLOOR_OF_TIKTOKEN} of tiktoken's rate on one core": single["of_tiktoken"] >= FLOOR_OF_TIKTOKEN,
        f"at least {FLOOR_OF_TWO_CORES} times as fast on two cores": both["speedup"] >= FLOOR_OF_TWO_CORES,
        "ids identical": single["ids_identical"] and both["ids_identical"],
        "any bytes come back": exact,
    }
    load = [round(value, 1) for value in os.getloadavg()]
    facts = {"cores": os.cpu_count(), "load": load, "one_core": single, "two_cores": both, "claims": claims}
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        rates = single["million_tokens_per_cpu_second"]
        print(f"one core   {rates['slm']} M tokens per cpu-second, tiktoken alone {rates['tiktoken']}")
        print(f"           {single['of_tiktoken']} of tiktoken's rate (rounds {single['of_tiktoken_rounds']})")
        print(f"two cores  {both['speedup']} times one (rounds {both['speedup_rounds']}), load {load}")
        for claim, holds in claims.items():
            print(f"{'yes' if holds else 'NO':<4} {claim}")
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
