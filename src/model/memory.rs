//! Whether a model fits a device, by arithmetic, before anything is loaded.
//!
//! Weights are counted as they will be stored, the cache with its spare pages, and of what a pass works in
//! the largest. Where it does not fit, the error says what would. Pure: numbers in, numbers out.

use super::engine::{PREFILL_PAIRS, PREFILL_ROWS};
use super::latent::{self, LatentRows};
use super::load::{Part, dtype_of, matrices, padded};
use super::quant::{Format, Packed, Scheme, Zeros};
use super::tensors::{EMBED, Group, HEAD, KV_B};
use super::{Config, ModelFiles};
use crate::cache::CacheShape;
use crate::cache::pages::{PAGE, pages_for};
use crate::cache::plan::SPLIT;
use crate::device::DType;
use crate::{Error, Result};

/// Most workers of a session: rows of a pass that is no prefill.
const MAX_WORKERS: usize = 16;

/// Pipelines, parameters, buffers of the driver: a guess on the large side.
const RESERVE: u64 = 128 << 20;

/// Contexts below this are no advice.
const LEAST_CONTEXT: usize = 512;

/// Bytes that a model takes on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// Weights, as they will be stored.
    pub weights: u64,
    /// Keys and values of the context.
    pub cache: u64,
    /// What a pass works in, and the table of angles.
    pub scratch: u64,
}

impl Need {
    /// Of a model that is loaded for a context.
    pub fn of(files: &ModelFiles, context: usize, kv: DType) -> Self {
        Self {
            weights: weights(files, None),
            cache: cache(&files.config, context, kv),
            scratch: scratch(&files.config, context),
        }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights
            .saturating_add(self.cache)
            .saturating_add(self.scratch)
    }
}

/// Refuses a model that does not fit the `have` bytes of a device, of which a sixteenth stays free.
///
/// # Errors
/// [`Error::Limit`], with what is needed, what there is, and what would fit.
pub fn check(files: &ModelFiles, context: usize, kv: DType, have: u64, device: &str) -> Result<()> {
    let need = Need::of(files, context, kv);
    let room = have - have / 16;
    if need.total() <= room {
        return Ok(());
    }
    let mut advice = Vec::new();
    let kinds = if kv == DType::F32 {
        &[DType::F32, DType::F16][..]
    } else {
        &[kv]
    };
    for &kind in kinds {
        let fits = |context: usize| Need::of(files, context, kind).total() <= room;
        let most = largest(context, fits);
        let flag = if kind == kv {
            String::new()
        } else {
            format!("--kv-dtype {kind} ")
        };
        if most == context {
            advice.push(format!("{flag}would fit"));
        } else if most >= LEAST_CONTEXT {
            advice.push(format!("{flag}--context {most} would fit"));
        }
    }
    if files.config.quantised.is_none() {
        for dtype in [DType::U8, DType::U4] {
            let small = Need {
                weights: weights(files, Some(dtype)),
                ..need
            };
            if small.total() <= room {
                let bits = dtype.bits();
                advice.push(format!(
                    "`hogwild quantize --bits {bits}` makes {} of the weights, which would fit",
                    gb(small.weights)
                ));
            }
        }
    }
    if advice.is_empty() {
        advice.push(
            "neither a shorter context nor quantised weights would fit; use another --device"
                .into(),
        );
    }
    Err(Error::Limit {
        what: format!("the model with a context of {context} tokens"),
        need: format!(
            "{} (weights {}, cache {}, scratch {})",
            gb(need.total()),
            gb(need.weights),
            gb(need.cache),
            gb(need.scratch)
        ),
        have: format!("{} free on {device}", gb(room)),
        advice: advice.join("; "),
    })
}

/// The largest context up to `most` that fits, in whole pages below it; 0 if none does.
fn largest(most: usize, fits: impl Fn(usize) -> bool) -> usize {
    if fits(most) {
        return most;
    }
    let (mut low, mut high) = (0, most.div_ceil(PAGE));
    // `low` pages fit, `high` do not.
    while low + 1 < high {
        let middle = low.midpoint(high);
        if fits(middle * PAGE) {
            low = middle;
        } else {
            high = middle;
        }
    }
    low * PAGE
}

fn gb(bytes: u64) -> String {
    format!("{:.2} GB", bytes as f64 / 1e9)
}

/// Bytes of a product of counts; an absurd one is as large as can be.
fn product(counts: &[usize]) -> u64 {
    counts
        .iter()
        .fold(1, |all: u64, &n| all.saturating_mul(n as u64))
}

fn cache(config: &Config, context: usize, dtype: DType) -> u64 {
    let shape = CacheShape {
        n_layers: config.n_layers,
        n_kv_heads: config.n_kv_heads,
        head_dim: config.head_dim,
        copies: config.cache_copies(),
        dtype,
        shared: false,
    };
    product(&[shape.bytes_per_token(), pages_for(context), PAGE])
}

fn scratch(config: &Config, context: usize) -> u64 {
    let (hidden, ff) = (padded(config.hidden_size), padded(config.intermediate_size));
    let (q, kv) = (config.q_size(), config.kv_size());
    // x, q with k and v, q alone, attention, feed-forward; three of them in an order of a matrix's own.
    let of_experts = config.experts.as_ref().map_or(0, |e| {
        let width = padded(e.intermediate_size) + 2;
        e.routing.top_k * width + e.count + padded(e.shared_size.unwrap_or(0))
    });
    let of_attention = match &config.latent {
        Some(latent) => 2 * q + LatentRows::width(config, latent) + padded(config.attention_size()),
        None => 4 * q + 2 * kv,
    };
    let row = 2 * hidden + of_attention + 2 * ff + of_experts;
    let rows = product(&[PREFILL_ROWS, row, 4]);
    let splits = pages_for(context) * PAGE / SPLIT + 2;
    let pairs = (MAX_WORKERS * splits)
        .max(PREFILL_PAIRS)
        .next_power_of_two();
    let partials = product(&[pairs, config.n_heads, config.head_dim + 2, 4]);
    let logits = product(&[MAX_WORKERS, config.vocab_size + 2 * hidden, 4]);
    let angles = product(&[context, 2 * config.n_pairs(), 4]);
    [rows, partials, logits, angles]
        .iter()
        .fold(RESERVE, |all, bytes| all.saturating_add(*bytes))
}

/// Bytes of all weights as they are stored; with `as_codes`, if the layers' matrices were quantised.
fn weights(files: &ModelFiles, as_codes: Option<DType>) -> u64 {
    let config = &files.config;
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    let outer = |name: &str| {
        let dtype = float(files, name).unwrap_or(DType::F32);
        product(&[vocab, padded(hidden), dtype.size()])
    };
    let head = if files.tensors.has(Group::Head) {
        outer(HEAD)
    } else {
        0
    };
    // Norms and biases, in f32: those that a model does not have are zeros.
    let attention = match &config.latent {
        Some(of) => latent::n_numbers(config, of),
        None => config.q_size() + 2 * config.kv_size() + 2 * config.head_dim,
    };
    let vectors = attention + 2 * padded(config.intermediate_size) + 4 * padded(hidden);
    let of_experts = config.experts.as_ref().map_or(0, |e| {
        let shared = e.shared_size.map_or(0, |width| 2 * padded(width));
        let choice = e.count * if e.routing.sigmoid { 2 } else { 1 };
        let biases = choice
            + if shared > 0 {
                shared.max(padded(hidden))
            } else {
                0
            };
        e.layers.iter().filter(|&&has| has).count() * biases
    });
    let small = product(&[config.n_layers, vectors, 4])
        + product(&[padded(hidden) + vocab + of_experts, 4]);
    (0..config.n_layers)
        .flat_map(|layer| matrices(config, layer))
        .map(|(parts, cols)| matrix(files, &parts, cols, as_codes))
        .fold(outer(EMBED) + head + small, u64::saturating_add)
}

/// Bytes of a fused matrix. Orders of channels that differ among its parts are only known once it is read.
fn matrix(files: &ModelFiles, parts: &[Part], cols: usize, as_codes: Option<DType>) -> u64 {
    let rows = parts.iter().map(|part| part.padded).sum();
    let names = || parts.iter().map(|part| files.tensors.place(&part.name).0);
    let packed = names().map(|name| files.tensors.packed(name).cloned());
    let packed: Option<Vec<Packed>> = packed.collect();
    let is_split = parts.iter().any(|part| part.name.ends_with(KV_B));
    let scheme = match (as_codes, packed) {
        // It is widened.
        _ if is_split => None,
        (Some(dtype), _) => Some(Scheme {
            format: Format::Compressed,
            dtype,
            group: Some(128),
            zeros: Zeros::Stored,
            needs_order: false,
        }),
        (None, packed) => packed.map(|all| all[0].scheme),
    };
    if let Some(scheme) = scheme {
        let one = Packed {
            stem: String::new(),
            n: rows,
            k: cols,
            scheme,
            has_order: false,
        };
        return product(&[rows, one.row_words() + one.groups(), 4]);
    }
    let dtypes: Vec<_> = names().map(|name| float(files, name)).collect();
    let alike = dtypes[0].filter(|_| dtypes.iter().all(|&d| d == dtypes[0]));
    product(&[rows, padded(cols), alike.unwrap_or(DType::F32).size()])
}

/// The storage type of a float tensor.
fn float(files: &ModelFiles, name: &str) -> Option<DType> {
    dtype_of(files.checkpoint.tensors().get(name)?.dtype)
}
