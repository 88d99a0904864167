"""Peak memory of the loss alone, against tokens T and vocabulary size V: in chunks, and all tokens at once.

    python tests/bench/memory.py --plot memory.png

Each measurement is a process of its own: hidden states [T,256] of two models, a projection to V, the loss,
and the backward pass down to the hidden states, as in opd.distill. The peak memory beyond hidden states and
weights is printed. In chunks of 512 tokens it does not grow with T; all at once it grows with T x V.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

from flags import positive

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
TOKENS, VOCABULARIES, LOSSES = (512, 2048, 8192), (32_000, 152_000), ("reverse_kl", "sg_topk", "pg")
CHUNK, WIDTH = 512, 256


def peak_gb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(tokens, vocabulary, loss, chunk):
    import torch

    import opd

    args = opd.Args(loss=loss, topk_source="student", chunk_tokens=chunk)
    hidden, teacher_hidden = (torch.randn(tokens, WIDTH) for _ in range(2))
    weight, teacher_weight = (torch.randn(vocabulary, WIDTH) for _ in range(2))
    weight.requires_grad_(True)
    weight.grad, y = torch.zeros_like(weight), torch.randint(vocabulary, (tokens,))
    none, before = torch.zeros(chunk), peak_gb()
    for i in range(0, tokens, chunk):
        leaf, part = hidden[i : i + chunk].requires_grad_(True), slice(i, i + chunk)
        teacher_logits = teacher_hidden[part] @ teacher_weight.T
        n = len(teacher_logits)
        inputs = (leaf @ weight.T, teacher_logits, y[part], none[:n], none[:n])
        opd.token_loss(opd.LOSSES[loss], *inputs, args).sum().backward()
        del inputs, teacher_logits
    print(f"{peak_gb() - before:.3f}")


def draw(rows, file):
    """One panel per vocabulary size: GB against T; solid lines: in chunks; dashed lines: all at once."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(VOCABULARIES), figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, vocabulary in zip(axes, VOCABULARIES, strict=True):
        for loss, colour in zip(LOSSES, ("#0072B2", "#D55E00", "#009E73"), strict=True):
            for chunked, style in ((True, "-o"), (False, "--x")):
                found = [r for r in rows if r[:3] == (loss, vocabulary, chunked) and r[4] is not None]
                name = f"{loss}, {f'chunks of {CHUNK}' if chunked else 'all at once'}"
                axis.plot([r[3] for r in found], [r[4] for r in found], style, color=colour, label=name)
        axis.set(title=f"V = {vocabulary:,}", xlabel="completion tokens T", xscale="log", yscale="log")
        axis.set_xticks(TOKENS, map(str, TOKENS), minor=False)
        axis.minorticks_off()
    axes[0].set_ylabel("GB, beyond states and weights")
    axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(file, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", nargs=4, help="for child processes: tokens, vocabulary, loss, chunk")
    parser.add_argument("--limit", type=positive, default=16, help="GB: skip cases that would need more")
    parser.add_argument("--plot", help="file for the figure")
    args = parser.parse_args()
    if args.one:
        tokens, vocabulary, loss, chunk = args.one
        return measure(int(tokens), int(vocabulary), loss, int(chunk))

    def gb(tokens, vocabulary, loss, chunk):
        if min(tokens, chunk) * vocabulary * 4 * 8 / 1e9 > args.limit:  # roughly eight tensors [n,V]
            return None
        command = [sys.executable, __file__, "--one", str(tokens), str(vocabulary), loss, str(chunk)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    rows = []
    print(f"GB beyond hidden states and weights; chunks of {CHUNK} tokens | all tokens at once")
    print("| loss | V | " + " | ".join(f"T = {tokens:,}" for tokens in TOKENS) + " |")
    print("|---" * (2 + len(TOKENS)) + "|")
    for loss in LOSSES:
        for vocabulary in VOCABULARIES:
            cells = []
            for tokens in TOKENS:
                found = [gb(tokens, vocabulary, loss, chunk) for chunk in (CHUNK, tokens)]
                rows += [(loss, vocabulary, i == 0, tokens, x) for i, x in enumerate(found)]
                cells.append(" / ".join("not measured" if x is None else f"{x:.2f}" for x in found))
            print(f"| `{loss}` | {vocabulary:,} | " + " | ".join(cells) + " |", flush=True)
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
