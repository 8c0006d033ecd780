//! The tensors that a model needs: their names, their shapes, and which of them exist.
//!
//! A tensor that would have to change the computation and does not is refused, so that a model is
//! either computed as it was made or not at all. Which matrices are quantised is seen from the tensors,
//! one by one: lists of exceptions in published configs are known to be wrong.

use std::collections::{BTreeMap, HashSet};

use super::config::{Config, Latent};
use super::header::{Dtype, Entry};
use super::json::shown;
use super::quant::{Format, Packed, Role};
use super::weights::Checkpoint;
use crate::{Error, Result};

/// Tensors that a model has all of, in every layer, or none of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Group {
    /// Those that every model has.
    Always,
    /// Biases of queries, keys and values.
    QkvBias,
    /// Bias of the projection after attention.
    OutBias,
    /// Norms on queries and keys, before their rotation.
    QkNorm,
    /// Biases of the feed-forward block.
    MlpBias,
    /// A head that is not the embedding.
    Head,
}

/// What the elements of a tensor may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// F32, F16 or BF16.
    Float,
    /// `F8_E4M3`: floats that have scales beside them.
    Eight,
    /// I32: packed codes, or small numbers.
    Words,
    /// I32 or I64.
    Counts,
}

/// A tensor that a model needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    /// Its name.
    pub name: String,
    /// Its shape; a matrix is `[out, in]`.
    pub shape: Vec<usize>,
    /// What it depends on.
    pub group: Group,
    /// What its elements may be.
    pub kind: Kind,
}

/// The name of a tensor of a layer: `layer_name(2, "mlp.up_proj.weight")`.
pub fn layer_name(layer: usize, tensor: &str) -> String {
    format!("model.layers.{layer}.{tensor}")
}

/// The layer that a tensor's name puts it in, if any.
fn layer_of(name: &str) -> Option<usize> {
    let (layer, _) = name.strip_prefix("model.layers.")?.split_once('.')?;
    layer.parse().ok()
}

/// Every tensor that a layer may have, with its shape.
pub fn layer_tensors(config: &Config, layer: usize) -> Vec<Want> {
    let (h, q, kv) = (config.hidden_size, config.q_size(), config.kv_size());
    let (ff, d) = (config.intermediate_size, config.head_dim);
    let table: [(&str, &[usize], Group); 18] = [
        ("input_layernorm.weight", &[h], Group::Always),
        ("self_attn.q_proj.weight", &[q, h], Group::Always),
        ("self_attn.k_proj.weight", &[kv, h], Group::Always),
        ("self_attn.v_proj.weight", &[kv, h], Group::Always),
        ("self_attn.o_proj.weight", &[h, q], Group::Always),
        ("self_attn.q_proj.bias", &[q], Group::QkvBias),
        ("self_attn.k_proj.bias", &[kv], Group::QkvBias),
        ("self_attn.v_proj.bias", &[kv], Group::QkvBias),
        ("self_attn.o_proj.bias", &[h], Group::OutBias),
        ("self_attn.q_norm.weight", &[d], Group::QkNorm),
        ("self_attn.k_norm.weight", &[d], Group::QkNorm),
        ("post_attention_layernorm.weight", &[h], Group::Always),
        ("mlp.gate_proj.weight", &[ff, h], Group::Always),
        ("mlp.up_proj.weight", &[ff, h], Group::Always),
        ("mlp.down_proj.weight", &[h, ff], Group::Always),
        ("mlp.gate_proj.bias", &[ff], Group::MlpBias),
        ("mlp.up_proj.bias", &[ff], Group::MlpBias),
        ("mlp.down_proj.bias", &[h], Group::MlpBias),
    ];
    let want = |(name, shape, group): (&str, &[usize], Group)| Want {
        name: layer_name(layer, name),
        shape: shape.to_vec(),
        group,
        kind: Kind::Float,
    };
    let mut all: Vec<Want> = table.into_iter().map(want).collect();
    if let Some(latent) = &config.latent {
        let is_attention = |want: &Want| want.name.contains(".self_attn.");
        let at = all.iter().position(is_attention).unwrap_or(0);
        all.retain(|want| !is_attention(want));
        let attention = latent_tensors(config, latent);
        let wants = attention
            .iter()
            .map(|(name, shape, group)| want((name, shape, *group)));
        all.splice(at..at, wants);
    }
    if let Some(experts) = config.experts(layer) {
        let (count, ff) = (experts.count, experts.intermediate_size);
        all.retain(|want| !want.name.contains(".mlp."));
        all.push(want((ROUTER, &[count, h], Group::Always)));
        if experts.routing.sigmoid {
            all.push(want((CHOICE_BIAS, &[count], Group::Always)));
        }
        for expert in 0..count {
            for (module, shape) in [
                ("gate_proj", [ff, h]),
                ("up_proj", [ff, h]),
                ("down_proj", [h, ff]),
            ] {
                let name = expert_name(expert, module);
                all.push(want((&name, &shape, Group::Always)));
            }
        }
        if let Some(ff) = experts.shared_size {
            for (module, shape) in [
                ("gate_proj", [ff, h]),
                ("up_proj", [ff, h]),
                ("down_proj", [h, ff]),
            ] {
                let name = format!("{SHARED}.{module}.weight");
                all.push(want((&name, &shape, Group::Always)));
            }
        }
    }
    all
}

/// The tensors of attention by a latent.
fn latent_tensors(config: &Config, latent: &Latent) -> Vec<(&'static str, Vec<usize>, Group)> {
    let (h, heads) = (config.hidden_size, config.n_heads);
    let Latent {
        rank,
        nope_dim,
        rope_dim,
        v_dim,
        ..
    } = *latent;
    let q = heads * (nope_dim + rope_dim);
    let always = |name, shape: &[usize]| (name, shape.to_vec(), Group::Always);
    let bias = |name, len| (name, vec![len], Group::QkvBias);
    let mut all = match latent.q_rank {
        None => vec![always(Q, &[q, h])],
        Some(q_rank) => vec![
            always(Q_A, &[q_rank, h]),
            always(Q_NORM, &[q_rank]),
            always(Q_B, &[q, q_rank]),
            bias(Q_A_BIAS, q_rank),
        ],
    };
    all.extend([
        always(KV_A, &[rank + rope_dim, h]),
        always(KV_NORM, &[rank]),
        always(KV_B, &[heads * (nope_dim + v_dim), rank]),
        always("self_attn.o_proj.weight", &[h, heads * v_dim]),
        bias(KV_A_BIAS, rank + rope_dim),
        ("self_attn.o_proj.bias", vec![h], Group::OutBias),
    ]);
    all
}

/// The queries of latent attention, where they are made at once.
pub const Q: &str = "self_attn.q_proj.weight";

/// What its queries are made from.
pub const Q_A: &str = "self_attn.q_a_proj.weight";

/// The bias of that.
pub const Q_A_BIAS: &str = "self_attn.q_a_proj.bias";

/// The norm on it.
pub const Q_NORM: &str = "self_attn.q_a_layernorm.weight";

/// The queries, of that.
pub const Q_B: &str = "self_attn.q_b_proj.weight";

/// The latent, and the rotated channels of all keys.
pub const KV_A: &str = "self_attn.kv_a_proj_with_mqa.weight";

/// The bias of that.
pub const KV_A_BIAS: &str = "self_attn.kv_a_proj_with_mqa.bias";

/// The norm on the latent.
pub const KV_NORM: &str = "self_attn.kv_a_layernorm.weight";

/// Keys and values of every head, of the latent.
pub const KV_B: &str = "self_attn.kv_b_proj.weight";

/// The matrix that chooses experts.
pub const ROUTER: &str = "mlp.gate.weight";

/// What is added to the scores of experts for the choice alone.
pub const CHOICE_BIAS: &str = "mlp.gate.e_score_correction_bias";

/// The experts that all tokens share, as one.
pub const SHARED: &str = "mlp.shared_experts";

/// A matrix of an expert: `expert_name(3, "up_proj")`.
pub fn expert_name(expert: usize, module: &str) -> String {
    format!("mlp.experts.{expert}.{module}.weight")
}

/// Every tensor that a model may have, with its shape, in the order of computation.
pub fn all_tensors(config: &Config) -> Vec<Want> {
    let outer = |name: &str, shape: &[usize], group| Want {
        name: name.to_owned(),
        shape: shape.to_vec(),
        group,
        kind: Kind::Float,
    };
    let (vocab, h) = (config.vocab_size, config.hidden_size);
    let mut all = vec![outer(EMBED, &[vocab, h], Group::Always)];
    all.extend((0..config.n_layers).flat_map(|layer| layer_tensors(config, layer)));
    all.push(outer(NORM, &[h], Group::Always));
    all.push(outer(HEAD, &[vocab, h], Group::Head));
    all
}

/// Name of the embedding.
pub const EMBED: &str = "model.embed_tokens.weight";

/// Name of the last norm.
pub const NORM: &str = "model.norm.weight";

/// Name of the head, where it is not the embedding.
pub const HEAD: &str = "lm_head.weight";

/// The tensors of a checkpoint that a model needs, all of them found in their right shapes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMap {
    wants: Vec<Want>,
    groups: HashSet<Group>,
    /// Quantised matrices, by the name that they have in float.
    packed: BTreeMap<String, Packed>,
    /// Tensors that are rows of another one: its name, and the first of them.
    fused: Places,
}

impl TensorMap {
    /// Finds the tensors that a model needs.
    ///
    /// Which biases and norms it has follows from the tensors: one of a [`Group`] in one layer
    /// means all of the group in every layer. So does whether matrices are fused, whatever the family,
    /// layer by layer.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape or type, or if there is one that would have to
    /// change the computation and does not.
    pub fn new(config: &Config, checkpoint: &Checkpoint) -> Result<Self> {
        let (all, fused) = fuse(config, checkpoint, all_tensors(config))?;
        let found = |want: &&Want| checkpoint.tensors().contains_key(&want.name);
        let mut groups: HashSet<Group> = all.iter().filter(found).map(|w| w.group).collect();
        groups.insert(Group::Always);
        // Where the config does not say, the tensors do; and a head of its own is one, whatever the config says.
        if config.tie_word_embeddings == Some(true) && groups.contains(&Group::Head) {
            if checkpoint.are_equal(HEAD, EMBED)? {
                groups.remove(&Group::Head);
            } else {
                let path = checkpoint.main_path();
                let path = path.display();
                log::warn!(
                    "{path}: {HEAD} is not the embedding, though the config ties them; it is the head"
                );
            }
        }
        if config.tie_word_embeddings == Some(false) {
            groups.insert(Group::Head);
        }

        let (mut wants, packed) = unpack(config, checkpoint, all)?;
        let known: HashSet<&str> = wants.iter().map(|w| w.name.as_str()).collect();
        let behind = config.n_layers..config.n_layers + config.extra_layers;
        for (name, entry) in checkpoint.tensors() {
            let is_extra = layer_of(name).is_some_and(|layer| behind.contains(&layer));
            // Of no experts that all tokens share there are matrices without rows.
            let is_empty = entry.len == 0;
            let is_known = known.contains(name.as_str()) || name.ends_with(".rotary_emb.inv_freq");
            if is_known || is_extra || is_empty {
                continue;
            }
            let path = checkpoint.path_of(entry);
            if name.starts_with("model.") || name.starts_with("lm_head.") {
                let what = format!("tensor {}", shown(name));
                return Err(Error::unsupported(path, what, advice(config, name)));
            }
            log::warn!("{}: {name} is ignored", path.display());
        }

        wants.retain(|want| groups.contains(&want.group));
        for want in &wants {
            checkpoint.expect(want)?;
        }
        Ok(Self {
            wants,
            groups,
            packed,
            fused,
        })
    }

    /// The tensors that the model needs, in the order of computation.
    pub fn wants(&self) -> &[Want] {
        &self.wants
    }

    /// Whether the model has the tensors of a group.
    pub fn has(&self, group: Group) -> bool {
        self.groups.contains(&group)
    }

    /// Whether the head is the embedding.
    pub fn is_tied(&self) -> bool {
        !self.has(Group::Head)
    }

    /// Where a tensor of [`layer_tensors`] is: the tensor that holds it, and the row at which it begins.
    pub fn place<'a>(&'a self, name: &'a str) -> (&'a str, usize) {
        self.fused
            .get(name)
            .map_or((name, 0), |(whole, first)| (whole, *first))
    }

    /// How a matrix is packed, by the name that it has in float; none if it is float.
    pub fn packed(&self, name: &str) -> Option<&Packed> {
        self.packed.get(name)
    }

    /// Every quantised matrix.
    pub fn all_packed(&self) -> impl Iterator<Item = &Packed> {
        self.packed.values()
    }
}

/// Ends of the names of codes, and of what is only beside codes.
const CODES: [&str; 4] = ["qweight", "weight_packed", "_scale_inv", ".weight_scale"];

/// What to do about a tensor that no model of this kind has.
fn advice(config: &Config, name: &str) -> String {
    let codes = CODES.iter().any(|end| name.ends_with(end));
    if codes && config.quantised.is_none() {
        return "config.json does not say how it is quantised".into();
    }
    if codes {
        return "only the matrices of layers are read quantised, in the format that config.json names"
            .into();
    }
    format!(
        "a {} model of {} layers has none of this name",
        config.family.model_type, config.n_layers
    )
}

/// Modules that some files hold as one, row below row: its name, and theirs in order.
const FUSED: [(&str, &[&str]); 2] = [
    (
        "self_attn.qkv_proj",
        &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ),
    ("mlp.gate_up_proj", &["mlp.gate_proj", "mlp.up_proj"]),
];

/// The tensor that a part would be in, `model.layers.0.mlp.gate_up_proj.bias` for
/// `model.layers.0.mlp.up_proj.bias`: its module, with a dot, and what follows.
fn whole_of(name: &str) -> Option<(String, &str)> {
    let (module, end) = name.rsplit_once('.')?;
    FUSED.iter().find_map(|(whole, parts)| {
        let layer = parts.iter().find_map(|part| module.strip_suffix(part))?;
        Some((format!("{layer}{whole}."), end))
    })
}

/// Where tensors are that are rows of another one: its name, and the first of them.
type Places = BTreeMap<String, (String, usize)>;

/// The tensor of all experts of a layer that a matrix of one of them would be in, `[experts, rows, columns]`, as
/// transformers 5 has them: its name, its shape, and the row at which the matrix begins, of all rows.
fn stacked(want: &Want, n_experts: usize) -> Option<(String, [usize; 3], usize)> {
    let (layer, matrix) = want.name.split_once(".mlp.experts.")?;
    let (expert, module) = matrix.strip_suffix(".weight")?.split_once('.')?;
    let expert: usize = expert.parse().ok()?;
    let (whole, n_parts, part) = match module {
        "gate_proj" => ("gate_up_proj", 2, 0),
        "up_proj" => ("gate_up_proj", 2, 1),
        "down_proj" => ("down_proj", 1, 0),
        _ => return None,
    };
    let &[n, k] = &want.shape[..] else {
        return None;
    };
    let name = format!("{layer}.mlp.experts.{whole}");
    let first = (expert * n_parts + part) * n;
    Some((name, [n_experts, n_parts * n, k], first))
}

/// Puts fused tensors in place of their parts, wherever the checkpoint has any of a fused module.
fn fuse(config: &Config, checkpoint: &Checkpoint, all: Vec<Want>) -> Result<(Vec<Want>, Places)> {
    let there = |module: &str| {
        let mut from = checkpoint.tensors().range(module.to_owned()..);
        from.next()
            .is_some_and(|(name, _)| name.starts_with(module))
    };
    let (mut wants, mut fused) = (Vec::<Want>::with_capacity(all.len()), BTreeMap::new());
    let beside = |name: &str, whole: &str| match checkpoint.tensors().get(name) {
        Some(entry) => {
            let problem = format!("is there beside {whole}: which of them counts?");
            Err(Error::bad(checkpoint.path_of(entry), name, problem))
        }
        None => Ok(()),
    };
    let n_experts = config.experts.as_ref().map_or(0, |experts| experts.count);
    // The parts of a whole follow each other.
    for want in all {
        let of_all = stacked(&want, n_experts);
        let is_there = |(name, ..): &(String, _, _)| checkpoint.tensors().contains_key(name);
        if let Some((name, shape, first)) = of_all.filter(is_there) {
            beside(&want.name, &name)?;
            if first == 0 {
                wants.push(Want {
                    name: name.clone(),
                    shape: shape.to_vec(),
                    ..want.clone()
                });
            }
            fused.insert(want.name, (name, first));
            continue;
        }
        let Some((module, end)) = whole_of(&want.name).filter(|(module, _)| there(module)) else {
            wants.push(want);
            continue;
        };
        let name = format!("{module}{end}");
        beside(&want.name, &name)?;
        let rows = want.shape[0];
        let mut first = 0;
        if let Some(whole) = wants.last_mut().filter(|last| last.name == name) {
            first = whole.shape[0];
            whole.shape[0] += rows;
        } else {
            let name = name.clone();
            wants.push(Want {
                name,
                ..want.clone()
            });
        }
        fused.insert(want.name, (name, first));
    }
    Ok((wants, fused))
}

/// Puts the tensors of a packed matrix in place of the float one, wherever the checkpoint has them.
fn unpack(
    config: &Config,
    checkpoint: &Checkpoint,
    all: Vec<Want>,
) -> Result<(Vec<Want>, BTreeMap<String, Packed>)> {
    let Some(scheme) = config.quantised else {
        return Ok((all, BTreeMap::new()));
    };
    let (mut wants, mut matrices) = (Vec::with_capacity(all.len()), BTreeMap::new());
    for want in all {
        let stem = want.name.strip_suffix(".weight");
        let (Some(stem), &[n, k], Group::Always) = (stem, &want.shape[..], want.group) else {
            wants.push(want);
            continue;
        };
        let mut packed = Packed {
            stem: stem.to_owned(),
            n,
            k,
            scheme,
            has_order: false,
        };
        let name = |role| packed.name(role);
        let there = |role| checkpoint.tensors().get(&name(role));
        // Any of them: then the others are missing. Floats that are codes have the name of those that are not.
        let codes_of = |entry: &&Entry| !packed.is_float() || entry.dtype == Dtype::F8_E4M3;
        let found = there(Role::Codes).filter(codes_of);
        let found = found.or_else(|| there(Role::Scales));
        let codes = name(Role::Codes);
        let Some(entry) = found.filter(|_| want.name != EMBED) else {
            wants.push(want);
            continue;
        };
        if codes != want.name && checkpoint.tensors().contains_key(&want.name) {
            let problem = format!("is there beside {}: which of them counts?", want.name);
            return Err(Error::bad(checkpoint.path_of(entry), codes, problem));
        }
        if let Some((what, advice)) = packed.unfit() {
            let what = format!("{codes} with {what}");
            return Err(Error::unsupported(checkpoint.path_of(entry), what, advice));
        }
        let order = packed.name(Role::Order);
        let may_have_order = matches!(scheme.format, Format::Gptq | Format::Compressed);
        packed.has_order =
            scheme.needs_order || may_have_order && checkpoint.tensors().contains_key(&order);
        for (role, mut shape) in packed.tensors() {
            let name = packed.name(role);
            let scalar = |entry: &Entry| entry.shape.is_empty();
            if packed.is_float()
                && shape == [1]
                && checkpoint.tensors().get(&name).is_some_and(scalar)
            {
                // One number, however it is written.
                shape.clear();
            }
            wants.push(Want {
                name,
                shape,
                group: want.group,
                kind: match role {
                    Role::Scales => Kind::Float,
                    Role::Shape => Kind::Counts,
                    Role::Codes if packed.is_float() => Kind::Eight,
                    Role::Codes | Role::Zeros | Role::Order => Kind::Words,
                },
            });
        }
        matrices.insert(want.name, packed);
    }
    Ok((wants, matrices))
}
