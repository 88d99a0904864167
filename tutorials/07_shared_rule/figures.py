"""The figure, and the tables of the README."""

import lesson

MODELS = (("none", "before"), ("SFT", "after"), ("OPSD", "after"), ("none", "prompted"))  # arm, who
STEPS = 50, 100, 300  # of the table of the toy
LABELS = {"live_1e-4": "live, lr 1e-4", "live_3e-5": "live, lr 3e-5"}
REAL = {"score": "follows the rule", "kl": "KL", "other_prompted": "other prompt", "trivia": "trivia"}


def values(rows, column, **where):
    return [x for x in (row[column] for row in lesson.select(rows, **where)) if x != ""]


def names(rows, column, **where):
    """The different values of a column, in the order of the rows."""
    return list(dict.fromkeys(row[column] for row in lesson.select(rows, **where)))


def plot(rows, path):
    title = "The weights can store a shared rule; a live teacher collapses at every learning rate tried"
    figure, panels = lesson.panels(title, [["toy", "real"]], (10, 4.2))
    left, right = panels["toy"], panels["real"]
    for arm, colour in {"frozen": 6, "EMA": 2, "live": 1, "live_3e-5": 3}.items():
        curve, colour = lesson.select(rows, rule="write_it_out", arm=arm, who=""), lesson.COLOURS[colour]
        label = LABELS.get(arm, arm) if "live" in arm else None
        lesson.curve(left, curve, "step", "accuracy", colour, label, marker="o", ms=3)
    left.text(70, 1.02, "frozen", color=lesson.COLOURS[6])
    left.text(125, 1.02, "EMA", color=lesson.COLOURS[2])
    left.set(xlabel="step", ylabel="accuracy without the rule", xlim=(0, 400), ylim=(-0.03, 1.07))
    left.set_xticks(range(0, 301, 100))
    left.set_title("Toy: frozen, EMA and live teacher (lr 3e-4 unless given)", loc="left", fontsize=11)
    found = names(rows, "rule", part="real")
    for i, rule in enumerate(found):
        for k, (arm, who) in enumerate(MODELS):
            ys = values(rows, "score", part="real", rule=rule, arm=arm, who=who) or [0]
            x, colour = 5 * i + k, ("0.45", *(lesson.COLOURS[c] for c in (4, 6, 0)))[k]
            right.plot([x] * len(ys), ys, "o", color=colour, ms=7, alpha=0.8)
            y = min(ys) - 0.1 if who == "prompted" else max(ys) + 0.04
            right.text(x, y, who if arm == "none" else arm, ha="center", color=colour)
    right.set_xticks([5 * i + 1.5 for i in range(len(found))], [f"rule: {rule}" for rule in found])
    right.set(ylabel="share of answers that follow the rule", xlim=(-0.9, 8.9), ylim=(-0.03, 1.07))
    right.set_title("SmolLM2-135M, 12 steps, frozen teacher", loc="left", fontsize=11)
    for panel in (left, right):
        for text in (*panel.texts, panel.xaxis.label, panel.yaxis.label, *panel.get_xticklabels()):
            text.set_fontsize(10)
    lesson.save(figure, path)


def toy_table(rows):
    found = [["arm", *(f"step {step}" for step in STEPS), "drift", "completion"]]
    for arm in names(rows, "arm", rule="write_it_out"):
        ours = lesson.select(rows, rule="write_it_out", arm=arm)
        cells = [values(ours, "accuracy", step=step) for step in STEPS]
        cells = [lesson.spread(x) if x else "" for x in cells]
        drift, last = lesson.spread(values(ours, "drift"), 3), lesson.select(ours, who="after")[-1]
        found.append([LABELS.get(arm, arm), *cells, drift, lesson.quoted(str(last["text"]))])
    return lesson.table(*found)


def tables(rows):
    real, ours = [["rule", "model", *REAL.values()]], lesson.select(rows, part="real")
    tokens = ["```text"]
    for rule in names(ours, "rule"):
        for arm, who in MODELS:
            at, label = {"rule": rule, "arm": arm, "who": who}, who if arm == "none" else arm
            cells = {x: values(ours, x, **at) for x in REAL}
            if who == "before":  # the same model for both rules, so it was measured with the other one
                others = [x for x in lesson.select(ours, who="prompted") if x["rule"] != rule]
                cells["other_prompted"] = [x["score"] for x in others]
            real.append([rule, label, *(lesson.spread(ys) if ys else "" for ys in cells.values())])
            for row in lesson.select(ours, **at)[-1:]:  # the last seed
                shown = " ".join(row["kl_tokens"].split()).split(" | ")[:10]
                tokens += [f"{rule}, {label}:".ljust(16) + " | ".join(shown)] if row["kl_tokens"] else []
    toy = toy_table(lesson.select(rows, part="toy"))
    return {"real": lesson.table(*real), "tokens": [*tokens, "```"], "steps": toy}
