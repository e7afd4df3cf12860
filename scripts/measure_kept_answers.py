"""What `decode.keep_answers` changes: second turns of conversations, with the first answer taken up and with it computed again.

    python scripts/measure_kept_answers.py runs/tiny --conversations 24 > docs/benchmarks/decode_kept_answers.json

Both read the same tokens: a first prompt, the greedy answer to it, and a new message. The new answers are greedy too.
"""

import argparse
import json
import os
import statistics
import sys

import jax
import numpy as np

from v4train.decode import config as config_lib
from v4train.decode import decoder as decoder_lib
from v4train.decode import loading, scheduler
from v4train.decode import request as request_lib
from v4train.numerics import config as numerics_config

_STORY = "once upon a time there was little girl boy dog frog who had red ball and went to the park with mom saw big tree sang song"
_LENGTHS = {"prompt_words": 30, "first_answer": 900, "message_words": 8, "second_answer": 64}


def answer(made: scheduler.Scheduler, prompts: list, *, tokens: int) -> list[tuple[list[tuple[int, float]], request_lib.Stream]]:
    """Tokens with log-likelihoods, one prompt after the other."""
    found = []
    for prompt in prompts:
        stream = made.submit(request_lib.Request(prompt, max_tokens=tokens, temperature=0.0, ignore_end=True))
        while made.turn():
            pass
        found.append(([(event.token, event.logprob) for event in stream], stream))
    return found


def measure(loaded: loading.Loaded, *, compute: str, cache: str, conversations: int) -> dict:
    """One number format."""
    rng, words = np.random.default_rng(0), _STORY.split()
    bos = np.array([loaded.tokenizer.bos])
    prompts = [loaded.compose([bos, " ".join(rng.choice(words, _LENGTHS["prompt_words"]))]) for _ in range(conversations)]
    messages = [" " + " ".join(rng.choice(words, _LENGTHS["message_words"])) for _ in range(conversations)]
    sizes = {"slots": 1, "max_length": 2048, "pages": 8 * conversations, "prefill_chunk": 256, "cache": cache, "prefix_bytes": 2**30}
    numerics = numerics_config.NumericsConfig(compute=compute)  # type: ignore[arg-type]
    turns = {}
    for keep in (False, True):
        config = config_lib.DecodeConfig(**sizes, keep_answers=keep)
        made = scheduler.Scheduler(
            decoder_lib.Decoder(loaded.model, loaded.params, config=config, numerics=numerics), tokenizer=loaded.tokenizer
        )
        firsts = answer(made, prompts, tokens=_LENGTHS["first_answer"])
        seconds = [
            prompt.followed_by([token for token, _ in said] + loaded.tokenizer.encode(message).tolist())
            for prompt, (said, _), message in zip(prompts, firsts, messages, strict=True)
        ]
        turns[keep] = [said for said, _ in firsts], answer(made, seconds, tokens=_LENGTHS["second_answer"])
    (firsts, computed), (others, taken) = turns[False], turns[True]
    gaps = [abs(a[1] - b[1]) for (one, _), (two, _) in zip(computed, taken, strict=True) for a, b in _shared(one, two)]

    def first_ms(found: list) -> float:
        return round(1e3 * statistics.median(stream.first_token - stream.submitted for _, stream in found), 1)

    return {
        "compute": compute,
        "cache": cache,
        "conversations": conversations,
        "first_answers_equal": firsts == others,
        "prompt_tokens": statistics.mean(len(stream.request.prompt) for _, stream in taken),
        "cached_tokens": {"computed": _cached(computed), "taken_up": _cached(taken)},
        "first_token_ms": {"computed": first_ms(computed), "taken_up": first_ms(taken)},
        "answers_with_the_same_tokens": sum(
            [a for a, _ in one] == [b for b, _ in two] for (one, _), (two, _) in zip(computed, taken, strict=True)
        ),
        "answers_with_the_same_bits": sum(one == two for (one, _), (two, _) in zip(computed, taken, strict=True)),
        "log_likelihoods_differ_by": {"median": statistics.median(gaps), "most": max(gaps)},
    }


def _cached(found: list) -> float:
    return statistics.mean(stream.cached_tokens for _, stream in found)


def _shared(one: list, two: list) -> list:
    """Pairs up to the first token that differs: behind it the texts are not the same."""
    count = next((i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a[0] != b[0]), len(one))
    return list(zip(one[:count], two[:count], strict=True))


def main() -> None:
    """Prints JSON."""
    parser = argparse.ArgumentParser(description="answers with the last turn's answer taken up, and computed again")
    parser.add_argument("checkpoint")
    parser.add_argument("--conversations", type=int, default=24)
    parser.add_argument("--compute", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--cache", choices=("fp32", "bf16", "fp8"), default="fp8")
    args = parser.parse_args()
    loaded = loading.load(args.checkpoint)
    runs = [measure(loaded, compute=compute, cache=args.cache, conversations=args.conversations) for compute in args.compute]
    machine = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "load": os.getloadavg()[0]}
    json.dump({"model": loaded.name, "step": loaded.step, "lengths": _LENGTHS, "machine": machine, "runs": runs}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
