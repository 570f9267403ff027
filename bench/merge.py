"""Merging an adapter into its base: `lora_core.merge` against PEFT's load, merge_and_unload, save_pretrained.

Both are whole processes that end with a complete checkpoint folder on the same disk. Every run writes to a folder that
the previous run of the same side left behind and that is removed first, so both pay for freshly allocated blocks."""

import argparse
import shutil
import tempfile
from pathlib import Path

from bench.harness import Pair, Row, paired, smaller_is_better, timed_process, write

OURS = """
import sys
from pathlib import Path
from lora_core.merge import merge
merge(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
"""
PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, out = sys.argv[1:4]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
model.merge_and_unload().save_pretrained(out, max_shard_size="500MB")
AutoTokenizer.from_pretrained(base).save_pretrained(out)
"""
COPY = """
import shutil, sys
shutil.copytree(sys.argv[1], sys.argv[2])
"""


def build(folder: Path, *, layers: int) -> tuple[Path, Path]:
    """A bf16 Llama with hidden 2048 and `layers` layers, in shards, and an r = 16 adapter on all its linear modules."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import make_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    base, adapter = folder / f"base-{layers}", folder / f"adapter-{layers}"
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(base, max_shard_size="500MB")
    make_tokenizer(base)
    peft = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    peft.save_pretrained(adapter)
    return base, adapter


def run(code: str, *arguments: Path) -> tuple[float, float]:
    out = arguments[-1]
    shutil.rmtree(out, ignore_errors=True)
    return timed_process(["-c", code, *map(str, arguments)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=16, help="16 layers are 0.8 billion parameters, 1.6 GB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-merge-") as name:
        folder = Path(name)
        base, adapter = build(folder, layers=options.layers)
        rows = compare(folder, base, adapter, options.rounds)
    write(
        "merge", rows, note=f"bf16 Llama, hidden 2048, {options.layers} layers, shards of 500 MB, r = 16 on all linears"
    )


def compare(folder: Path, base: Path, adapter: Path, rounds: int) -> list[Row]:
    peaks: dict[str, list[float]] = {"ours": [], "peft": []}

    def ours() -> float:
        seconds, peak = run(OURS, base, adapter, folder / "ours")
        peaks["ours"].append(peak)
        return seconds

    def peft() -> float:
        seconds, peak = run(PEFT, base, adapter, folder / "peft")
        peaks["peft"].append(peak)
        return seconds

    def copy() -> float:
        return run(COPY, base, folder / "copy")[0]

    against_peft = paired(ours, peft, rounds=rounds)
    memory = Pair(peaks["ours"][1:], peaks["peft"][1:])
    against_copy = paired(ours, copy, rounds=rounds)
    return [
        smaller_is_better("merge to disk vs PEFT, whole process", against_peft, unit="s", at_least=10),
        smaller_is_better("peak resident memory of the process vs PEFT", memory, unit="MiB", at_least=None),
        smaller_is_better("merge to disk vs copying the base", against_copy, unit="s", at_least=0.4),
    ]


if __name__ == "__main__":
    main()
