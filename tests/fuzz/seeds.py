"""The well-formed files that the fuzzer damages: tiny checkpoints, an adapter, data.

Run as a program with a directory: it imports torch, which the process that forks does not.
"""

import json
import shutil
import sys
from pathlib import Path

FAMILIES = ("llama", "qwen2", "qwen3", "deepseek", "deepseek_v2", "deepseek_v3")
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
ROWS = [
    {"messages": [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": "x"}]}
    for n in range(12)
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tokenizer(directory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return tokenizer


def _checkpoints(directory, tokenizer):
    import torch
    from families import Families
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = SMALL | {"vocab_size": len(tokenizer)} | ids
    families = Families(directory / "families")
    (directory / "families").mkdir()
    for family in FAMILIES:
        target = directory / family
        if family.startswith("deepseek"):
            experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
            groups = {"n_group": 2, "topk_group": 1} if family != "deepseek" else {}
            made = families(family, **sizes, **experts, **groups, first_k_dense_replace=0)
            shutil.copytree(made, target)
        else:
            config = AutoConfig.for_model(family, **sizes, head_dim=8)
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).float().save_pretrained(target)
    shutil.rmtree(directory / "families")
    llama = AutoModelForCausalLM.from_pretrained(directory / "llama", dtype=torch.float32)
    llama.save_pretrained(directory / "sharded", max_shard_size="16KB")
    shutil.copytree(directory / "llama", directory / "torch")
    (directory / "torch" / "model.safetensors").unlink()
    torch.save(llama.state_dict(), directory / "torch" / "pytorch_model.bin")
    return llama


def _adapter(llama, directory):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    get_peft_model(llama, config).save_pretrained(directory)


def _gguf(directory):
    import gguf
    import numpy as np

    path = directory / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 256),
        (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 64),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 4),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_freq_base, 1e4),
        (writer.add_vocab_size, 258),
    ):
        add(value)
    block = {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    block |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (32, 32))
    block |= {"attn_norm": (32,), "ffn_norm": (32,)}
    tensors = {f"blk.0.{name}.weight": shape for name, shape in block.items()}
    tensors |= {"token_embd.weight": (258, 32), "output.weight": (258, 32)}
    tensors |= {"output_norm.weight": (32,)}
    values = np.random.default_rng(0)
    for name, shape in tensors.items():
        writer.add_tensor(name, values.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _data(directory):
    import pandas

    directory.mkdir()
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (directory / "rows.json").write_text(json.dumps(ROWS, indent=1))
    table = pandas.DataFrame({"prompt": [f"{n}?" for n in range(9)], "completion": ["x"] * 9})
    table.to_csv(directory / "rows.csv", index=False)
    table.to_csv(directory / "rows.tsv", index=False, sep="\t")
    table.to_parquet(directory / "rows.parquet")
    (directory / "rows.txt").write_text("".join(f"text {n}\n" for n in range(9)))


def main(directory):
    """Writes all files into a new directory."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
    directory.mkdir(parents=True)
    tokenizer = _tokenizer(directory / "tokenizer")
    llama = _checkpoints(directory, tokenizer)
    for name in (*FAMILIES, "sharded", "torch"):
        shutil.copytree(directory / "tokenizer", directory / name, dirs_exist_ok=True)
    _adapter(llama, directory / "adapter")
    _gguf(directory)
    _data(directory / "data")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
