//! Tiny random models as directories of files, so that a property is tested through the real loader.
//!
//! Scaled so that logits have a standard deviation of about 1, and attention is neither uniform nor
//! a choice of one token. The same shape and seed give the same files, tensor by tensor.

use std::{collections::BTreeMap, fs, path::Path};

use half::{bf16, f16};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

/// The shape of a dense model. `..TinyModel::default()` for all that a test does not care about.
#[derive(Clone, Debug)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "each is a feature of a model"
)]
pub struct TinyModel {
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    /// Apart from `hidden / heads`.
    pub head_dim: usize,
    pub ff: usize,
    pub layers: usize,
    pub vocab: usize,
    /// Per-head norms of q and k: makes it a Qwen3.
    pub qk_norm: bool,
    /// Biases of q, k and v: makes it a Qwen2, unless there are norms as well.
    pub bias: bool,
    pub tied: bool,
    /// Queries, keys and values in one tensor, gate and up in one: makes it a Phi-3, unless it has norms or
    /// biases.
    pub fused: bool,
    /// Experts in place of the feed-forward block, of which a token takes two: makes it a Qwen3-MoE.
    pub experts: usize,
    /// Share of each head's channels that rotates, the first ones; less than all makes it a Phi-3, whatever
    /// norms and biases it has.
    pub rotary: f64,
    /// Tokens that a layer sees: makes it a Mistral, unless it is another by now. Of Qwen2 and Qwen3, layer
    /// 0 sees everything.
    pub window: Option<usize>,
    /// A latent in place of keys and values, and experts behind layer 0: makes it a DeepSeek-V3.
    pub latent: Option<TinyLatent>,
    /// Whether `config.json` is spelled as transformers 5 does it.
    pub new_config: bool,
    /// `F32`, `F16` or `BF16`.
    pub dtype: Dtype,
    pub rope: TinyRope,
}

/// Sizes of latent attention. Experts are always as in [`TinyLatent::EXPERTS`].
#[derive(Clone, Copy, Debug)]
pub struct TinyLatent {
    /// `None`: queries are made at once.
    pub q_rank: Option<usize>,
    pub rank: usize,
    pub nope: usize,
    pub rope: usize,
    pub v: usize,
    pub interleaved: bool,
}

impl TinyLatent {
    /// Experts, groups, groups that stay, experts of a token, experts that all tokens share.
    const EXPERTS: [usize; 5] = [9, 3, 2, 3, 2];

    /// Width inside an expert.
    const FF: usize = 20;

    /// What it adds to a config. What is interleaved is normalised, to have both of both.
    fn config(self, heads: usize) -> Value {
        let [experts, groups, top_groups, top_k, shared] = Self::EXPERTS;
        json!({
            "num_key_value_heads": heads,
            "head_dim": self.rope,
            "q_lora_rank": self.q_rank,
            "kv_lora_rank": self.rank,
            "qk_nope_head_dim": self.nope,
            "qk_rope_head_dim": self.rope,
            "v_head_dim": self.v,
            "rope_interleave": self.interleaved,
            "n_routed_experts": experts,
            "n_group": groups,
            "topk_group": top_groups,
            "num_experts_per_tok": top_k,
            "n_shared_experts": shared,
            "moe_intermediate_size": Self::FF,
            "first_k_dense_replace": 1,
            "norm_topk_prob": self.interleaved,
            "routed_scaling_factor": 1.5,
            "num_nextn_predict_layers": 1,
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TinyRope {
    Default,
    Llama3 { factor: f64, original: usize },
    Yarn { factor: f64, original: usize },
    LongRope { factor: f64, original: usize },
}

impl Default for TinyModel {
    fn default() -> Self {
        Self {
            hidden: 48,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            ff: 80,
            layers: 2,
            vocab: 96,
            qk_norm: false,
            bias: false,
            tied: false,
            fused: false,
            experts: 0,
            rotary: 1.0,
            window: None,
            latent: None,
            new_config: false,
            dtype: Dtype::F32,
            rope: TinyRope::Default,
        }
    }
}

impl TinyModel {
    /// Writes `config.json` and `model.safetensors` into `dir`; the seed is the name of the case.
    pub fn write(&self, dir: &Path, seed: &str) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("config.json"), self.config().to_string()).unwrap();
        let tensors = self.tensors(seed);
        let views = tensors.iter().map(|(name, (shape, bytes))| {
            (
                name,
                TensorView::new(self.dtype, shape.clone(), bytes).unwrap(),
            )
        });
        safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
    }

    fn config(&self) -> Value {
        let (model_type, architecture) = match self {
            Self {
                latent: Some(_), ..
            } => ("deepseek_v3", "DeepseekV3ForCausalLM"),
            Self { experts: 1.., .. } => ("qwen3_moe", "Qwen3MoeForCausalLM"),
            // The only one of which a part of a head may rotate.
            _ if self.rotary < 1.0 => ("phi3", "Phi3ForCausalLM"),
            Self { qk_norm: true, .. } => ("qwen3", "Qwen3ForCausalLM"),
            Self { bias: true, .. } => ("qwen2", "Qwen2ForCausalLM"),
            Self { fused: true, .. } => ("phi3", "Phi3ForCausalLM"),
            Self {
                window: Some(_), ..
            } => ("mistral", "MistralForCausalLM"),
            _ => ("llama", "LlamaForCausalLM"),
        };
        let mut rope_scaling = self.rope_scaling();
        let torch_dtype = match self.dtype {
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::BF16 => "bfloat16",
            other => panic!("no tiny model in {other:?}"),
        };
        let switched = matches!(model_type, "qwen2" | "qwen3");
        let mut config = json!({
            "architectures": [architecture],
            "model_type": model_type,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ff,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "attention_bias": self.bias,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": self.max_position(),
            "bos_token_id": 1,
            "eos_token_id": 2,
        });
        if let Some(latent) = self.latent {
            let more = latent.config(self.heads).as_object().unwrap().clone();
            config.as_object_mut().unwrap().extend(more);
            if matches!(self.rope, TinyRope::Yarn { .. }) {
                rope_scaling["mscale"] = json!(0.7);
                rope_scaling["mscale_all_dim"] = json!(1.2);
            }
        }
        if let TinyRope::LongRope { original, .. } = self.rope {
            config["original_max_position_embeddings"] = original.into();
        }
        if self.experts > 0 {
            config["num_experts"] = self.experts.into();
            config["num_experts_per_tok"] = 2.into();
            config["moe_intermediate_size"] = self.ff.into();
            config["norm_topk_prob"] = true.into();
        }
        config["sliding_window"] = self.window.into();
        if model_type.starts_with("qwen") {
            config["use_sliding_window"] = self.window.is_some().into();
        }
        if self.new_config {
            config["dtype"] = torch_dtype.into();
            if rope_scaling.is_null() {
                rope_scaling = json!({"rope_type": "default"});
            } else if let Some(name) = rope_scaling["type"].take().as_str() {
                rope_scaling["rope_type"] = name.into();
            }
            rope_scaling["rope_theta"] = json!(10_000.0);
            rope_scaling["partial_rotary_factor"] = self.rotary.into();
            config["rope_parameters"] = rope_scaling;
            let kind = |layer| match self.window {
                Some(_) if layer > 0 || !switched => "sliding_attention",
                _ => "full_attention",
            };
            config["layer_types"] = (0..self.layers).map(kind).collect();
        } else {
            config["torch_dtype"] = torch_dtype.into();
            config["rope_theta"] = json!(10_000.0);
            config["rope_scaling"] = rope_scaling;
            config["partial_rotary_factor"] = self.rotary.into();
            config["max_window_layers"] = 1.into();
        }
        config
    }

    /// What stretches its frequencies, as transformers 4 spells it.
    fn rope_scaling(&self) -> Value {
        match self.rope {
            TinyRope::Default => Value::Null,
            TinyRope::Llama3 { factor, original } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }),
            TinyRope::Yarn { factor, original } => json!({
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
            }),
            TinyRope::LongRope { .. } => {
                let [short, long] = self.factors();
                json!({"type": "longrope", "short_factor": short, "long_factor": long})
            }
        }
    }

    /// Both tables of `LongRoPE`, which no two pairs of channels share a number of.
    fn factors(&self) -> [Vec<f64>; 2] {
        let pairs = || {
            (0..self.head_dim / 2)
                .filter(|i| (2 * i) as f64 + 1.5 < self.rotary * self.head_dim as f64)
        };
        [
            pairs().map(|i| 1.0 + 0.05 * i as f64).collect(),
            pairs().map(|i| 1.5 + 0.75 * i as f64).collect(),
        ]
    }

    /// Some loaders take `max / original` for the factor, so that the two must agree.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a positive number of tokens"
    )]
    fn max_position(&self) -> usize {
        match self.rope {
            TinyRope::Default => 4096,
            TinyRope::Llama3 { factor, original }
            | TinyRope::Yarn { factor, original }
            | TinyRope::LongRope { factor, original } => (factor * original as f64) as usize,
        }
    }

    fn tensors(&self, seed: &str) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
        let Self {
            hidden,
            head_dim,
            ff,
            vocab,
            ..
        } = *self;
        let (q, kv) = (self.heads * head_dim, self.kv_heads * head_dim);
        let mut tensors = BTreeMap::new();
        // Normal numbers around `mean`. Every tensor has its own stream: adding one changes no other.
        let mut put = |name: String, shape: &[usize], mean: f64, std: f64| {
            let mut random = Random::new(&format!("{seed}/{name}"));
            let n = shape.iter().product::<usize>();
            let data = (0..n)
                .flat_map(|_| self.to_bytes(mean + std * random.normal()))
                .collect();
            tensors.insert(name, (shape.to_vec(), data));
        };
        let embed_std = if self.tied { keep(hidden) } else { 1.0 };
        put(
            "model.embed_tokens.weight".to_owned(),
            &[vocab, hidden],
            0.0,
            embed_std,
        );
        put("model.norm.weight".to_owned(), &[hidden], 1.0, 0.2);
        if !self.tied {
            put(
                "lm_head.weight".to_owned(),
                &[vocab, hidden],
                0.0,
                keep(hidden),
            );
        }
        for layer in 0..self.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            put(name("input_layernorm.weight"), &[hidden], 1.0, 0.2);
            put(name("post_attention_layernorm.weight"), &[hidden], 1.0, 0.2);
            if let Some(latent) = self.latent {
                self.put_latent(&name, latent, &mut put);
                if layer > 0 {
                    self.put_experts(&name, &mut put);
                    continue;
                }
                self.put_mlp(&name("mlp"), ff, &mut put);
                continue;
            }
            put(
                name("self_attn.q_proj.weight"),
                &[q, hidden],
                0.0,
                keep(hidden),
            );
            put(
                name("self_attn.k_proj.weight"),
                &[kv, hidden],
                0.0,
                keep(hidden),
            );
            put(
                name("self_attn.v_proj.weight"),
                &[kv, hidden],
                0.0,
                keep(hidden),
            );
            put(name("self_attn.o_proj.weight"), &[hidden, q], 0.0, keep(q));
            if self.bias {
                put(name("self_attn.q_proj.bias"), &[q], 0.0, 0.5);
                put(name("self_attn.k_proj.bias"), &[kv], 0.0, 0.5);
                put(name("self_attn.v_proj.bias"), &[kv], 0.0, 0.5);
            }
            if self.qk_norm {
                put(name("self_attn.q_norm.weight"), &[head_dim], 1.0, 0.3);
                put(name("self_attn.k_norm.weight"), &[head_dim], 1.0, 0.3);
            }
            let mut modules = vec!["mlp".to_owned()];
            if self.experts > 0 {
                let router = [self.experts, hidden];
                put(name("mlp.gate.weight"), &router, 0.0, keep(hidden));
                modules = (0..self.experts)
                    .map(|e| format!("mlp.experts.{e}"))
                    .collect();
            }
            for module in modules {
                self.put_mlp(&name(&module), ff, &mut put);
            }
        }
        if self.latent.is_some() {
            // What predicts the token after the next, which nobody reads.
            let name = format!("model.layers.{}.eh_proj.weight", self.layers);
            put(name, &[hidden, 2 * hidden], 0.0, keep(hidden));
        }
        if self.fused {
            for layer in 0..self.layers {
                fuse(&mut tensors, layer);
            }
        }
        tensors
    }

    /// Gate, up and down.
    fn put_mlp(&self, name: &str, ff: usize, put: &mut Put<'_>) {
        let hidden = self.hidden;
        for (module, shape) in [
            ("gate_proj", [ff, hidden]),
            ("up_proj", [ff, hidden]),
            ("down_proj", [hidden, ff]),
        ] {
            put(
                format!("{name}.{module}.weight"),
                &shape,
                0.0,
                keep(shape[1]),
            );
        }
    }

    fn put_latent(&self, name: &dyn Fn(&str) -> String, of: TinyLatent, put: &mut Put<'_>) {
        let (hidden, heads) = (self.hidden, self.heads);
        let mut matrix = |module: &str, out: usize, fan_in: usize| {
            let name = name(&format!("self_attn.{module}.weight"));
            put(name, &[out, fan_in], 0.0, keep(fan_in));
        };
        let q = heads * (of.nope + of.rope);
        match of.q_rank {
            None => matrix("q_proj", q, hidden),
            Some(rank) => {
                matrix("q_a_proj", rank, hidden);
                matrix("q_b_proj", q, rank);
            }
        }
        matrix("kv_a_proj_with_mqa", of.rank + of.rope, hidden);
        matrix("kv_b_proj", heads * (of.nope + of.v), of.rank);
        matrix("o_proj", hidden, heads * of.v);
        let mut vector = |part: &str, len: usize, mean: f64| {
            put(name(&format!("self_attn.{part}")), &[len], mean, 0.3);
        };
        vector("kv_a_layernorm.weight", of.rank, 1.0);
        if let Some(rank) = of.q_rank {
            vector("q_a_layernorm.weight", rank, 1.0);
        }
        if self.bias {
            vector("kv_a_proj_with_mqa.bias", of.rank + of.rope, 0.0);
            vector("o_proj.bias", hidden, 0.0);
            if let Some(rank) = of.q_rank {
                vector("q_a_proj.bias", rank, 0.0);
            }
        }
    }

    fn put_experts(&self, name: &dyn Fn(&str) -> String, put: &mut Put<'_>) {
        let (hidden, [experts, .., shared]) = (self.hidden, TinyLatent::EXPERTS);
        put(
            name("mlp.gate.weight"),
            &[experts, hidden],
            0.0,
            keep(hidden),
        );
        let bias = name("mlp.gate.e_score_correction_bias");
        put(bias, &[experts], 0.0, 0.3);
        for expert in 0..experts {
            let name = name(&format!("mlp.experts.{expert}"));
            self.put_mlp(&name, TinyLatent::FF, put);
        }
        self.put_mlp(&name("mlp.shared_experts"), shared * TinyLatent::FF, put);
    }

    fn to_bytes(&self, x: f64) -> Vec<u8> {
        #[expect(clippy::cast_possible_truncation, reason = "rounding is the point")]
        match self.dtype {
            Dtype::F32 => (x as f32).to_le_bytes().to_vec(),
            Dtype::F16 => f16::from_f64(x).to_le_bytes().to_vec(),
            Dtype::BF16 => bf16::from_f64(x).to_le_bytes().to_vec(),
            other => panic!("no tiny model in {other:?}"),
        }
    }
}

/// Adds a tensor of a name and a shape, with normal numbers of a mean and a deviation.
type Put<'a> = dyn FnMut(String, &[usize], f64, f64) + 'a;

/// The deviation of a matrix that keeps the size of its input.
fn keep(fan_in: usize) -> f64 {
    (fan_in as f64).sqrt().recip()
}

/// Puts the tensors of a layer that Phi-3 has as one below each other, in its order.
fn fuse(tensors: &mut BTreeMap<String, (Vec<usize>, Vec<u8>)>, layer: usize) {
    for (whole, parts) in [
        (
            "self_attn.qkv_proj",
            &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"][..],
        ),
        ("mlp.gate_up_proj", &["mlp.gate_proj", "mlp.up_proj"]),
    ] {
        for end in ["weight", "bias"] {
            let name = |module: &str| format!("model.layers.{layer}.{module}.{end}");
            let found = parts.iter().filter_map(|part| tensors.remove(&name(part)));
            let joined = found.reduce(|(mut shape, mut bytes), (more, rest)| {
                shape[0] += more[0];
                bytes.extend(rest);
                (shape, bytes)
            });
            tensors.extend(joined.map(|joined| (name(whole), joined)));
        }
    }
}

/// `SplitMix64`, seeded by a name.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(name: &str) -> Self {
        // FNV-1a.
        let hash = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        Self(name.bytes().fold(0xcbf2_9ce4_8422_2325, hash))
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// An integer in `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.bits() % n as u64).unwrap()
    }

    /// Uniform in `[0, 1)`.
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Mean 0, standard deviation 1: a sum of twelve uniform numbers, which needs no logarithm.
    pub fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }
}
