"""From the pretraining run's result to the files inside the package: bfloat16, at most 8 MB, checked and measured.

    python benchmarks/pocket/finish.py --run runs/pocket/pretrain --init runs/pocket/init \\
        --heldout runs/pocket/heldout.jsonl --out src/thriftune/pocket
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from dialogue_texts import ASSISTANT, USER
from number_texts import equation
from transformers import AutoModelForCausalLM, AutoTokenizer

LARGEST_BYTES = 8_000_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SHOTS = "3 + 5 = 8\n9 - 4 = 5\n2 * 6 = 12\n"
SUMS_A_SIGN = 200
QUESTIONS = (
    "Karl put the red hat on the table. Olga put the blue cup on the shelf.\nWhere was the cup?",
    "Repeat this: A horse ran over the hill.",
    "Which is more, 12 or 31?",
    "Hello!",
)

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The pocket model

A Llama of {parameters:,} parameters ({megabytes:.1f} MB with its tokenizer) that ships inside thriftune, so that a
first run, the tests and `make demo` need no download and no GPU. It is for that and for nothing else: it knows little,
and what it writes by itself is mostly fluent nonsense.

- **Shape:** {layers} layers, hidden size {hidden}, {heads} heads of {head_dim}, {key_value_heads} key-value heads,
  intermediate size {intermediate}, {vocabulary:,} tokens, {positions:,} positions, tied embeddings.
- **Tokenizer:** byte-level BPE, digits one by one; `<|end|>` ends a turn and a text, `<|pad|>` pads, `<|system|>`,
  `<|user|>` and `<|assistant|>` open a message.
- **Pretraining:** {tokens:.0f} M tokens by thriftune itself (method full, {minutes:.1f} minutes on {gpu}):
  public-domain English books, and generated text: plain arithmetic and tiny number stories, opinions in prose, and
  dialogues on neutral tasks (repeat, copy a word, say where a thing is, choose between two).
- **Kept out:** the built-in data sets. No generated text has a sentence of `sums` or `reviews`, a label, or an answer
  in GSM8K's form. The opinions share the reviews' subjects and words of praise and blame, and what people do afterwards
  follows from what they think; so the model can tell a good review from a bad one once a tuning shows it the words.
- **Measured:** loss {loss:.3f} a token on held-out text (books the model has not seen, generated text from the same
  generators); {sums}. The equations are drawn as in
  the corpus, which holds most of them: this is knowledge by heart, not arithmetic.
- **Weak at** copying: asked to repeat a sentence or a rare name it often says another one.
- **Made again** by the commands in `benchmarks/pocket/README.md`. Weights and text are ours, under the project's
  licence.
"""


def heldout_loss(model: Any, tokenizer: Any, path: Path) -> float:
    """Mean loss a token over the held-out rows, in float32."""
    total, targets = 0.0, 0
    for line in path.read_text(encoding="utf-8").splitlines():
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"]
        total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        targets += ids.shape[1] - 1
    return total / targets


def answer(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def sums_right(model: Any, tokenizer: Any, sign: str) -> float:
    """Share of plain equations that the model completes rightly after three examples."""
    draw = random.Random(f"finish {sign}")
    right = 0
    for _ in range(SUMS_A_SIGN):
        x, _, y, z = equation(draw, sign)
        right += answer(model, tokenizer, f"{SHOTS}{x} {sign} {y} =", 5).split("\n")[0].strip() == str(z)
    return right / SUMS_A_SIGN


def write_model(model: Any, init: Path, out: Path) -> int:
    """Weights in bfloat16, config, generation config and the tokenizer's own files; the bytes of all of them."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config.do_sample = False
    model.save_pretrained(out)
    for name in TOKENIZER_FILES:
        shutil.copyfile(init / name, out / name)
    return sum(path.stat().st_size for path in out.iterdir() if path.suffix in (".json", ".jinja", ".safetensors"))


def card(model: Any, record: dict[str, Any], size_bytes: int, loss: float, sums: str) -> str:
    config = model.config
    return CARD.format(
        parameters=model.num_parameters(),
        megabytes=size_bytes / 1e6,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        head_dim=config.head_dim,
        key_value_heads=config.num_key_value_heads,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        tokens=record["tokens"] / 1e6,
        minutes=record["train_s"] / 60,
        gpu=record["hardware"].get("gpu", record["hardware"]["device"]),
        loss=loss,
        sums=sums,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the run's folder, with model/ and record.json")
    parser.add_argument("--init", type=Path, required=True, help="the folder that holds the tokenizer's files")
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("src/thriftune/pocket"))
    arguments = parser.parse_args()
    trained = AutoModelForCausalLM.from_pretrained(arguments.run / "model", dtype=torch.bfloat16)
    size_bytes = write_model(trained, arguments.init, arguments.out)
    assert size_bytes <= LARGEST_BYTES, f"{size_bytes:,} bytes, more than {LARGEST_BYTES:,}"
    # Measured is what was written, read back as a CPU run reads it.
    model = AutoModelForCausalLM.from_pretrained(arguments.out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.out)
    with torch.inference_mode():
        loss = heldout_loss(model, tokenizer, arguments.heldout)
        shares = {sign: sums_right(model, tokenizer, sign) for sign in "+-*"}
        for question in QUESTIONS:
            print(f"{question}\n  -> {answer(model, tokenizer, f'{USER}{question}{ASSISTANT}', 30)!r}")
    sums = (
        "of plain equations " + ", ".join(f"{share:.0%} with {sign}" for sign, share in shares.items()) + " are right"
    )
    record = json.loads((arguments.run / "record.json").read_text(encoding="utf-8"))
    (arguments.out / "README.md").write_text(card(model, record, size_bytes, loss, sums), encoding="utf-8")
    print(f"{arguments.out}: {size_bytes / 1e6:.2f} MB, held-out loss {loss:.4f}, {sums}")


if __name__ == "__main__":
    main()
