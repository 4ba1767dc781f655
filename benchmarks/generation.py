"""Tokens a second of `rlmerge eval`'s generation against transformers' own `generate`, in turn, on the same prompts.

    python benchmarks/generation.py MODEL_FOLDER [--count 64] [--runs 3]

Both decode with batches of one size and end at the end token or at the task's stop strings; `generate` gets left-padded
batches in the order of the task, as its documentation shows. Counted are tokens of completions, up to the end; padding
and what follows the end count for nobody. Greedy, the two must say the same, but for near-ties.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from rlmerge.evaluate.backend import Sampling
from rlmerge.evaluate.generate import Generator, Request, end_tokens
from rlmerge.evaluate.run import load_model, prompt_ids, stops_of
from rlmerge.evaluate.tasks import load_task

Made = dict[str, tuple[int, ...]]


@torch.inference_mode()
def by_generate(
    model: Any, tokenizer: Any, prompts: dict[str, tuple[int, ...]], batch: int, sampling: Sampling
) -> Made:
    """transformers' generate, batch by batch."""
    ends, found, keys = end_tokens(model, tokenizer), {}, list(prompts)
    options: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens, "pad_token_id": 0, "eos_token_id": list(ends)}
    options |= {"do_sample": False} if sampling.temperature == 0 else {
        "do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0
    }  # fmt: skip
    if sampling.stop:
        options |= {"stop_strings": list(sampling.stop), "tokenizer": tokenizer}
    for first in range(0, len(keys), batch):
        some = keys[first : first + batch]
        length = max(len(prompts[key]) for key in some)
        ids, mask = (
            torch.zeros((len(some), length), dtype=torch.long),
            torch.zeros((len(some), length), dtype=torch.long),
        )
        for row, key in enumerate(some):
            ids[row, length - len(prompts[key]) :] = torch.tensor(prompts[key])
            mask[row, length - len(prompts[key]) :] = 1
        made = model.generate(ids, attention_mask=mask, **options)[:, length:].tolist()
        for key, tokens in zip(some, made):
            end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
            found[key] = tuple(tokens[:end])
    return found


def cut(tokenizer: Any, tokens: tuple[int, ...], stops: tuple[str, ...]) -> tuple[int, ...]:
    """The tokens up to the one that completes a stop string."""
    for place in range(1, len(tokens) + 1) if stops else ():
        if any(stop in tokenizer.decode(tokens[:place], skip_special_tokens=True) for stop in stops):
            return tokens[:place]
    return tokens


def by_us(model: Any, tokenizer: Any, prompts: dict[str, tuple[int, ...]], batch: int, sampling: Sampling) -> Made:
    """The generator of `rlmerge eval`."""
    requests = [Request(key, prompt, seed) for seed, (key, prompt) in enumerate(prompts.items())]
    return {sample.key: sample.tokens for sample in Generator(model, tokenizer, batch).run(requests, sampling)}


def main() -> None:
    """Prints a line a task and way, and the ratio of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tasks", nargs="+", default=["gym:gsm_symbolic", "humaneval", "math:2"])
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of weights and arithmetic")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    model = model.to(getattr(torch, args.dtype))
    model.eval()
    for name in args.tasks:
        problems = load_task(name, "test", args.count).problems[: args.count]
        sampling = Sampling(args.temperature, args.tokens, stop=stops_of(problems[0]))
        prompts = {problem.id: prompt_ids(tokenizer, problem) for problem in problems}
        rates: dict[str, list[float]] = {"generate": [], "rlmerge": []}
        made: dict[str, Made] = {}
        for _ in range(args.runs):
            for way, run in (("generate", by_generate), ("rlmerge", by_us)):
                began = time.perf_counter()
                made[way] = run(model, tokenizer, prompts, args.batch, sampling)
                seconds = time.perf_counter() - began
                if way == "generate":  # counted up to the stop string, outside the time
                    made[way] = {key: cut(tokenizer, tokens, sampling.stop) for key, tokens in made[way].items()}
                rates[way].append(sum(map(len, made[way].values())) / seconds)
        lengths = sorted(map(len, made["rlmerge"].values()))
        median = {way: statistics.median(values) for way, values in rates.items()}
        same = sum(made["generate"][key] == made["rlmerge"][key] for key in prompts) / len(prompts)
        print(json.dumps({
            "task": name, "prompt tokens": [min(map(len, prompts.values())), max(map(len, prompts.values()))],
            "new tokens, median": lengths[len(lengths) // 2], "tokens/s": {w: round(v, 1) for w, v in median.items()},
            "ratio": round(median["rlmerge"] / median["generate"], 2), "same": round(same, 3),
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
