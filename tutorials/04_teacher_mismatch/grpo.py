"""GRPO in 30 lines: the teacher that is adapted to the student's completions."""

import lesson
import torch
import toy

import losses
import opd

PROMPTS, GROUP, LR, STEPS = 32, 8, 2e-4, 120  # problems a step, answers to each, learning rate, steps


def grpo(path, seed, steps):
    """Reinforcement learning with verifiable rewards (RLVR) by GRPO -> the toy model at a path, improved.

    The model gets problems and rewards: no teacher, and no chains but its own. Ratio clipping is left out
    because each batch is used once, and so is the optional KL penalty towards the initial model.
    """
    rows, (tokenizer, model) = toy.rows(20_000), lesson.load(path)
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(1, steps + 1):
        batch = [rows[opd.row_at(step * PROMPTS + i, len(rows), seed)] for i in range(PROMPTS)]
        prompts = [tokenizer(row["prompt"]).input_ids for row in batch]
        rollouts = opd.sample(model, prompts, GROUP, [toy.END], (seed, step), range(PROMPTS), 32)
        completions = [r.completion for r in rollouts]
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        reward = [float(opd.is_correct(text, batch[i // GROUP]["answer"])) for i, text in enumerate(texts)]
        reward = torch.tensor(reward).view(PROMPTS, GROUP)  # [B,G]
        # A_i = (r_i - mean(r)) / std(r) over the G answers to a problem; 0 if all are right or all wrong
        advantage = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)  # [B,G]
        advantage = advantage.flatten().repeat_interleave(torch.tensor([*map(len, completions)]))  # [N]
        hidden = opd.completion_hidden(model, [r.prompt for r in rollouts], completions)  # [N,D]
        tokens = torch.tensor([[y] for ids in completions for y in ids])  # [N,1]
        logp = opd.project(model, hidden).log_softmax(-1).gather(-1, tokens)[:, 0]  # [N]
        loss = losses.policy_gradient(logp, advantage).mean()  # -1/N sum A_i log p(y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def teacher(seed, smoke):
    """Path of the student of that seed after GRPO, trained once."""
    start, steps = lesson.student(seed, smoke), 1 if smoke else STEPS

    def make():
        return grpo(start, seed + 1_000_000, steps)

    return lesson.kept(f"grpo_{seed}", make, grpo, start, steps, PROMPTS, GROUP, LR)
