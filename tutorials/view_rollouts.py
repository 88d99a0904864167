"""Look at a student's rollouts token by token, as one HTML file.

    python tutorials/view_rollouts.py STUDENT TEACHER prompts.jsonl               # writes rollouts.html
    python tutorials/view_rollouts.py runs/opd/final toy toy --n 4 --out page.html

STUDENT, TEACHER and DATA are what opd.py takes as --student, --teacher and --data. The student samples a
completion of each of the first n prompts, and both models score each of its tokens y. Orange: the teacher's
probability q(y) is lower than the student's p(y); blue: it is higher. The page needs neither scripts nor
network access. The teacher reads the same prompt as the student: PI is not supported.
"""

import argparse
import json
import math
import sys
import tempfile
from html import escape
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import opd  # noqa: E402
from opd import UserError  # noqa: E402

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Rollouts</title><style>
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { background: Canvas; color: CanvasText; max-width: 58rem; margin: 1rem auto 15rem; padding: 0 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1rem; margin: 2rem 0 .3rem }
pre { font: 14px/1.9 monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0 }
.prompt { border-left: 3px solid; padding-left: .6rem; line-height: 1.4 }
.t { border-bottom: 1px dotted; margin-right: 1px; padding: 2px 0; unicode-bidi: isolate }
.t:hover, .t:focus { outline: 2px solid }
.tip { display: none; position: fixed; inset: auto 0 0; padding: .6rem max(1rem, 50vw - 29rem);
  line-height: 1.4; background: Canvas; border-top: 2px solid; max-height: 14rem; overflow: auto }
.t:focus > .tip, .t:hover > .tip { display: block } .t:hover > .tip { z-index: 1 }
.tip > span { display: inline-block; vertical-align: top; min-width: 14rem; margin: .5rem 2rem 0 0 }
</style></head><body>
"""


def tint(gap):
    """Orange: the teacher's probability is lower than the student's; blue: higher. Colour-blind safe."""
    strength = 0.75 * min(abs(gap) / 4, 1)  # full at a factor of e^4 = 55; 0.75 keeps the text legible
    return f'class="t" style="background: rgba({"213, 94, 0" if gap < 0 else "0, 114, 178"}, {strength:.2f})"'


@torch.no_grad()
def score(model, rollout, k=5):
    """Log-probs of the completion's tokens [T], and of the top k candidates [T,k] with their ids [T,k]."""
    hidden, parts = opd.completion_hidden(model, [rollout.prompt], [rollout.completion]), []
    for h, y in zip(hidden.split(512), torch.tensor(rollout.completion).split(512), strict=True):
        logp = opd.project(model, h).log_softmax(-1).cpu()  # [n,V]
        parts.append((logp.gather(-1, y[:, None])[:, 0], *logp.topk(min(k, logp.shape[1]))))
    return [torch.cat(x).tolist() for x in zip(*parts, strict=True)]


def rollout_html(where, rollout, tokenizer, student, teacher):
    """Heading, prompt, and a span for each token with both models' probabilities at its position."""

    def text(i, token):  # decoded in context; if that is empty, its raw name
        before = (rollout.prompt + rollout.completion[:i])[-4:]
        piece = tokenizer.decode([*before, token])[len(tokenizer.decode(before)) :]
        return piece if piece and "\ufffd" not in piece else str(tokenizer.convert_ids_to_tokens(token))

    def quoted(i, token):
        return json.dumps(text(i, token), ensure_ascii=False)

    def candidates(i, who, logps, ids):
        lines = [f"{math.exp(x):<8.3g} {quoted(i, v)}" for x, v in zip(logps, ids, strict=True)]
        return f"<span><b>{who}'s top {len(ids)}</b>\n" + escape("\n".join(lines)) + "</span>"

    (p, p_best, p_ids), (q, q_best, q_ids) = score(student, rollout), score(teacher, rollout)
    spans, size = [], len(rollout.completion)
    for i, token in enumerate(rollout.completion):
        said = f"position {i + 1} of {size}, {quoted(i, token)}: student {math.exp(p[i]):.3g}, "
        said += f"teacher {math.exp(q[i]):.3g}, log q(y) - log p(y) = {q[i] - p[i]:+.2f}"
        both = candidates(i, "student", p_best[i], p_ids[i]) + candidates(i, "teacher", q_best[i], q_ids[i])
        piece, tip = escape(text(i, token)).replace("\n", "↵\n"), f"{escape(said)}\n{both}"
        spans.append(f'<span {tint(q[i] - p[i])} tabindex="0">{piece}<span class="tip">{tip}</span></span>')
    how = f"{size} tokens, {'ended' if rollout.ended else 'truncated'}"
    head = f"{where}: {how}, mean log q - log p = {(sum(q) - sum(p)) / size:+.3f} nats"
    prompt = escape(tokenizer.decode(rollout.prompt))
    return f'<h2>{escape(head)}</h2>\n<pre class="prompt">{prompt}</pre>\n<pre>{"".join(spans)}</pre>\n'


def rollouts_page(student, teacher, data, n, **limits):
    """-> the page: the student's completions of the first n prompts, sampled as in an evaluation."""
    nowhere = f"{tempfile.gettempdir()}/view_rollouts"  # nothing is written there
    args = opd.Args(student, teacher, data, out=nowhere, topk=1, dtype="float32", **limits)
    args, device = opd.set_up(args)
    path = opd.resolve_paths(args, "opd", device)
    ours, theirs, tokenizer, stop_ids = opd.load_pair(path["student"], path["teacher"], args, device)
    rows = opd.load_rows(path["data"], "data", ["prompt"])
    which = range(min(n, len(rows)))
    where = [f"{path['data']}, row {i}" for i in which]
    with opd.blame(f"--data {path['data']}", "a prompt cannot be encoded", "correct the row"):
        prompts = [opd.encode_prompt(tokenizer, rows[i]["prompt"], args.max_prompt_tokens) for i in which]
    samples = opd.sample(ours, prompts, 1, stop_ids, (~args.seed, 0), which, args.max_new_tokens)
    legend = " ".join(f"<span {tint(gap)}> {gap:+d} </span>" for gap in (-4, -2, 0, 2, 4))
    about = (
        f"<h1>{len(samples)} rollouts, token by token</h1>\n<p>Student p: {escape(student)}. Teacher q: "
        f"{escape(teacher)}. Colour: log q(y) - log p(y) in nats, {legend}, of the token y that the student "
        "sampled. Hover over a token, or step with Tab, to see both models' probabilities below.</p>\n"
    )
    each = (rollout_html(at, r, tokenizer, ours, theirs) for at, r in zip(where, samples, strict=True))
    return f"{PAGE}{about}{''.join(each)}</body></html>\n"


def main(argv=None):
    """Errors that the user can fix are reported in one line, with exit code 2."""

    def refuse(message):
        raise UserError(f"{message}; see --help")

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.error = refuse
    for name in ("student", "teacher", "data"):
        parser.add_argument(name, metavar=name.upper(), help=f"as --{name} of opd.py")
    parser.add_argument("--out", default="rollouts.html", help="HTML file to write (default: rollouts.html)")
    parser.add_argument("--n", type=int, default=8, help="number of prompts, from the first (default: 8)")
    for flag, default in {"max_new_tokens": 64, "max_prompt_tokens": 256, "seed": 0}.items():
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"as in opd.py (default: {default})")
    try:
        args = parser.parse_args(argv)
        if args.n < 1:
            refuse(f"--n {args.n}: give --n of at least 1")
        out = Path(args.out)
        if out.is_dir() or not out.parent.is_dir():
            refuse(f"--out {out}: not a file in a folder that exists")
        limits = {name: getattr(args, name) for name in ("max_new_tokens", "max_prompt_tokens", "seed")}
        page = rollouts_page(args.student, args.teacher, args.data, args.n, **limits)
        try:
            out.write_text(page, "utf-8", "replace")
        except OSError as error:
            refuse(f"--out {out}: cannot be written ({error})")
        print(f"wrote {out}")
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
