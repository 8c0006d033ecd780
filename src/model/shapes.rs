//! Shapes of published models, as numbers: what a bench measures without a checkpoint.

use std::path::Path;

use serde_json::{Value, json};

use super::Config;
use crate::{Error, Result};

/// Bytes that a config may have.
const MAX_BYTES: u64 = 1 << 20;

/// One row of [`SHAPES`].
#[derive(Debug)]
pub struct Shape {
    /// The name, as in `hogwild bench --shape NAME`.
    pub name: &'static str,
    family: &'static str,
    n_layers: usize,
    hidden_size: usize,
    intermediate_size: usize,
    /// Query heads, KV heads, `head_dim`.
    heads: [usize; 3],
    vocab_size: usize,
    tied: bool,
    rope_theta: f64,
    eps: f64,
    max_positions: usize,
    /// What else its `config.json` says, as JSON.
    more: &'static str,
}

/// A row of the table, with what the models of a family have in common.
const fn shape(
    name: &'static str,
    family: &'static str,
    [n_layers, hidden_size, intermediate_size]: [usize; 3],
    heads: [usize; 3],
    vocab_size: usize,
    tied: bool,
) -> Shape {
    let (rope_theta, eps, max_positions) = match family.as_bytes() {
        b"llama" => (5e5, 1e-5, 131_072),
        b"qwen2" => (1e6, 1e-5, 131_072),
        _ => (1e6, 1e-6, 40_960),
    };
    Shape {
        name,
        family,
        n_layers,
        hidden_size,
        intermediate_size,
        heads,
        vocab_size,
        tied,
        rope_theta,
        eps,
        max_positions,
        more: "{}",
    }
}

impl Shape {
    /// The row of a model whose config says more.
    const fn with(self, more: &'static str) -> Self {
        Self { more, ..self }
    }
}

const QWEN3_30B_A3B: &str = r#"{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": true}"#;
const QWEN3_235B_A22B: &str = r#"{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "norm_topk_prob": true}"#;
const DEEPSEEK_R1: &str = r#"{
    "head_dim": null, "max_position_embeddings": 163840, "rope_theta": 10000.0,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
    "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3, "norm_topk_prob": true,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc"
}"#;

/// Every shape that has a name. Phi-4 is computed as a Llama: it differs in the names of its tensors.
#[rustfmt::skip]
pub static SHAPES: &[Shape] = &[
    shape("tiny", "qwen3", [4, 256, 768], [8, 4, 32], 4096, true),
    shape("qwen2.5-0.5b", "qwen2", [24, 896, 4864], [14, 2, 64], 151_936, true),
    shape("qwen2.5-1.5b", "qwen2", [28, 1536, 8960], [12, 2, 128], 151_936, true),
    shape("qwq-32b", "qwen2", [64, 5120, 27_648], [40, 8, 128], 152_064, false),
    shape("qwen3-0.6b", "qwen3", [28, 1024, 3072], [16, 8, 128], 151_936, true),
    shape("qwen3-1.7b", "qwen3", [28, 2048, 6144], [16, 8, 128], 151_936, true),
    shape("qwen3-4b", "qwen3", [36, 2560, 9728], [32, 8, 128], 151_936, true),
    shape("qwen3-8b", "qwen3", [36, 4096, 12_288], [32, 8, 128], 151_936, false),
    shape("qwen3-14b", "qwen3", [40, 5120, 17_408], [40, 8, 128], 151_936, false),
    shape("qwen3-32b", "qwen3", [64, 5120, 25_600], [64, 8, 128], 151_936, false),
    shape("qwen3-30b-a3b", "qwen3_moe", [48, 2048, 6144], [32, 4, 128], 151_936, false).with(QWEN3_30B_A3B),
    shape("qwen3-235b-a22b", "qwen3_moe", [94, 4096, 12_288], [64, 4, 128], 151_936, false).with(QWEN3_235B_A22B),
    shape("llama3.2-1b", "llama", [16, 2048, 8192], [32, 8, 64], 128_256, true),
    shape("llama3.2-3b", "llama", [28, 3072, 8192], [24, 8, 128], 128_256, true),
    shape("llama3.1-8b", "llama", [32, 4096, 14_336], [32, 8, 128], 128_256, false),
    shape("llama3.3-70b", "llama", [80, 8192, 28_672], [64, 8, 128], 128_256, false),
    shape("deepseek-r1", "deepseek_v3", [61, 7168, 18_432], [128, 128, 192], 129_280, false).with(DEEPSEEK_R1),
    shape("phi-4", "llama", [40, 5120, 17_920], [40, 10, 128], 100_352, false),
];

impl Shape {
    /// The shape as the text of a `config.json`.
    fn to_json(&self) -> Value {
        let [heads, kv_heads, head_dim] = self.heads;
        let mut config = json!({
            "model_type": self.family,
            "num_hidden_layers": self.n_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tied,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.eps,
            "max_position_embeddings": self.max_positions,
            "hidden_act": "silu",
        });
        let more: Value = serde_json::from_str(self.more).expect("the table holds JSON");
        if let (Some(config), Value::Object(more)) = (config.as_object_mut(), more) {
            config.extend(more);
        }
        config
    }

    /// The numbers of the model.
    ///
    /// # Panics
    /// Never: every row of the table is a config.
    pub fn config(&self) -> Config {
        let text = self.to_json().to_string();
        Config::from_json(Path::new(self.name), text.as_bytes()).expect("the table holds configs")
    }
}

/// The config of a named shape, or of a `config.json` if the name ends in `.json`.
///
/// # Errors
/// [`Error::Usage`] if no shape has the name; those of [`Config::from_json`].
pub fn find(name: &str) -> Result<Config> {
    let path = Path::new(name);
    if path.extension().is_some_and(|e| e == "json") {
        let folder = path.parent().unwrap_or(Path::new(""));
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        return match super::json::read_small(folder, &file, MAX_BYTES)? {
            Some((path, bytes)) => Config::from_json(&path, &bytes),
            None => Err(Error::bad(
                path,
                "file",
                "is not there; it is to be a config.json",
            )),
        };
    }
    SHAPES
        .iter()
        .find(|shape| shape.name == name)
        .map(Shape::config)
        .ok_or_else(|| {
            let names: Vec<_> = SHAPES.iter().map(|shape| shape.name).collect();
            Error::Usage(format!(
                "no shape is called '{name}'; there are {}, and paths that end in .json",
                names.join(", ")
            ))
        })
}

#[cfg(test)]
mod tests {
    use super::super::families::Heads;
    use super::*;

    #[test]
    fn every_shape_is_a_config() {
        for shape in SHAPES {
            let config = find(shape.name).expect("it is in the table");
            assert_eq!(config.n_layers, shape.n_layers, "{}", shape.name);
        }
    }

    /// Parameters of the models as published; the table's formula is that of their files.
    #[test]
    fn the_shapes_have_as_many_parameters_as_the_models() {
        let published = [
            ("qwq-32b", 32_763_876_352),
            ("qwen3-0.6b", 596_049_920),
            ("qwen3-8b", 8_190_735_360),
            ("llama3.1-8b", 8_030_261_248),
            ("llama3.3-70b", 70_553_706_496),
            ("phi-4", 14_659_507_200),
            ("qwen3-30b-a3b", 30_532_122_624),
            ("qwen3-235b-a22b", 235_093_634_560),
            ("deepseek-r1", 671_026_419_200),
        ];
        for (name, want) in published {
            let c = find(name).expect("it is in the table");
            let (h, f) = (c.hidden_size, c.intermediate_size);
            let attention = match &c.latent {
                Some(l) => {
                    let from = l.q_rank.expect("it has a rank");
                    let head = l.nope_dim + l.rope_dim;
                    let q = h * from + from + from * c.n_heads * head;
                    let kv = h * (l.rank + l.rope_dim) + l.rank;
                    q + kv + c.n_heads * (l.rank * (l.nope_dim + l.v_dim) + l.v_dim * h)
                }
                None => h * (c.q_size() + 2 * c.kv_size()) + c.q_size() * h,
            };
            let more = match c.family.heads {
                Heads::Biased => c.q_size() + 2 * c.kv_size(),
                Heads::Normed => 2 * c.head_dim,
                Heads::Plain | Heads::Latent => 0,
            };
            let layers = (0..c.n_layers).map(|layer| {
                let experts = c.experts.as_ref().filter(|e| e.layers[layer]);
                let inside = experts.map_or(3 * h * f, |e| {
                    let bias = usize::from(c.latent.is_some()) * e.count;
                    let shared = 3 * h * e.shared_size.unwrap_or(0);
                    e.count * (3 * h * e.intermediate_size + h) + bias + shared
                });
                attention + more + inside + 2 * h
            });
            let tables = if c.tie_word_embeddings == Some(true) {
                1
            } else {
                2
            };
            let all = layers.sum::<usize>() + tables * c.vocab_size * h + h;
            assert_eq!(all, want, "{name}");
        }
    }

    #[test]
    fn an_unknown_shape_is_answered_with_those_there_are() {
        let error = find("qwen9").expect_err("no such shape").to_string();
        assert!(
            error.contains("qwq-32b") && error.contains(".json"),
            "{error}"
        );
    }
}
