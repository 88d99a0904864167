"""SFT on the teacher's completions, then on-policy distillation: what each phase adds, at equal compute.

Part toy: the student of chapter 4 and its teacher B, which writes in another style. SFT has a fixed set of n
completions of the teacher (sft.py). Part real: chapter 4's damaged SmolLM2 and teacher that writes capitals.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials"), str(ROOT / "tutorials" / "04_teacher_mismatch")]

import diagnose  # noqa: E402
import lesson  # noqa: E402
import sft  # noqa: E402
import toy  # noqa: E402
import upper_case  # noqa: E402

import opd  # noqa: E402

SEEDS, FEW, COUNTS = (0, 1, 2), 300, (100, 300, 1000)  # COUNTS: completions of the teacher
STEPS, SFT_STEPS, LONG = 300, 150, 800  # budget in steps of OPD; SFT before OPD; OPD only goes on to LONG
SHARES = (0.25, 0.5, 1, 2)  # of the budget, for SFT only
REAL_SFT = {"opd": 0, "sft": 10, "sft_opd": 5}  # on SmolLM2: SFT steps
REAL_TOTAL = {"opd": 8, "sft": 10, "sft_opd": 9}  # and all steps; SFT on fresh samples costs 4 a step, OPD 5
ARMS = {"opd": "OPD only", "sft": "SFT only", "sft_opd": "SFT then OPD"}
COLOURS = {"opd": lesson.COLOURS[1], "sft": lesson.COLOURS[4], "sft_opd": lesson.COLOURS[6]}


def sft_arm(n, share, seed, smoke):
    """SFT only, for a share of the budget."""
    steps = 2 if smoke else sft.steps_for(share * STEPS * sft.OPD_COST, n)
    path, row = sft.trained(n, steps, seed, smoke)
    rows = [{"arm": "sft", "kind": "end", "share": share, **row}]
    if (n, share) == (FEW, 1):
        at = {"arm": "sft", "kind": "text", "n": n, "seed": seed, "at": steps}
        rows += [{**at, **text} for text in sft.texts(path, 3, seed, smoke)]
    return rows


def opd_arm(arm, n, seed, smoke):
    """OPD of the initial student (n = 0), or, for the rest of the budget, of the student after SFT."""
    path, rows, spent, steps = lesson.student(seed, smoke), [], 0, LONG
    if n:
        path, row = sft.trained(n, 2 if smoke else SFT_STEPS, seed, smoke)
        rows, spent = [{"arm": arm, "kind": "switch", **row}], row["cost"]
        steps = round(STEPS - spent / sft.OPD_COST)
    settings = {"steps": 2, "eval_every": 1} if smoke else {"steps": steps, "eval_every": 50}
    settings |= {"loss": "reverse_kl", "lr": sft.LR, "batch_size": sft.BATCH, "max_new_tokens": 32}
    settings |= {"student": path, "teacher": lesson.teacher(seed, smoke, "B"), **lesson.data(smoke)}
    if arm == "same_prompts":
        settings["data"] = lesson.kept_rows(f"train_{n}", toy.rows(n))
    at = {"arm": arm, "n": n, "seed": seed}
    with lesson.distilled(opd, **settings, seed=seed, save_every=STEPS, keep=9) as (log, final):
        rows += diagnose.evaluations(log, final, at)
        for t in {settings["steps"], min(STEPS, settings["steps"])}:
            saved = f"{final}/../step_{t:06}"
            rows.append({**at, "kind": "end", "at": t, **sft.scores(saved, n, seed, smoke)})
    return [{"cost": spent + row["at"] * sft.OPD_COST, **row} if "at" in row else row for row in rows]


def real_arm(arm, seed, smoke):
    """One run of opd.py on SmolLM2; the arms differ in --sft_steps, and in --steps for equal compute."""
    at = {"arm": arm, "seed": seed}
    return upper_case.run("capitals", at, smoke, REAL_SFT[arm], REAL_TOTAL[arm])


def run_toy(smoke):
    seeds, counts, shares = (SEEDS[:1], (FEW,), (1,)) if smoke else (SEEDS, COUNTS, SHARES)
    lesson.data(smoke)
    models = [(lesson.teacher, seed, smoke, "B") for seed in seeds]
    lesson.in_parallel(lesson.call, models + [(lesson.student, seed, smoke) for seed in seeds], "models")
    arms = [(opd_arm, "opd", 0), *((opd_arm, "sft_opd", n) for n in counts), (opd_arm, "same_prompts", FEW)]
    arms += [*((sft_arm, FEW, share) for share in shares), *((sft_arm, n, 1) for n in counts if n != FEW)]
    jobs = [(*arm, seed, smoke) for arm in arms for seed in seeds]
    return sum(lesson.in_parallel(lesson.call, jobs, "students"), [])


def run_real(smoke):
    upper_case.pair()
    jobs = [("sft_opd", 0, smoke)] if smoke else [(arm, seed, smoke) for seed in SEEDS for arm in COLOURS]
    return sum(lesson.in_parallel(real_arm, jobs, "SmolLM2"), [])


def plot(rows, path):
    title = "OPD after SFT pays only where the teacher's completions are few"
    figure, panels = lesson.panels(title, [["curves", "counts"]], (10, 4.4))
    rows = [{**row, "x": (row["cost"] or 0) / sft.OPD_COST} for row in lesson.select(rows, part="toy")]
    panels["counts"].set_xscale("log")
    for arm, colour in COLOURS.items():
        ours = lesson.select(rows, arm=arm)
        ends = [row for row in lesson.select(ours, kind="end") if row["n"] and row["share"] in (1, "")]
        curve = lesson.select(ours, kind="end" if arm == "sft" else "curve")
        curve = [row for row in curve if row["n"] in (0, FEW)]
        label = ARMS[arm] + "\n\n\n" * (arm != "opd")  # above its end, clear of the other lines
        lesson.curve(panels["curves"], curve, "x", "accuracy", colour, label)
        if ends:
            lesson.curve(panels["counts"], ends, "n", "accuracy", colour, ARMS[arm], marker="o")
    axes = {"curves": (f"By compute, {FEW} completions", "compute, in steps of OPD")}
    axes["counts"] = (f"At equal compute ({STEPS} steps of OPD)", "completions of the teacher for SFT")
    for name, (heading, x) in axes.items():
        panels[name].set_title(heading, fontsize=12, loc="left")
        panels[name].set(xlabel=x, ylabel="accuracy at T = 1", ylim=(-0.03, 1.03))
        panels[name].tick_params(labelsize=11)
        for text in (panels[name].xaxis.label, panels[name].yaxis.label, *panels[name].texts):
            text.set_fontsize(11)
    lesson.save(figure, path)


def tables(rows):
    def cell(column, where):
        found = [row[column] for row in lesson.select(rows, **where) if row[column] != ""]
        return lesson.spread(found).replace("-0.00", "0.00") if found else ""  # a smoke run lacks some

    counts = [["completions", "SFT only", "on the SFT set", "SFT then OPD", "on its SFT set"]]
    for n in COUNTS:
        arms = [{"n": n, "kind": "end", "arm": "sft", "share": 1}, {"n": n, "kind": "end", "arm": "sft_opd"}]
        counts.append([n, *(cell(x, arm) for arm in arms for x in ("accuracy", "own_set"))])

    # One held-out problem: the completion of the student before training, and those of the trained ones.
    found = lesson.select(rows, part="toy", kind="text", row=2, seed=SEEDS[0])
    found = [x for x in found if x["arm"] in COLOURS and x["n"] in (0, FEW)]
    found = [x for x in found if x["at"] or x["arm"] == "opd"]
    found.sort(key=lambda x: (x["at"] > 0, list(COLOURS).index(x["arm"])))
    prompt = lesson.quoted(found[0]["prompt"]) if found else ""
    texts = [["student", f"completion of {prompt}", "KL to the teacher"]]
    for x in found:
        name = ARMS[x["arm"]] if x["at"] else "before training"
        texts.append([name, lesson.quoted(str(x["text"])), f"{x['kl']:.2f}"])

    real = [
        ["schedule", "gap before OPD", "share of KL closed", "capitals", "a held-out completion (seed 0)"]
    ]
    for name, arm, step in (("before training", "opd", 0), *((ARMS[x], x, REAL_TOTAL[x]) for x in COLOURS)):
        at = {"part": "real", "arm": arm}
        text = lesson.select(rows, **at, kind="text", row=0, seed=SEEDS[0], at=step)
        text = lesson.quoted(str(text[0]["text"])) if text else ""
        scores = [cell(x, at | {"kind": "run"}) if step else "" for x in ("gap", "closed")]
        real.append([name, *scores, cell("capitals", at | {"kind": "curve", "at": step}), text])
    return {x: lesson.table(*y) for x, y in (("counts", counts), ("texts", texts), ("real", real))}


if __name__ == "__main__":
    lesson.main(__file__, {"real": run_real, "toy": run_toy}, plot, tables)
