//! The textbook transformer: Qwen2, Qwen3, Llama, Mistral, Phi-3 and DeepSeek-V3 in f64, O(n²), nothing clever.
//!
//! It knows no blocks and no layouts. Every token ever fed keeps the key (not rotated) and the value
//! that it was given once; a row says which of those tokens it sees and at which position each, and
//! both sides of a score are rotated there and then: `(R(p_query) q) · (R(p_key) k) / sqrt(d)`. Latents are
//! made keys and values of every head at once, as their paper has it.
//! Biases, q/k norms and a separate output head are used where their tensors exist, and tensors that hold
//! several matrices are cut into them.

use std::{collections::HashMap, f64::consts::PI, fs, iter::zip, path::Path};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;

/// A token as one row sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Which of all tokens ever fed, counted from zero in the order of feeding.
    pub token: usize,
    /// Where the row sees it: the `RoPE` position and the causal order.
    pub position: usize,
}

/// The share of one worker in a pass.
#[derive(Clone, Debug)]
pub struct Row {
    /// Ids of the new tokens. Numbers for [`Seen`] are given out row by row, from [`Textbook::len`] on.
    pub tokens: Vec<u32>,
    /// Everything that the row sees: its own new tokens, and those of other rows where it sees them.
    pub view: Vec<Seen>,
}

impl Row {
    /// A row that sees the tokens `seen`, oldest first, at the positions 0, 1, 2, …
    pub fn new(tokens: impl Into<Vec<u32>>, seen: impl IntoIterator<Item = usize>) -> Self {
        let view = seen.into_iter().enumerate();
        Self {
            tokens: tokens.into(),
            view: view
                .map(|(position, token)| Seen { token, position })
                .collect(),
        }
    }
}

/// A model, and the keys and values of every token it was ever fed.
#[derive(Clone, Debug)]
pub struct Textbook {
    heads: usize,
    kv_heads: usize,
    head_dim: usize, // of queries and keys
    eps: f64,
    rope: Rope,
    scale: f64, // of scores
    embed: Linear,
    layers: Vec<Layer>,
    norm: Vec<f64>,
    head: Option<Linear>,
    kept: Vec<Vec<Kv>>, // [layer][token]
}

#[derive(Clone, Debug)]
struct Layer {
    attention_norm: Vec<f64>,
    projections: Projections,
    o: Linear,
    window: Option<usize>, // tokens that a query sees, itself among them
    mlp_norm: Vec<f64>,
    mlp: Option<Mlp>,
    experts: Option<Experts>,
}

/// How queries, keys and values are made.
#[derive(Clone, Debug)]
enum Projections {
    Plain {
        q: Linear,
        k: Linear,
        v: Linear,
        q_norm: Option<Vec<f64>>,
        k_norm: Option<Vec<f64>>,
    },
    Latent(Latent),
}

/// Multi-head latent attention (DeepSeek-V2, equations 9 to 19): keys and values of a token are made of one
/// vector, and all heads share the part of the key that rotates.
#[derive(Clone, Debug)]
struct Latent {
    q_down: Option<(Linear, Vec<f64>)>, // and the norm behind it
    q_up: Linear,
    kv_down: Linear,
    kv_norm: Vec<f64>,
    kv_up: Linear,
    still: usize, // channels of a key that do not rotate, in front of those that do
    turning: usize,
    interleaved: bool,
}

impl Latent {
    /// These norms have an epsilon of their own in transformers, whatever the config says.
    const EPS: f64 = 1e-6;

    fn read(weights: &mut Weights, name: &str, config: &Value) -> Self {
        let number = |key: &str| usize::try_from(config[key].as_u64().unwrap()).unwrap();
        let mut linear = |part: &str| weights.linear(&format!("{name}.{part}"));
        let (q_a, q_b, q) = (linear("q_a_proj"), linear("q_b_proj"), linear("q_proj"));
        let [kv_down, kv_up] =
            ["kv_a_proj_with_mqa", "kv_b_proj"].map(|part| linear(part).unwrap());
        let mut norm = |part: &str| weights.vector(&format!("{name}.{part}.weight")).unwrap();
        Self {
            q_down: q_a.map(|down| (down, norm("q_a_layernorm"))),
            q_up: q_b.or(q).unwrap(),
            kv_down,
            kv_norm: norm("kv_a_layernorm"),
            kv_up,
            still: number("qk_nope_head_dim"),
            turning: number("qk_rope_head_dim"),
            interleaved: config["rope_interleave"] != Value::Bool(false),
        }
    }

    /// Neighbours `(2 i, 2 i + 1)` become `(i, i + n / 2)`, which is how pairs stand here.
    fn sorted(&self, turning: &[f64]) -> Vec<f64> {
        if !self.interleaved {
            return turning.to_vec();
        }
        let every_other = |first: usize| turning.iter().skip(first).step_by(2).copied();
        every_other(0).chain(every_other(1)).collect()
    }

    fn query(&self, h: &[f64]) -> Vec<f64> {
        let q = match &self.q_down {
            Some((down, norm)) => self.q_up.apply(&rms_norm(&down.apply(h), norm, Self::EPS)),
            None => self.q_up.apply(h),
        };
        let heads = q.chunks(self.still + self.turning);
        let sorted = heads.flat_map(|head| {
            let (still, turning) = head.split_at(self.still);
            [still.to_vec(), self.sorted(turning)].concat()
        });
        sorted.collect()
    }

    fn key_value(&self, h: &[f64], heads: usize) -> Kv {
        let down = self.kv_down.apply(h);
        let (latent, turning) = down.split_at(down.len() - self.turning);
        let up = self
            .kv_up
            .apply(&rms_norm(latent, &self.kv_norm, Self::EPS));
        let (mut k, mut v) = (Vec::new(), Vec::new());
        for head in up.chunks(up.len() / heads) {
            let (still, value) = head.split_at(self.still);
            k.extend([still, &self.sorted(turning)].concat());
            v.extend(value);
        }
        Kv { k, v }
    }
}

impl Projections {
    fn query(&self, h: &[f64], eps: f64) -> Vec<f64> {
        match self {
            Self::Plain { q, q_norm, .. } => norm_heads(q.apply(h), q_norm.as_deref(), eps),
            Self::Latent(latent) => latent.query(h),
        }
    }

    fn key_value(&self, h: &[f64], heads: usize, eps: f64) -> Kv {
        match self {
            Self::Plain { k, v, k_norm, .. } => Kv {
                k: norm_heads(k.apply(h), k_norm.as_deref(), eps),
                v: v.apply(h),
            },
            Self::Latent(latent) => latent.key_value(h, heads),
        }
    }
}

/// Gate, up and down: a feed-forward block, or one expert.
#[derive(Clone, Debug)]
struct Mlp([Linear; 3]);

impl Mlp {
    fn read(weights: &mut Weights, name: &str) -> Option<Self> {
        let gate = weights.linear(&format!("{name}.gate_proj"))?;
        let [up, down] =
            ["up_proj", "down_proj"].map(|part| weights.linear(&format!("{name}.{part}")).unwrap());
        Some(Self([gate, up, down]))
    }

    fn apply(&self, h: &[f64]) -> Vec<f64> {
        let [gate, up, down] = &self.0;
        let gated: Vec<_> = zip(gate.apply(h), up.apply(h))
            .map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
            .collect();
        down.apply(&gated)
    }
}

/// A mixture of experts: the best few by softmax, and their sum weighted by it; or by sigmoids and groups.
#[derive(Clone, Debug)]
struct Experts {
    router: Linear,
    all: Vec<Mlp>,
    top_k: usize,
    normalise: bool,
    sigmoids: Option<Sigmoids>,
    shared: Option<Mlp>,
}

/// What DeepSeek-V3 adds to the choice (its equations 12 to 16).
#[derive(Clone, Debug)]
struct Sigmoids {
    bias: Vec<f64>, // for the choice alone
    groups: usize,
    top_groups: usize,
    factor: f64,
}

impl Sigmoids {
    fn read(weights: &mut Weights, name: &str, config: &Value) -> Option<Self> {
        let bias = weights.vector(&format!("{name}.gate.e_score_correction_bias"))?;
        let number = |key: &str| usize::try_from(config[key].as_u64().unwrap()).unwrap();
        Some(Self {
            bias,
            groups: number("n_group"),
            top_groups: number("topk_group"),
            factor: config["routed_scaling_factor"].as_f64().unwrap(),
        })
    }

    /// The chosen experts, and the weight of each.
    fn choose(&self, logits: &[f64], top_k: usize, normalise: bool) -> Vec<(usize, f64)> {
        let scores: Vec<f64> = logits.iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect();
        let biased: Vec<f64> = zip(&scores, &self.bias).map(|(s, b)| s + b).collect();
        let size = biased.len() / self.groups;
        let of_group = |group: usize| {
            let mut best = biased[group * size..(group + 1) * size].to_vec();
            best.sort_by(|a, b| b.total_cmp(a));
            best[0] + best[1]
        };
        let mut groups: Vec<usize> = (0..self.groups).collect();
        groups.sort_by(|&a, &b| of_group(b).total_cmp(&of_group(a)));
        groups.truncate(self.top_groups);
        let mut best: Vec<usize> = (0..biased.len())
            .filter(|expert| groups.contains(&(expert / size)))
            .collect();
        best.sort_by(|&a, &b| biased[b].total_cmp(&biased[a]));
        best.truncate(top_k);
        let total = if normalise {
            best.iter().map(|&e| scores[e]).sum()
        } else {
            1.0
        };
        best.into_iter()
            .map(|e| (e, scores[e] / total * self.factor))
            .collect()
    }
}

impl Experts {
    fn read(weights: &mut Weights, name: &str, config: &Value) -> Option<Self> {
        let router = weights.linear(&format!("{name}.gate"))?;
        let mut all = Self::stacked(weights, name);
        while let Some(expert) = Mlp::read(weights, &format!("{name}.experts.{}", all.len())) {
            all.push(expert);
        }
        Some(Self {
            router,
            all,
            top_k: usize::try_from(config["num_experts_per_tok"].as_u64().unwrap()).unwrap(),
            normalise: config["norm_topk_prob"] == Value::Bool(true),
            sigmoids: Sigmoids::read(weights, name, config),
            shared: Mlp::read(weights, &format!("{name}.shared_experts")),
        })
    }

    /// Experts that are one tensor each for gate with up and for down, as transformers 5 has them.
    fn stacked(weights: &mut Weights, name: &str) -> Vec<Mlp> {
        let mut take = |part: &str| weights.0.remove(&format!("{name}.experts.{part}"));
        let (Some((wide, up)), Some((narrow, down))) = (take("gate_up_proj"), take("down_proj"))
        else {
            return Vec::new();
        };
        let linear = |weight: &[f64], cols: usize| Linear {
            weight: weight.to_vec(),
            cols,
            bias: None,
        };
        let experts = zip(
            up.chunks(wide[1] * wide[2]),
            down.chunks(narrow[1] * narrow[2]),
        );
        let mlp = |(up, down): (&[f64], &[f64])| {
            let (gate, up) = up.split_at(up.len() / 2);
            let [gate, up] = [gate, up].map(|weight| linear(weight, wide[2]));
            Mlp([gate, up, linear(down, narrow[2])])
        };
        experts.map(mlp).collect()
    }

    fn apply(&self, h: &[f64]) -> Vec<f64> {
        let logits = self.router.apply(h);
        let chosen = match &self.sigmoids {
            Some(sigmoids) => sigmoids.choose(&logits, self.top_k, self.normalise),
            None => self.by_softmax(&logits),
        };
        let mut out = match &self.shared {
            Some(shared) => shared.apply(h),
            None => vec![0.0; h.len()],
        };
        for (expert, weight) in chosen {
            for (out, v) in zip(&mut out, self.all[expert].apply(h)) {
                *out += weight * v;
            }
        }
        out
    }

    /// The chosen experts, and the weight of each.
    fn by_softmax(&self, logits: &[f64]) -> Vec<(usize, f64)> {
        let weights: Vec<f64> = logits.iter().map(|l| l.exp()).collect();
        let mut best: Vec<usize> = (0..weights.len()).collect();
        best.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
        best.truncate(self.top_k);
        let among = if self.normalise {
            best.clone()
        } else {
            (0..weights.len()).collect()
        };
        let total: f64 = among.iter().map(|&e| weights[e]).sum();
        best.into_iter().map(|e| (e, weights[e] / total)).collect()
    }
}

#[derive(Clone, Debug)]
struct Kv {
    k: Vec<f64>, // [kv_heads, head_dim], not rotated
    v: Vec<f64>, // [kv_heads, width of a value]
}

impl Textbook {
    /// Reads `config.json` and every `*.safetensors` of a model directory; for short texts, where that
    /// makes a difference.
    ///
    /// # Errors
    /// What the model asks for that is not in this textbook.
    pub fn load(dir: &Path) -> Result<Self, String> {
        Self::load_for(dir, 0)
    }

    /// The same, for texts of up to `context` tokens.
    ///
    /// # Errors
    /// What the model asks for that is not in this textbook.
    pub fn load_for(dir: &Path, context: usize) -> Result<Self, String> {
        let config: Value =
            serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
        supported(&config)?;
        let rope = Rope::from_config(&config, context)?;
        let number = |key: &str| config[key].as_u64().map(|n| usize::try_from(n).unwrap());
        let heads = number("num_attention_heads").unwrap();
        let kv_heads = number("num_key_value_heads").unwrap_or(heads);
        let kv_size = kv_heads * head_dim(&config);
        let ff = number("intermediate_size").unwrap();

        let mut weights = read_weights(dir);
        let n_layers = number("num_hidden_layers").unwrap();
        // Layers behind the last predict further tokens.
        let is_extra = |name: &String| {
            number("num_nextn_predict_layers").is_some()
                && name.starts_with(&format!("model.layers.{n_layers}."))
        };
        weights.0.retain(|name, _| !is_extra(name));
        let layers: Vec<_> = (0..n_layers)
            .map(|n| {
                let name = |part: &str| format!("model.layers.{n}.{part}");
                let sizes = [heads * head_dim(&config), kv_size, kv_size];
                weights.cut(
                    &name("self_attn.qkv_proj"),
                    &["q_proj", "k_proj", "v_proj"],
                    &sizes,
                );
                weights.cut(
                    &name("mlp.gate_up_proj"),
                    &["gate_proj", "up_proj"],
                    &[ff, ff],
                );
                Layer {
                    window: window(&config, n),
                    attention_norm: weights.vector(&name("input_layernorm.weight")).unwrap(),
                    projections: if config["kv_lora_rank"].is_null() {
                        Projections::Plain {
                            q: weights.linear(&name("self_attn.q_proj")).unwrap(),
                            k: weights.linear(&name("self_attn.k_proj")).unwrap(),
                            v: weights.linear(&name("self_attn.v_proj")).unwrap(),
                            q_norm: weights.vector(&name("self_attn.q_norm.weight")),
                            k_norm: weights.vector(&name("self_attn.k_norm.weight")),
                        }
                    } else {
                        let name = name("self_attn");
                        Projections::Latent(Latent::read(&mut weights, &name, &config))
                    },
                    o: weights.linear(&name("self_attn.o_proj")).unwrap(),
                    mlp_norm: weights
                        .vector(&name("post_attention_layernorm.weight"))
                        .unwrap(),
                    mlp: Mlp::read(&mut weights, &name("mlp")),
                    experts: Experts::read(&mut weights, &name("mlp"), &config),
                }
            })
            .collect();
        let embed = weights.linear("model.embed_tokens").unwrap();
        let norm = weights.vector("model.norm.weight").unwrap();
        // A head that is there is one, whatever the config says of ties.
        let tied = config["tie_word_embeddings"] == Value::Bool(true);
        let head = weights.linear("lm_head");
        assert!(tied || head.is_some(), "an untied model without lm_head");
        assert!(
            weights.0.is_empty(),
            "tensors nobody reads: {:?}",
            weights.0.keys()
        );

        Ok(Self {
            heads,
            kv_heads,
            head_dim: rope.first + head_dim(&config),
            scale: scale(&config, rope.first + head_dim(&config)),
            eps: config["rms_norm_eps"].as_f64().unwrap(),
            rope,
            embed,
            kept: vec![vec![]; layers.len()],
            layers,
            norm,
            head,
        })
    }

    /// The inverse frequencies, one for each pair of channels that rotates, and what multiplies cos and sin.
    pub fn rope(&self) -> (&[f32], f64) {
        (&self.rope.inv_freq, self.rope.multiplier)
    }

    /// How many tokens were ever fed: the number of the next one.
    pub fn len(&self) -> usize {
        self.kept[0].len()
    }

    /// How many layers there are.
    pub fn n_layers(&self) -> usize {
        self.layers.len()
    }

    /// One forward of all rows together: logits of each new token, `[row][token][vocab]`.
    ///
    /// # Panics
    /// If a row does not see each of its own new tokens exactly once, or sees a token never fed.
    pub fn forward(&mut self, rows: &[Row]) -> Vec<Vec<Vec<f64>>> {
        let first = self.len();
        // The hidden states of all new tokens, rows one after the other.
        let ids = rows.iter().flat_map(|row| &row.tokens);
        let mut x: Vec<Vec<f64>> = ids
            .map(|&id| self.embed.row(id as usize).to_vec())
            .collect();

        for (layer, kept) in zip(&self.layers, &mut self.kept) {
            // All rows store before any row attends: that is how they see each other's new tokens.
            let normed: Vec<_> = x
                .iter()
                .map(|x| rms_norm(x, &layer.attention_norm, self.eps))
                .collect();
            for h in &normed {
                kept.push(layer.projections.key_value(h, self.heads, self.eps));
            }

            let mut n = 0;
            for row in rows {
                let keys = row.view.iter().map(|seen| {
                    self.rope
                        .rotate(&kept[seen.token].k, self.head_dim, seen.position)
                });
                let keys: Vec<_> = keys.collect();
                for _ in &row.tokens {
                    let position = position_of(first + n, &row.view);
                    let q = layer.projections.query(&normed[n], self.eps);
                    let q = self.rope.rotate(&q, self.head_dim, position);
                    let past: Vec<_> = zip(&row.view, &keys)
                        .filter(|(seen, _)| seen.position <= position)
                        .filter(|(seen, _)| {
                            layer.window.is_none_or(|w| position - seen.position < w)
                        })
                        .map(|(seen, k)| (k.as_slice(), kept[seen.token].v.as_slice()))
                        .collect();
                    let attended = attend(&q, &past, [self.heads, self.kv_heads], self.scale);
                    add(&mut x[n], &layer.o.apply(&attended));
                    n += 1;
                }
            }

            for x in &mut x {
                let h = rms_norm(x, &layer.mlp_norm, self.eps);
                match &layer.experts {
                    None => add(x, &layer.mlp.as_ref().unwrap().apply(&h)),
                    Some(experts) => add(x, &experts.apply(&h)),
                }
            }
        }

        let head = self.head.as_ref().unwrap_or(&self.embed);
        let mut logits = x
            .iter()
            .map(|x| head.apply(&rms_norm(x, &self.norm, self.eps)));
        rows.iter()
            .map(|row| logits.by_ref().take(row.tokens.len()).collect())
            .collect()
    }

    /// The key of a token as it looks at a position, `[kv_heads, head_dim]`.
    pub fn key(&self, layer: usize, token: usize, position: usize) -> Vec<f64> {
        let k = &self.kept[layer][token].k;
        self.rope.rotate(k, self.head_dim, position)
    }

    /// The value of a token, `[kv_heads, head_dim]`.
    pub fn value(&self, layer: usize, token: usize) -> &[f64] {
        &self.kept[layer][token].v
    }
}

/// `y = W x + b`, weights `[out, in]`; an embedding is the same thing read by rows.
#[derive(Clone, Debug)]
struct Linear {
    weight: Vec<f64>,
    cols: usize,
    bias: Option<Vec<f64>>,
}

impl Linear {
    fn row(&self, n: usize) -> &[f64] {
        &self.weight[n * self.cols..(n + 1) * self.cols]
    }

    fn apply(&self, x: &[f64]) -> Vec<f64> {
        assert_eq!(x.len(), self.cols, "a vector does not fit its matrix");
        let mut y: Vec<_> = self
            .weight
            .chunks(self.cols)
            .map(|row| dot(row, x))
            .collect();
        if let Some(bias) = &self.bias {
            add(&mut y, bias);
        }
        y
    }
}

/// Rotary embedding of the pairs `(i, i + n)` of a head, of which there are n, from a channel on; the channels
/// before and behind them stay.
#[derive(Clone, Debug)]
struct Rope {
    first: usize,
    inv_freq: Vec<f32>, // rounded to f32 as transformers keeps them; angles are f64
    multiplier: f64,    // of cos and sin, so a score gets its square
}

impl Rope {
    fn rotate(&self, heads: &[f64], head_dim: usize, position: usize) -> Vec<f64> {
        let half = self.inv_freq.len();
        let mut out = heads.to_vec();
        for head in out.chunks_mut(head_dim) {
            for (i, &inv_freq) in self.inv_freq.iter().enumerate() {
                let (sin, cos) = (position as f64 * f64::from(inv_freq)).sin_cos();
                let (a, b) = (head[self.first + i], head[self.first + i + half]);
                head[self.first + i] = (a * cos - b * sin) * self.multiplier;
                head[self.first + i + half] = (b * cos + a * sin) * self.multiplier;
            }
        }
        out
    }

    fn from_config(config: &Value, context: usize) -> Result<Self, String> {
        // `rope_parameters` since transformers 5, `rope_scaling` (or null) before.
        let rope = [&config["rope_parameters"], &config["rope_scaling"]];
        let rope = rope
            .into_iter()
            .find(|value| value.is_object())
            .unwrap_or(&Value::Null);
        let number = |key: &str| rope[key].as_f64().or(config[key].as_f64());
        let kind = rope["rope_type"]
            .as_str()
            .or(rope["type"].as_str())
            .unwrap_or("default");
        let part = number("partial_rotary_factor").unwrap_or(1.0);
        let dim = (part * head_dim(config) as f64).floor();
        let theta = number("rope_theta").unwrap_or(10_000.0);
        let pairs = (0..head_dim(config) / 2).filter(|&i| ((2 * i) as f64) < dim);
        let plain = pairs.map(|i| theta.powf(-2.0 * i as f64 / dim));
        let longest = number("max_position_embeddings").unwrap_or(2048.0);
        let original = number("original_max_position_embeddings").unwrap_or(longest);
        let factor = rope["factor"].as_f64().unwrap_or(longest / original);
        let or = |key: &str, default: f64| rope[key].as_f64().unwrap_or(default);

        let mut multiplier = 1.0;
        let inv_freq: Vec<f64> = match kind {
            "default" => plain.collect(),
            "llama3" => {
                // Long waves are slowed down, short ones stay, in between a mixture.
                let (low, high) = (or("low_freq_factor", 1.0), or("high_freq_factor", 4.0));
                let slow = |inv: f64| {
                    let turns = original * inv / (2.0 * PI);
                    let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    inv * (keep + (1.0 - keep) / factor)
                };
                plain.map(slow).collect()
            }
            "yarn" => {
                // The channel that makes `turns` full turns in the original context.
                let channel =
                    |turns: f64| dim * (original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
                let (mut low, mut high) = (
                    channel(or("beta_fast", 32.0)),
                    channel(or("beta_slow", 1.0)),
                );
                if rope["truncate"] != Value::Bool(false) {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                let width = if high > low { high - low } else { 0.001 };
                let slow = |(i, inv): (usize, f64)| {
                    let slowed = ((i as f64 - low) / width).clamp(0.0, 1.0);
                    inv * (1.0 - slowed + slowed / factor)
                };
                let scale = |m: f64| {
                    if factor > 1.0 {
                        0.1 * m * factor.ln() + 1.0
                    } else {
                        1.0
                    }
                };
                let (m, all) = (or("mscale", 0.0), or("mscale_all_dim", 0.0));
                let both = m != 0.0 && all != 0.0;
                multiplier = or(
                    "attention_factor",
                    if both {
                        scale(m) / scale(all)
                    } else {
                        scale(1.0)
                    },
                );
                plain.enumerate().map(slow).collect()
            }
            "longrope" => {
                let grown = (factor.ln() / original.ln() + 1.0).sqrt();
                multiplier = or("attention_factor", if factor > 1.0 { grown } else { 1.0 });
                let is_long = context as f64 > original;
                let table = &rope[if is_long {
                    "long_factor"
                } else {
                    "short_factor"
                }];
                let factors = table
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|f| f.as_f64().unwrap());
                zip(plain, factors)
                    .map(|(inv, factor)| inv / factor)
                    .collect()
            }
            other => return Err(format!("rope type {other}")),
        };
        #[expect(
            clippy::cast_possible_truncation,
            reason = "transformers keeps them in f32"
        )]
        let inv_freq = inv_freq.into_iter().map(|inv| inv as f32).collect();
        Ok(Self {
            first: usize::try_from(config["qk_nope_head_dim"].as_u64().unwrap_or(0)).unwrap(),
            inv_freq,
            multiplier,
        })
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    zip(a, b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut [f64], y: &[f64]) {
    zip(x, y).for_each(|(x, y)| *x += y);
}

/// Softmax attention of all heads of one query over (key, value) pairs.
fn attend(
    q: &[f64],
    past: &[(&[f64], &[f64])],
    [heads, kv_heads]: [usize; 2],
    scale: f64,
) -> Vec<f64> {
    let (d, wide) = (q.len() / heads, past[0].1.len() / kv_heads);
    let mut out = vec![0.0; heads * wide];
    for (head, (q, out)) in zip(q.chunks(d), out.chunks_mut(wide)).enumerate() {
        let kv_head = head / (heads / kv_heads);
        let scores = past
            .iter()
            .map(|(k, _)| dot(q, &k[kv_head * d..(kv_head + 1) * d]) * scale);
        let scores: Vec<_> = scores.collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
        for (score, (_, v)) in zip(scores, past) {
            let weight = (score - max).exp() / sum;
            let v = &v[kv_head * wide..(kv_head + 1) * wide];
            zip(&mut *out, v).for_each(|(out, v)| *out += weight * v);
        }
    }
    out
}

fn rms_norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let scale = (dot(x, x) / x.len() as f64 + eps).sqrt().recip();
    zip(x, weight).map(|(x, w)| x * scale * w).collect()
}

/// Normalises every head by itself where the model has such a weight.
fn norm_heads(heads: Vec<f64>, weight: Option<&[f64]>, eps: f64) -> Vec<f64> {
    match weight {
        Some(weight) => heads
            .chunks(weight.len())
            .flat_map(|head| rms_norm(head, weight, eps))
            .collect(),
        None => heads,
    }
}

fn position_of(token: usize, view: &[Seen]) -> usize {
    let mut own = view.iter().filter(|seen| seen.token == token);
    let position = own.next().expect("a row sees its own new tokens").position;
    assert!(own.next().is_none(), "token {token} twice in one view");
    position
}

/// Width of a head, of latents that of the channels which rotate.
fn head_dim(config: &Value) -> usize {
    let number = |key: &str| config[key].as_u64();
    let dim = number("qk_rope_head_dim")
        .or(number("head_dim"))
        .unwrap_or_else(|| number("hidden_size").unwrap() / number("num_attention_heads").unwrap());
    usize::try_from(dim).unwrap()
}

/// What multiplies scores: DeepSeek-V3 has `YaRN`'s temperature there, squared, where `mscale_all_dim` is set.
fn scale(config: &Value, dim: usize) -> f64 {
    let plain = (dim as f64).sqrt().recip();
    let rope = [&config["rope_parameters"], &config["rope_scaling"]];
    let number = |key: &str| rope.iter().find_map(|rope| rope[key].as_f64());
    match (number("mscale_all_dim"), number("factor")) {
        (Some(all), Some(factor)) if config["model_type"] == "deepseek_v3" && factor > 1.0 => {
            plain * (0.1 * all * factor.ln() + 1.0).powi(2)
        }
        _ => plain,
    }
}

/// Refuses what the textbook does not teach: a silent guess would be worse than no opinion.
fn supported(config: &Value) -> Result<(), String> {
    let model_type = config["model_type"].as_str().unwrap_or("none");
    let known = [
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "llama",
        "mistral",
        "phi3",
        "deepseek_v3",
    ];
    if !known.contains(&model_type) {
        return Err(format!("model type {model_type}"));
    }
    if !config["quantization_config"].is_null() {
        return Err("quantised weights".to_owned());
    }
    match config["hidden_act"].as_str() {
        None | Some("silu") => Ok(()),
        Some(other) => Err(format!("activation {other}")),
    }
}

/// How many tokens a layer sees, if not all.
fn window(config: &Value, layer: usize) -> Option<usize> {
    let number = |key: &str| usize::try_from(config[key].as_u64()?).ok();
    let slides = match (&config["layer_types"][layer], config["model_type"].as_str()) {
        (Value::String(kind), _) => kind == "sliding_attention",
        (_, Some("mistral" | "phi3")) => true,
        (_, Some("qwen3_moe")) => config["use_sliding_window"] == Value::Bool(true),
        (_, Some("qwen2" | "qwen3")) => {
            config["use_sliding_window"] == Value::Bool(true)
                && layer >= number("max_window_layers").unwrap_or(28)
        }
        _ => false,
    };
    number("sliding_window").filter(|_| slides)
}

struct Weights(HashMap<String, (Vec<usize>, Vec<f64>)>);

impl Weights {
    fn vector(&mut self, name: &str) -> Option<Vec<f64>> {
        self.0.remove(name).map(|(_, data)| data)
    }

    /// Cuts a module that holds several, rows below rows, where there is one: `parts` take its place.
    fn cut(&mut self, whole: &str, parts: &[&str], sizes: &[usize]) {
        let (prefix, _) = whole.rsplit_once('.').unwrap();
        for end in ["weight", "bias"] {
            let Some((shape, data)) = self.0.remove(&format!("{whole}.{end}")) else {
                continue;
            };
            assert_eq!(
                shape[0],
                sizes.iter().sum::<usize>(),
                "{whole}: rows of all parts"
            );
            let cols: usize = shape[1..].iter().product();
            let mut rest = data.as_slice();
            for (part, &rows) in zip(parts, sizes) {
                let (mine, others) = rest.split_at(rows * cols);
                let shape = [&[rows], &shape[1..]].concat();
                self.0
                    .insert(format!("{prefix}.{part}.{end}"), (shape, mine.to_vec()));
                rest = others;
            }
        }
    }

    fn linear(&mut self, name: &str) -> Option<Linear> {
        let (shape, weight) = self.0.remove(&format!("{name}.weight"))?;
        let bias = self.vector(&format!("{name}.bias"));
        Some(Linear {
            weight,
            cols: shape[1],
            bias,
        })
    }
}

fn read_weights(dir: &Path) -> Weights {
    let mut weights = HashMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_some_and(|extension| extension == "safetensors")
        {
            let bytes = fs::read(path).unwrap();
            for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().iter() {
                weights.insert(name.to_owned(), (tensor.shape().to_vec(), to_f64(&tensor)));
            }
        }
    }
    Weights(weights)
}

fn to_f64(tensor: &TensorView<'_>) -> Vec<f64> {
    let two = || tensor.data().chunks(2).map(|b| [b[0], b[1]]);
    match tensor.dtype() {
        Dtype::F32 => {
            let four = tensor.data().chunks(4).map(|b| [b[0], b[1], b[2], b[3]]);
            four.map(|b| f32::from_le_bytes(b).into()).collect()
        }
        Dtype::F16 => two().map(|b| half::f16::from_le_bytes(b).into()).collect(),
        Dtype::BF16 => two().map(|b| half::bf16::from_le_bytes(b).into()).collect(),
        other => panic!("weights in {other:?}"),
    }
}
