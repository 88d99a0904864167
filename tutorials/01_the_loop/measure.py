"""How the students are measured: the errors after forced errors, one rollout, differences between arms."""

import lesson
import torch
import toy

import losses
import opd


def ids(text):
    return [toy.IDS[character] for character in text]


def forced_errors(student, teacher, rows, seed):
    """A chain with one forced error for each row -> prompts, right chains, wrong chains, error positions.

    Position and digit are drawn from the distribution of this student's first error, computed exactly. The
    teacher's most likely tokens continue the chain, so that all students are scored on the same prefixes.
    """
    prompts, chains = [ids(row["prompt"]) for row in rows], [ids(row["solution"] + "$") for row in rows]
    is_digit = torch.tensor([character.isdigit() for character in toy.CHARACTERS])  # [V]
    generator, begun = torch.Generator().manual_seed(seed), []
    packed = lesson.log_probs(student, prompts, chains).split([len(chain) for chain in chains])
    for chain, log_p in zip(chains, packed, strict=True):
        y = torch.tensor(chain)[:, None]  # [T,1]
        right = log_p.gather(-1, y)  # [T,1]
        first = (right.cumsum(0) - right + log_p).exp()  # [T,V]: P(right up to t, then token v)
        first = first.scatter(-1, y, 0) * is_digit * is_digit[y]
        t, v = divmod(torch.multinomial(first.flatten(), 1, generator=generator).item(), len(is_digit))
        begun.append([*chain[:t], v])
    starts = [p + c for p, c in zip(prompts, begun, strict=True)]
    rest = opd.sample(teacher, starts, 1, [toy.END], (seed,), range(len(rows)), 24, temperature=1e-6)
    wrong = [c + r.completion for c, r in zip(begun, rest, strict=True)]
    return prompts, chains, wrong, [len(c) - 1 for c in begun]


def after_errors(model, teacher, prompts, right, wrong, at):
    """How a model continues the wrong chains after the error (_after), and the right chains at the same
    positions (_right): error = 1 - p(next token of the chain), and KL(p || q), as means over all tokens.
    excess: what an error adds to the error per token."""
    means = {}
    for name, chains in (("right", right), ("after", wrong)):
        log_p, log_q = (lesson.log_probs(m, prompts, chains) for m in (model, teacher))  # [N,V]
        error = 1 - log_p.gather(-1, torch.tensor([y for c in chains for y in c])[:, None])[:, 0].exp()  # [N]
        later = torch.tensor([i > t for c, t in zip(chains, at, strict=True) for i in range(len(c))])  # [N]
        kl = losses.reverse_kl(log_p, log_q)  # [N]; log-probabilities are logits, too
        means |= {f"error_{name}": error[later].mean().item(), f"kl_{name}": kl[later].mean().item()}
        means[f"tokens_{name}"] = later.sum().item()
    return means | {"excess": round(means["error_after"] - means["error_right"], 6)}


def rollout(before, after, teacher, rows, seed):
    """The starting student's first rollout with a wrong column, token by token, before and after training."""
    prompts = [ids(row["prompt"]) for row in rows]
    drawn, again = (
        opd.sample(m, prompts, 1, [toy.END], (seed,), range(len(rows)), 32) for m in (before, after)
    )
    texts = ["".join(toy.CHARACTERS[y] for y in x.completion) for x in (*drawn, *again)]
    i = next((i for i, row in enumerate(rows) if texts[i][:18] != row["solution"][:18]), 0)
    p, p_after, q = (
        lesson.log_probs(m, [prompts[i]], [drawn[i].completion]) for m in (before, after, teacher)
    )
    kls = zip(losses.reverse_kl(p, q).tolist(), losses.reverse_kl(p_after, q).tolist(), strict=True)
    head = {"arm": "rollout", "seed": seed, "prompt": rows[i]["prompt"]}
    head |= {"before": texts[i], "after": texts[len(rows) + i]}
    return [{**head, "kl_before": x, "kl_trained": y} for x, y in kls]


def changes(rows, pairs):
    """What each of these changes does to accuracy and excess, seed by seed.

    pairs: name -> label, the arm from which it is measured, its budget, the arm to which it leads.
    """
    found = []
    for name, (_, old, budget, new) in pairs.items():
        from_to = (lesson.select(rows, arm=old, budget=budget), lesson.select(rows, arm=new, budget="steps"))
        for x, y in zip(*from_to, strict=True):
            gains = {f"{k}_gain": round(y[k] - x[k], 5) for k in ("accuracy", "excess")}
            found.append({"arm": "change", "seed": x["seed"], "change": name, **gains})
    return found
