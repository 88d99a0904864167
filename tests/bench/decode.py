"""Where the time of a decoding step goes: its parts for R rows, in ms, and what two tricks would bring.

    python tests/bench/decode.py smollm2               # what tutorials/smollm2.py built

Not in opd.py, for the lines they would cost: the vocabulary projection as weight @ x.T, and a KV cache with
room in it (transformers' grows by torch.cat, which copies all of it for each token).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import opd  # noqa: E402


def ms(call, n=20):
    spent = []
    for _ in range(n + 3):
        start = time.perf_counter()
        call()
        spent.append(1000 * (time.perf_counter() - start))
    return statistics.median(spent[3:])


@torch.no_grad()
def parts(model, rows, width):
    """{part: ms} of a decoding step of these rows, each with `width` tokens in its cache."""
    ids, cache = torch.randint(model.vocab_in_use, (rows, width)), DynamicCache(config=model.config)
    body = model.base_model
    body(input_ids=ids, past_key_values=cache, use_cache=True)

    def step():
        position = torch.full((rows, 1), cache.get_seq_length())
        mask = torch.ones(rows, cache.get_seq_length() + 1, dtype=torch.long)
        more = {"past_key_values": cache, "use_cache": True, "position_ids": position, "attention_mask": mask}
        return body(input_ids=ids[:, :1], **more).last_hidden_state

    hidden, weight = step()[:, 0], model.get_output_embeddings().weight
    logits = opd.project(model, hidden)

    def draw():
        cdf = opd.sampling_logp(logits, 1.0, 1.0).double().exp().cumsum(dim=-1)
        return torch.searchsorted(cdf, torch.rand(rows, 1).double() * cdf[:, -1:], right=True)

    found = {"body": ms(step), "projection": ms(lambda: opd.project(model, hidden)), "draw": ms(draw)}
    found["projection as weight @ x.T"] = ms(lambda: weight @ hidden.T)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(5):
            step()
    for name, part in (("aten::mm", "products"), ("aten::cat", "growing the KV cache")):
        own = sum(event.self_cpu_time_total for event in seen.key_averages() if event.key == name)
        found[f"of the body: {part}"] = own / 5 / 1000
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--width", type=int, default=90, help="tokens in the cache")
    args = parser.parse_args()
    opd.keep_freed_memory()
    tokenizer, model = opd.load_model(f"{args.folder}/student", "student", torch.float32, "cpu")
    model.vocab_in_use = len(tokenizer)
    found = [parts(model, rows, args.width) for rows in args.rows]
    print(f"ms of a decoding step | {' | '.join(f'{rows} rows' for rows in args.rows)}")
    for name in found[0]:
        print(f"| {name} | {' | '.join(f'{one[name]:.0f}' for one in found)} |")


if __name__ == "__main__":
    main()
