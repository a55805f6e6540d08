"""Peak memory of full SFT, LoRA and QLoRA on a model of 100 M parameters, each in a fresh process.

    python benchmarks/finetune_memory.py --out /tmp/memory [--rows 1] [--row-length 512] [--hidden-size 768] [--layers 12]

Prints VmHWM of each run, the bytes of the packed weights, and the process that only imports and loads the model.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from groundup.checkpoint.huggingface import save_model
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.tokenizer.bpe import TextTokenizer, save_tokenizer, train_bpe
from groundup.tokenizer.chat import BUILT_IN_TEMPLATE
from groundup.tokenizer.config import TokenizerConfig

METHODS = {
    "full SFT": ("sft", {}),
    "LoRA": ("lora", {"adapter": "lora"}),
    "QLoRA, torchao": ("lora", {"adapter": "qlora"}),
    "QLoRA, bitsandbytes": ("lora", {"adapter": "qlora", "nf4_maker": "bitsandbytes"}),
}
LOADS = (
    "import sys; from pathlib import Path; from groundup.base.machine import prepare_process, peak_memory_bytes; "
    "prepare_process(); import peft; from groundup.checkpoint.huggingface import load_model; "
    "model = load_model(Path(sys.argv[1])); print(peak_memory_bytes())"
)


def make_base(folder: Path, *, hidden_size: int, layers: int) -> int:
    """A model with random weights; returns its parameters."""
    words = train_bpe(["what is said does not matter here\n"] * 9, TokenizerConfig(vocab_size=300))
    tokenizer = folder.with_name("tokenizer")
    save_tokenizer(words, tokenizer, chat_template=BUILT_IN_TEMPLATE)
    shape = ModelConfig(
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        vocab_size=16_384,
    )
    model = CausalLM(shape)
    model.initialize(torch.Generator().manual_seed(0))
    save_model(folder, model.config, model.named_parameters(), TextTokenizer(tokenizer), eos_token_ids=[0])
    return model.num_parameters()


def main() -> None:
    """Run every method once."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--row-length", type=int, default=512)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    flags = parser.parse_args()
    out = flags.out.resolve()
    num_parameters = make_base(out / "base", hidden_size=flags.hidden_size, layers=flags.layers)
    chats = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "what is said " * 30}]}
        for n in range(60)
    ]
    (out / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    loaded = subprocess.run(
        [sys.executable, "-c", LOADS, out / "base"], capture_output=True, text=True, check=True, env=environment
    )
    print(f"{num_parameters:,} parameters, rows of {flags.row_length}, {flags.rows} a step, AdamW, fp32")
    print(
        "| method | peak memory | of it above loading the model | packed weights, bytes a parameter | other parameters |"
    )
    print("|---|---|---|---|---|")
    base = int(loaded.stdout.split()[-1])
    print(f"| loading only | {base / 2**20:,.0f} MiB | | | |")
    for method, (stage, fields) in METHODS.items():
        section = {
            **{"data": str(out / "chats.jsonl"), "init_from": str(out / "base"), "duration": "3 steps"},
            **{"row_length": flags.row_length, "batch_size_tokens": flags.rows * flags.row_length, "device": "cpu"},
            **{"precision": "fp32", "optimizer": "adamw", "micro_batch_rows": 1, "compile": False, **fields},
        }
        recipe = out / f"{method.replace(' ', '-').replace(',', '')}.yaml"
        recipe.write_text(yaml.safe_dump({stage: section}))
        command = [sys.executable, "-m", "groundup", stage, recipe, "--runs-dir", out / "runs", "--restart"]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        figures = json.loads((out / "runs" / recipe.stem / stage / "summary.json").read_text())
        peak, packed = figures["peak_memory_bytes"], figures.get("quantised_bytes_a_parameter")
        print(
            f"| {method} | {peak / 2**20:,.0f} MiB | {(peak - base) / 2**20:,.0f} MiB "
            f"| {'–' if packed is None else f'{packed:.3f}'} | {figures.get('other_parameters', '–')} |"
        )


if __name__ == "__main__":
    main()
