"""Makes stories260K_greedy_200.json: a greedy continuation by Hugging Face transformers.

    python make_stories260K.py MODEL_DIR > stories260K_greedy_200.json

MODEL_DIR holds Karpathy's stories260K as config.json, model.safetensors and tokenizer.json. Float32 on
the CPU, eager attention, token by token with transformers' own cache; end tokens end nothing. The prompt
is encoded as transformers does by default, with what tokenizer.json's post_processor puts around it.
"""

import json
import platform
import sys

import numpy
import safetensors
import tokenizers
import torch
import transformers

PROMPT = "Once upon a time"
N_TOKENS = 200


def main(directory):
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{directory}/tokenizer.json")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, torch_dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompt = tokenizer(PROMPT).input_ids
    feed, cache, tokens, gaps = prompt, transformers.DynamicCache(), [], []
    with torch.no_grad():
        for _ in range(N_TOKENS):
            out = model(input_ids=torch.tensor([feed]), past_key_values=cache, use_cache=True)
            best, second = out.logits[0, -1].topk(2).values.tolist()
            gaps.append(best - second)
            tokens.append(int(out.logits[0, -1].argmax()))
            feed = tokens[-1:]
    result = {
        "model": "stories260K",
        "prompt": PROMPT,
        "prompt_ids": prompt,
        "greedy_tokens": tokens,
        "text": tokenizer.decode(tokens),
        "min_top1_top2_gap": min(gaps),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
            "numpy": numpy.__version__,
        },
    }
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main(sys.argv[1])
