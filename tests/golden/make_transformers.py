"""Makes the golden cases that are named in CASES, by Hugging Face transformers.

    pip install torch==2.6.0 transformers==5.0.0 safetensors==0.8.0 numpy==2.4.6
    python make_transformers.py OUT [CASE ...]

Tiny random models and what transformers computes with them: float32 on the CPU, eager attention, the stored
weights widened. A quantised case is computed with the weights that its codes mean; the codes are written here,
as the formats' documents have them, and no library that kernels of ours could share a mistake with is used.
A config is in the spelling of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) or 5
(`rope_parameters`, `dtype`, `layer_types`), and it is read from there by transformers itself.
"""

import json
import platform
import shutil
import sys
import zlib
from pathlib import Path

import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

N_INPUT, N_DECODE = 24, 4
VOCAB = 128

# What the models have in common, as their configs have it.
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "head_dim": 8,
    "rope_interleave": True,
}
PAIRS = range(6)
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.07 * i for i in PAIRS],
    "long_factor": [1.25 + 0.9 * i for i in PAIRS],
}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}



def matrices(tensors):
    """Names of the matrices that published checkpoints quantise."""
    return [name for name in tensors if name.endswith(("_proj.weight", "_proj_with_mqa.weight"))]


def fp8(tensors, case):
    """e4m3 with a float32 scale for each block of rows and channels."""
    rows, cols = case["block"]
    stored, meant = dict(tensors), dict(tensors)
    for name in matrices(tensors):
        weight = tensors[name].float()
        n, k = weight.shape
        tall, wide = -(-n // rows), -(-k // cols)
        scale = torch.empty(tall, wide)
        for i in range(tall):
            for j in range(wide):
                block = weight[i * rows : (i + 1) * rows, j * cols : (j + 1) * cols]
                scale[i, j] = block.abs().max() / 448
        whole = scale.repeat_interleave(rows, 0)[:n].repeat_interleave(cols, 1)[:, :k]
        codes = (weight / whole).to(torch.float8_e4m3fn)
        stored[name] = codes
        stored[f"{name}_scale_inv"] = scale
        meant[name] = codes.float() * whole
    said = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [rows, cols],
        "modules_to_not_convert": ["lm_head"],
    }
    return stored, meant, {"quantization_config": said}


def words(codes):
    """Codes of four bits, eight neighbours of the last dimension in one int32, the first lowest."""
    codes = codes.long().reshape(*codes.shape[:-1], -1, 8)
    packed = (codes << (4 * torch.arange(8))).sum(-1)
    return (packed - ((packed >> 31) << 32)).to(torch.int32)


def awq(tensors, case):
    """AWQ's gemm: codes and zero points in words along the rows, nibble i of row 8 c + [0, 2, 4, 6, 1, 3, 5, 7][i]."""
    group, order = case["group"], torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    mixed = lambda t: t.reshape(t.shape[0], -1, 8)[:, :, order].reshape(t.shape)
    stored, meant = dict(tensors), dict(tensors)
    for name in matrices(tensors):
        weight = tensors[name].float()
        n, k = weight.shape
        parts = weight.reshape(n, k // group, group)
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        scale = ((high - low) / 15).half()
        zero = (-low / scale.float()).round().clamp(0, 15)
        codes = ((parts / scale.float()[..., None]).round() + zero[..., None]).clamp(0, 15)
        stem = name.removesuffix(".weight")
        del stored[name]
        stored[f"{stem}.qweight"] = words(mixed(codes.reshape(n, k).T))
        stored[f"{stem}.qzeros"] = words(mixed(zero.T))
        stored[f"{stem}.scales"] = scale.T
        meant[name] = ((codes - zero[..., None]) * scale.float()[..., None]).reshape(n, k)
    said = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    return stored, meant, {"quantization_config": said}


def compressed(tensors, case):
    """compressed-tensors' pack-quantized: symmetric, codes of four bits plus 8 along the channels."""
    group = case["group"]
    stored, meant = dict(tensors), dict(tensors)
    for name in matrices(tensors):
        weight = tensors[name].float()
        n, k = weight.shape
        parts = weight.reshape(n, k // group, group)
        scale = (parts.abs().amax(-1) / 7.5).bfloat16()
        codes = (parts / scale.float()[..., None]).round().clamp(-8, 7)
        stem = name.removesuffix(".weight")
        del stored[name]
        stored[f"{stem}.weight_packed"] = words((codes + 8).reshape(n, k))
        stored[f"{stem}.weight_scale"] = scale
        stored[f"{stem}.weight_shape"] = torch.tensor([n, k])
        meant[name] = (codes * scale.float()[..., None]).reshape(n, k)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    said = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }
    return stored, meant, {"quantization_config": said}


def fused(tensors, case):
    """All experts of a layer in one tensor, gate above up: as transformers 5 has them in memory."""
    stored = {name: weight for name, weight in tensors.items() if ".experts." not in name}
    for layer in range(BASE["num_hidden_layers"]):
        stem = f"model.layers.{layer}.mlp.experts"
        of = lambda module: [tensors[f"{stem}.{e}.{module}.weight"] for e in range(QWEN3_MOE["num_experts"])]
        gate_up = [torch.cat(pair) for pair in zip(of("gate_proj"), of("up_proj"))]
        stored[f"{stem}.gate_up_proj"] = torch.stack(gate_up)
        stored[f"{stem}.down_proj"] = torch.stack(of("down_proj"))
    return stored, tensors, {}


# Name: keys of the config, rope, spelling, and what else.
CASES = {
    "tf_qwen3_yarn": dict(
        config={"model_type": "qwen3", "tie_word_embeddings": True, "max_position_embeddings": 64},
        rope=YARN | {"rope_theta": 1000000.0},
        spelling=5,
        layer_types=["full_attention"] * 2,
    ),
    "tf_llama_llama3": dict(
        config={"model_type": "llama", "tie_word_embeddings": True, "eos_token_id": [2, 3]},
        rope={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        spelling=5,
        dtype="float16",
        generation={"do_sample": True, "temperature": 0.6, "eos_token_id": [4, 2]},
    ),
    "tf_phi3_longrope_long": dict(
        config={"model_type": "phi3", "max_position_embeddings": 64},
        rope=LONGROPE | {"original_max_position_embeddings": 16},
        spelling=4,
    ),
    "tf_phi3_longrope_short": dict(
        # What version 5 saves of a config of version 4: some keys are there twice.
        config={
            "model_type": "phi3",
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 64,
            "partial_rotary_factor": 0.75,
        },
        rope=LONGROPE | {"type": "longrope", "original_max_position_embeddings": 64},
        spelling=5,
    ),
    "tf_qwen2_compressed": dict(
        config={"model_type": "qwen2", "intermediate_size": 64},
        rope=DEFAULT,
        spelling=4,
        quantise=compressed,
        group=32,
    ),
    "tf_qwen3_moe_fp8": dict(
        config=QWEN3_MOE | {"moe_intermediate_size": 40},
        rope=DEFAULT,
        spelling=5,
        quantise=fp8,
        block=(48, 32),
    ),
    "tf_qwen3_moe_awq": dict(
        config=QWEN3_MOE | {"moe_intermediate_size": 32},
        rope=DEFAULT,
        spelling=4,
        dtype="float16",
        quantise=awq,
        group=32,
    ),
    # Whose windows are in every layer, whatever max_window_layers is.
    "tf_qwen3_moe_window": dict(
        config=QWEN3_MOE
        | {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "decoder_sparse_step": 2,
            "norm_topk_prob": False,
            "attention_bias": True,
        },
        rope=DEFAULT,
        spelling=4,
    ),
    "tf_qwen3_moe_fused": dict(config=QWEN3_MOE, rope=DEFAULT, spelling=5, quantise=fused),
    "tf_deepseek_v3_yarn": dict(
        config=DEEPSEEK | {"max_position_embeddings": 64, "q_lora_rank": None},
        rope=YARN | {"rope_theta": 10000.0, "mscale": 0.707, "mscale_all_dim": 1.0, "beta_fast": 4.0, "beta_slow": 1.0},
        spelling=5,
    ),
    # As DeepSeek-R1 is published.
    "tf_deepseek_v3_fp8": dict(
        config=DEEPSEEK | {"max_position_embeddings": 64},
        rope=YARN | {"rope_theta": 10000.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1},
        spelling=4,
        quantise=fp8,
        block=(48, 32),
    ),
}


def architecture(model_type):
    return transformers.AutoModelForCausalLM._model_mapping[transformers.CONFIG_MAPPING[model_type]].__name__


def config_json(case):
    """The text of config.json, in the case's spelling."""
    config = BASE | case["config"]
    rope = dict(case["rope"])
    config["architectures"] = [architecture(config["model_type"])]
    dtype = case.get("dtype", "bfloat16")
    if case["spelling"] == 5:
        config |= {"dtype": dtype, "rope_parameters": rope}
        if case.get("layer_types"):
            config["layer_types"] = case["layer_types"]
    else:
        config |= {"torch_dtype": dtype, "rope_theta": rope.pop("rope_theta")}
        # Where version 4 has them.
        kind = rope.pop("rope_type")
        for key in ["partial_rotary_factor"] + ["original_max_position_embeddings"] * (kind == "longrope"):
            if key in rope:
                config[key] = rope.pop(key)
        config["rope_scaling"] = {"type": kind, **rope} if kind != "default" else None
    return config


def random_weights(model, seed):
    """Weights that leave activations of order one, each from a stream of its own."""
    for name, weight in model.named_parameters():
        torch.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        noise = torch.randn(weight.shape)
        if "norm" in name:
            weight.data = 1 + 0.2 * noise
        elif name.endswith("bias"):
            weight.data = 0.5 * noise
        elif "embed_tokens" in name and not model.config.tie_word_embeddings:
            weight.data = noise
        else:
            weight.data = noise * weight.shape[-1] ** -0.5
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            buffer.data = 0.1 * torch.randn(buffer.shape)


def save(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def logits(model, ids, cache):
    out = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
    return out.logits[0].float()


def make(out, name, case):
    seed = name
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    config = config_json(case)
    dtype = getattr(torch, case.get("dtype", "bfloat16"))

    # Random weights as transformers itself saves them.
    work = folder / "work"
    work.mkdir(parents=True)
    (work / "config.json").write_text(json.dumps(config))
    auto = transformers.AutoConfig.from_pretrained(work)
    auto._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(auto)
    random_weights(model, seed)
    model.to(dtype).save_pretrained(work)
    stored = load_file(work / "model.safetensors")
    for key in list(stored):
        # Kept in float32, as published checkpoints have it.
        if key.endswith("e_score_correction_bias"):
            stored[key] = dict(model.named_buffers())[key].float()
    meant = stored
    extra = {}
    if "quantise" in case:
        stored, meant, extra = case["quantise"](stored, case)
    # What the weights mean, through transformers' own reader of the config.
    save(work, config, meant)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        work, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    shutil.rmtree(work)
    save(folder / "model", config | extra, stored)
    if "generation" in case:
        (folder / "model" / "generation_config.json").write_text(json.dumps(case["generation"], indent=1) + "\n")

    torch.manual_seed(zlib.crc32(f"{name}/input".encode()))
    ids = torch.randint(3, VOCAB, (case.get("n_input", N_INPUT),)).tolist()
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        prefill = logits(model, ids, cache)
        last, greedy, gaps, decode = prefill[-1], [], [], []
        for _ in range(N_DECODE):
            best, second = last.topk(2).values.tolist()
            gaps.append(best - second)
            greedy.append(int(last.argmax()))
            last = logits(model, greedy[-1:], cache)[-1]
            decode.append(last)
        # The same without a cache.
        whole = model(input_ids=torch.tensor([ids + greedy]), use_cache=False).logits[0].float()
    apart = (torch.cat([prefill, torch.stack(decode)]) - whole).abs().max().item()
    assert apart < 2e-5, f"{name}: the cache changes logits by {apart}"
    assert min(gaps) > 1e-3, f"{name}: greedy tokens hang on {min(gaps)}"
    script = {
        "format": "plain-golden-1",
        "case": name,
        "model_dir": "model",
        "input_ids": ids,
        "greedy_tokens": greedy,
        "min_top1_top2_gap": min(gaps),
        "logit_std": prefill.std().item(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
    }
    (folder / "script.json").write_text(json.dumps(script) + "\n")
    save_file({"prefill": prefill, "decode": torch.stack(decode)}, folder / "expected.safetensors")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{name}: logits {prefill.std():.2f}, least gap {min(gaps):.4f}, {apart:.1e} without cache, {size} bytes")


def main(out, *names):
    for name, case in CASES.items():
        if not names or name in names:
            make(Path(out), name, case)


if __name__ == "__main__":
    main(*sys.argv[1:])
