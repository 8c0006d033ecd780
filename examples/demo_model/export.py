"""Writes a checkpoint as a Hugging Face directory: `python export.py run/final.pt model`."""

import json
import os
import sys

import torch
from safetensors.torch import save_file

from model import Config
from vocab import *  # noqa: F403


def tensors(sd, c):
    out = {"model.embed_tokens.weight": sd["emb"], "model.norm.weight": sd["nf"]}
    for i in range(c.layers):
        p, s = f"model.layers.{i}.", f"layers.{i}."
        q, k, v = sd[s + "qkv.weight"].split([c.heads * c.hd, c.kv * c.hd, c.kv * c.hd])
        gate, up = sd[s + "gu.weight"].chunk(2)
        out |= {
            p + "self_attn.q_proj.weight": q, p + "self_attn.k_proj.weight": k, p + "self_attn.v_proj.weight": v,
            p + "self_attn.o_proj.weight": sd[s + "o.weight"], p + "self_attn.q_norm.weight": sd[s + "qn"],
            p + "self_attn.k_norm.weight": sd[s + "kn"], p + "input_layernorm.weight": sd[s + "n1"],
            p + "post_attention_layernorm.weight": sd[s + "n2"], p + "mlp.gate_proj.weight": gate,
            p + "mlp.up_proj.weight": up, p + "mlp.down_proj.weight": sd[s + "down.weight"],
        }
    return {key: t.half().contiguous() for key, t in out.items()}


def tokenizer():
    """BPE without merges: single characters, bytes for the rest, and the words as added tokens."""
    added = [v for v in SPECIAL + WORDS if len(v) > 1]
    return dict(
        version="1.0", truncation=None, padding=None,
        added_tokens=[
            dict(id=ID[v], content=v, single_word=False, lstrip=False, rstrip=False, normalized=False, special=v in SPECIAL)
            for v in added
        ],
        normalizer=None,
        pre_tokenizer=dict(type="Split", pattern=dict(Regex="[\\s\\S]"), behavior="Isolated", invert=False),
        post_processor=None,
        decoder=dict(type="Sequence", decoders=[dict(type="ByteFallback"), dict(type="Fuse")]),
        model=dict(
            type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
            fuse_unk=False, byte_fallback=True, ignore_merges=False, vocab={v: ID[v] for v in VOCAB}, merges=[],
        ),
    )


def main(checkpoint, out):
    c = Config()
    os.makedirs(out, exist_ok=True)
    save_file(tensors(torch.load(checkpoint)["model"], c), f"{out}/model.safetensors", metadata={"format": "pt"})

    os.chmod(f"{out}/model.safetensors", 0o644)

    def write(name, value):
        with open(f"{out}/{name}", "w") as f:
            json.dump(value, f, indent=1, ensure_ascii=False)
            f.write("\n")

    write("config.json", dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=c.d, intermediate_size=c.ff,
        num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv, head_dim=c.hd,
        hidden_act="silu", rms_norm_eps=c.eps, rope_theta=c.theta, max_position_embeddings=4096, vocab_size=c.vocab,
        tie_word_embeddings=True, attention_bias=False, attention_dropout=0.0, bos_token_id=None,
        eos_token_id=ID["<|endoftext|>"], pad_token_id=ID["<pad>"], torch_dtype="float16", use_cache=True,
        use_sliding_window=False, sliding_window=None,
    ))
    write("generation_config.json", dict(do_sample=False, eos_token_id=ID["<|endoftext|>"], pad_token_id=ID["<pad>"]))
    write("tokenizer.json", tokenizer())
    write("tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast", eos_token="<|endoftext|>", pad_token="<pad>",
        clean_up_tokenization_spaces=False, model_max_length=4096,
    ))


if __name__ == "__main__":
    main(*sys.argv[1:])
