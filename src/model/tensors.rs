//! The tensors that a model needs: their names, their shapes, and which of them exist.
//!
//! A tensor that would have to change the computation and does not is refused, so that a model is
//! either computed as it was made or not at all.

use std::collections::HashSet;

use super::config::Config;
use super::json::shown;
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

/// A tensor that a model needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    /// Its name.
    pub name: String,
    /// Its shape; a matrix is `[out, in]`.
    pub shape: Vec<usize>,
    /// What it depends on.
    pub group: Group,
}

/// The name of a tensor of a layer: `layer_name(2, "mlp.up_proj.weight")`.
pub fn layer_name(layer: usize, tensor: &str) -> String {
    format!("model.layers.{layer}.{tensor}")
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
    };
    table.into_iter().map(want).collect()
}

/// Every tensor that a model may have, with its shape, in the order of computation.
pub fn all_tensors(config: &Config) -> Vec<Want> {
    let outer = |name: &str, shape: &[usize], group| Want {
        name: name.to_owned(),
        shape: shape.to_vec(),
        group,
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
}

impl TensorMap {
    /// Finds the tensors that a model needs.
    ///
    /// Which biases and norms it has follows from the tensors: one of a [`Group`] in one layer
    /// means all of the group in every layer.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape or type, or if there is one that would have to
    /// change the computation and does not.
    pub fn new(config: &Config, checkpoint: &Checkpoint) -> Result<Self> {
        let all = all_tensors(config);
        let found = |want: &&Want| checkpoint.tensors().contains_key(&want.name);
        let mut groups: HashSet<Group> = all.iter().filter(found).map(|w| w.group).collect();
        groups.insert(Group::Always);
        // Where the config does not say, the tensors do.
        let redundant = config.tie_word_embeddings == Some(true) && groups.remove(&Group::Head);
        if redundant {
            let path = checkpoint.main_path();
            let path = path.display();
            log::warn!("{path}: {HEAD} is ignored: the config ties it to the embedding");
        }
        if config.tie_word_embeddings == Some(false) {
            groups.insert(Group::Head);
        }

        let known: HashSet<&str> = all.iter().map(|w| w.name.as_str()).collect();
        for (name, entry) in checkpoint.tensors() {
            if known.contains(name.as_str()) || name.ends_with(".rotary_emb.inv_freq") {
                continue;
            }
            let path = checkpoint.path_of(entry);
            if name.starts_with("model.") || name.starts_with("lm_head.") {
                let what = format!("tensor {}", shown(name));
                let advice = format!(
                    "a {} model of {} layers has none of this name",
                    config.family.model_type, config.n_layers
                );
                return Err(Error::unsupported(path, what, advice));
            }
            log::warn!("{}: {name} is ignored", path.display());
        }

        let mut wants = all;
        wants.retain(|want| groups.contains(&want.group));
        for want in &wants {
            checkpoint.expect(&want.name, &[&want.shape])?;
        }
        Ok(Self { wants, groups })
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
}
