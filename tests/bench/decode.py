"""Where the time of a decoding step goes, in ms: as in opd.sample, and with a KV cache that has spare
room.

    python tests/bench/decode.py smollm2               # the folder built by tutorials/smollm2.py
    python tests/bench/decode.py smollm2 --compile     # takes minutes and needs a C++ compiler

opd.py does not use the cache with spare room. The cache of transformers copies all its contents to grow by
one token, but that makes the body (all layers) hardly slower.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from flags import models, positive
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import opd  # noqa: E402


def ms(model, calls, n=20):
    """{name: median ms}; the calls take turns, so that a slow moment of the machine affects them all."""
    spent = {name: [] for name in calls}
    for _ in range(n + 3):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            spent[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(times[3:]) for name, times in spent.items()}


class Room(DynamicLayer):
    """A layer's keys and values, held at the start of a larger tensor: a token is added without a copy."""

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.store = keys[:, :, :0], values[:, :, :0]
        start, end = self.get_seq_length(), self.get_seq_length() + keys.shape[2]
        if end > self.store[0].shape[2]:
            shape = (*keys.shape[:2], end + 64, keys.shape[3])
            old, self.store = (self.keys, self.values), (keys.new_empty(shape), values.new_empty(shape))
            for new, held in zip(self.store, old, strict=True):
                new[:, :, :start] = held if start else new[:, :, :0]
        for new, added in zip(self.store, (keys, values), strict=True):
            new[:, :, start:end] = added
        self.keys, self.values = (new[:, :, :end] for new in self.store)
        return self.keys, self.values


def decoder(model, rows, width, layer=None, compiled=False):
    """-> a function that decodes one more token of each row; the cache starts with `width` tokens."""
    ids, cache = torch.randint(model.vocab_in_use, (rows, width)), DynamicCache(config=model.config)
    if layer:
        cache.layers = [layer() for _ in cache.layers]
    body = model.base_model
    body(input_ids=ids, past_key_values=cache, use_cache=True)
    if compiled:
        body = torch.compile(body, dynamic=True)  # the cache grows by one token per step

    def step():
        position = torch.full((rows, 1), cache.get_seq_length())
        mask = torch.ones(rows, cache.get_seq_length() + 1, dtype=torch.long)
        mask[0, 0] = 0  # as with prompts of different lengths
        more = {"past_key_values": cache, "use_cache": True, "position_ids": position, "attention_mask": mask}
        return body(input_ids=ids[:, :1], **more).last_hidden_state[:, 0]

    return step


@torch.no_grad()
def parts(model, rows, width):
    """{part: ms} of a decoding step with this number of rows."""
    hidden = decoder(model, rows, width)()
    logits = opd.project(model, hidden)

    def draw():
        cdf = opd.sampling_logp(logits, 1.0, 1.0).double().exp().cumsum(dim=-1)
        return torch.searchsorted(cdf, torch.rand(rows, 1).double() * cdf[:, -1:], right=True)

    step, project = decoder(model, rows, width), lambda: opd.project(model, hidden)
    calls = {"body": step, "projection": project, "draw": draw}
    calls["body, cache with room"] = decoder(model, rows, width, Room)
    found = ms(model, calls)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(5):
            step()
    own = sum(event.self_cpu_time_total for event in seen.key_averages() if event.key == "aten::mm")
    return {**found, "body's matrix products": own / 5 / 1000}


@torch.no_grad()
def compiled_step(model, rows, width, first=3, n=20):
    """-> seconds of the first steps, which include compilation, and the median ms of the later ones."""
    step, spent = decoder(model, rows, width, compiled=True), []
    for _ in range(first + n):
        start = time.perf_counter()
        step()
        spent.append(time.perf_counter() - start)
    return sum(spent[:first]), 1000 * statistics.median(spent[first:])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=models, help="folder built by tutorials/smollm2.py")
    parser.add_argument("--rows", type=positive, nargs="+", default=[4, 8, 12, 64])
    parser.add_argument("--width", type=positive, default=90, help="tokens in the cache")
    parser.add_argument("--compile", action="store_true", help="also measure the body under torch.compile")
    args = parser.parse_args()
    opd.keep_freed_memory()
    tokenizer, model = opd.load_model(f"{args.folder}/student", "student", torch.float32, "cpu")
    model.vocab_in_use = len(tokenizer)
    found = [parts(model, rows, args.width) for rows in args.rows]
    print(f"ms of a decoding step | {' | '.join(f'{rows} rows' for rows in args.rows)}")
    for name in found[0]:
        print(f"| {name} | {' | '.join(f'{one[name]:.0f}' for one in found)} |")
    if args.compile:
        try:
            seconds, step = compiled_step(model, args.rows[0], args.width)
        except RuntimeError as error:  # the base class of torch.compile's errors
            reason = str(error).strip().split("\n")[0]
            parser.error(
                f"--compile: torch.compile failed ({reason}); install a C++ compiler, or omit --compile"
            )
        print(f"body compiled, {args.rows[0]} rows: {step:.0f} ms, after {seconds:.0f} s for the first steps")


if __name__ == "__main__":
    main()
