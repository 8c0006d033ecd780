//! Whether a model fits its devices and which layers go where, by arithmetic, before anything is loaded.
//!
//! Weights are counted as they will be stored, the cache with its spare pages, and of what a pass works in
//! the largest. Where it does not fit, the error says what would. Pure: numbers in, numbers out.

use std::ops::Range;

use super::engine::{PREFILL_PAIRS, PREFILL_ROWS};
use super::load::{Part, dtype_of, matrices, padded};
use super::placement::Placement;
use super::quant::{Format, Packed, Scheme, Zeros};
use super::tensors::{EMBED, Group, HEAD};
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// Weights, as they will be stored.
    pub weights: u64,
    /// Keys and values of the context.
    pub cache: u64,
    /// What a pass works in, and the table of angles.
    pub scratch: u64,
}

impl Need {
    /// Of a model that is loaded to one device for a context.
    pub fn of(files: &ModelFiles, context: usize, kv: DType) -> Self {
        Self::of_layers(files, 0..files.config.n_layers, context, kv)
    }

    /// Of a range of its layers on a device of several.
    pub fn of_layers(files: &ModelFiles, layers: Range<usize>, context: usize, kv: DType) -> Self {
        Costs::of(files, None).need(layers, context, kv)
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights
            .saturating_add(self.cache)
            .saturating_add(self.scratch)
    }

    fn plus(self, other: Self) -> Self {
        Self {
            weights: self.weights.saturating_add(other.weights),
            cache: self.cache.saturating_add(other.cache),
            scratch: self.scratch.saturating_add(other.scratch),
        }
    }
}

/// The memory of a device that a model may be put on.
#[derive(Clone, Debug)]
pub struct Room {
    /// What the device is called.
    pub device: String,
    /// Bytes that it may give, of which a sixteenth stays free; none if that is not known.
    pub bytes: Option<u64>,
    /// The first device of the list that has the same memory: itself, or one before it.
    pub pool: usize,
}

impl Room {
    /// Bytes that may be used.
    fn free(&self) -> Option<u64> {
        self.bytes.map(|bytes| bytes - bytes / 16)
    }
}

/// Decides how many layers of a model each device gets, in proportion to what it has room for, or takes what
/// was decided by hand. Where that does not fit, `seen` gives GPUs that might be named instead.
///
/// # Errors
/// [`Error::Limit`] if a device has not the room, with what is needed, what there is, and what would fit;
/// [`Error::Usage`] if there are more devices than layers, or a decision by hand is for other devices.
///
/// # Panics
/// If there is no device.
pub fn place(
    files: &ModelFiles,
    context: usize,
    kv: DType,
    by_hand: Option<&Placement>,
    rooms: &[Room],
    seen: impl FnOnce() -> Vec<Room>,
) -> Result<Placement> {
    let n_layers = files.config.n_layers;
    if rooms.len() > n_layers {
        return Err(Error::Usage(format!(
            "{} devices were named, but the model has {n_layers} layers; name fewer",
            rooms.len()
        )));
    }
    if let Some(given) = by_hand.map(|p| p.ranges().count())
        && given != rooms.len()
    {
        return Err(Error::Usage(format!(
            "--layers has {given} numbers for {} devices; give one for each name of --device",
            rooms.len()
        )));
    }
    let wish = Wish {
        context,
        kv,
        by_hand,
    };
    let costs = Costs::of(files, None);
    let Some(Shortage { need, have, who }) = costs.shortage(wish, rooms) else {
        return Ok(costs.place(wish, rooms));
    };
    let part = if rooms.len() > 1 {
        let layers: Vec<_> = who.layers.iter().map(shown).collect();
        format!(" (layers {})", layers.join(" and "))
    } else {
        String::new()
    };
    Err(Error::Limit {
        what: format!("the model with a context of {context} tokens{part}"),
        need: format!(
            "{} (weights {}, cache {}, scratch {})",
            gb(need.total()),
            gb(need.weights),
            gb(need.cache),
            gb(need.scratch)
        ),
        have: format!("{} free on {}", gb(have), who.devices.join(" and ")),
        advice: advice(files, &costs, wish, rooms, &seen()).join("; "),
    })
}

/// What would fit where a wish does not.
fn advice(
    files: &ModelFiles,
    costs: &Costs<'_>,
    wish: Wish<'_>,
    rooms: &[Room],
    seen: &[Room],
) -> Vec<String> {
    let mut advice = Vec::new();
    let kinds = if wish.kv == DType::F32 {
        &[DType::F32, DType::F16][..]
    } else {
        &[wish.kv]
    };
    for &kv in kinds {
        let fits = |context| {
            let wish = Wish {
                context,
                kv,
                ..wish
            };
            costs.shortage(wish, rooms).is_none()
        };
        let most = largest(wish.context, fits);
        let flag = if kv == wish.kv {
            String::new()
        } else {
            format!("--kv-dtype {kv} ")
        };
        if most == wish.context {
            advice.push(format!("{flag}would fit"));
        } else if most >= LEAST_CONTEXT {
            advice.push(format!("{flag}--context {most} would fit"));
        }
    }
    let in_proportion = Wish {
        by_hand: None,
        ..wish
    };
    if wish.by_hand.is_some() && costs.shortage(in_proportion, rooms).is_none() {
        advice.push("without --layers it would fit".into());
    }
    let more = rooms.len() + 1..=seen.len().min(costs.layers.len());
    let enough = |n: &usize| costs.shortage(in_proportion, &seen[..*n]).is_none();
    if let Some(n) = more.into_iter().find(enough) {
        let names: Vec<_> = seen[..n].iter().map(|room| &room.device[..]).collect();
        advice.push(format!("--device \"{}\" would fit", names.join(",")));
    }
    if files.config.quantised.is_none() {
        for dtype in [DType::U8, DType::U4] {
            let codes = Costs::of(files, Some(dtype));
            if codes.shortage(wish, rooms).is_none() {
                let bits = dtype.bits();
                let all = codes.need(0..codes.layers.len(), wish.context, wish.kv);
                advice.push(format!(
                    "`hogwild quantize --bits {bits}` makes {} of the weights, which would fit",
                    gb(all.weights)
                ));
            }
        }
    }
    if advice.is_empty() {
        let others = if rooms.len() > 1 {
            "name more devices"
        } else {
            "use another --device"
        };
        advice.push(format!(
            "neither a shorter context nor quantised weights would fit; {others}"
        ));
    }
    advice
}

/// A range of layers, for people.
pub fn shown(layers: &Range<usize>) -> String {
    if layers.len() == 1 {
        layers.start.to_string()
    } else {
        format!("{} to {}", layers.start, layers.end.saturating_sub(1))
    }
}

/// What a model is loaded for.
#[derive(Clone, Copy)]
struct Wish<'a> {
    context: usize,
    kv: DType,
    /// Where its layers shall be, if not in proportion.
    by_hand: Option<&'a Placement>,
}

/// Memory that does not suffice.
struct Shortage {
    need: Need,
    have: u64,
    who: Who,
}

/// Devices of one memory, and the layers that they would have.
#[derive(Default)]
struct Who {
    devices: Vec<String>,
    layers: Vec<Range<usize>>,
}

/// What a model takes, whatever the context.
struct Costs<'a> {
    config: &'a Config,
    /// Bytes of the weights of each layer.
    layers: Vec<u64>,
    embed: u64,
    head: u64,
    /// Whether the head is the embedding.
    tied: bool,
}

impl<'a> Costs<'a> {
    /// With `as_codes`, as if the layers' matrices were quantised.
    fn of(files: &'a ModelFiles, as_codes: Option<DType>) -> Self {
        let config = &files.config;
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let outer = |name: &str| {
            let dtype = float(files, name).unwrap_or(DType::F32);
            product(&[vocab, padded(hidden), dtype.size()])
        };
        let tied = !files.tensors.has(Group::Head);
        Self {
            config,
            layers: (0..config.n_layers)
                .map(|layer| weights(files, layer, as_codes))
                .collect(),
            embed: outer(EMBED),
            head: outer(if tied { EMBED } else { HEAD }),
            tied,
        }
    }

    /// What a range of layers takes where it is.
    fn need(&self, layers: Range<usize>, context: usize, kv: DType) -> Need {
        let config = self.config;
        let (first, last) = (layers.start == 0, layers.end == config.n_layers);
        let mut weights = 0u64;
        if first {
            weights = weights.saturating_add(self.embed);
        }
        if last {
            let small = product(&[padded(config.hidden_size) + config.vocab_size, 4]);
            let head = if first && self.tied { 0 } else { self.head };
            weights = weights.saturating_add(head).saturating_add(small);
        }
        let of_layers = self.layers[layers.clone()].iter();
        Need {
            weights: of_layers.fold(weights, |all, bytes| all.saturating_add(*bytes)),
            cache: cache(config, layers.len(), context, kv),
            scratch: scratch(config, context),
        }
    }

    /// So many layers on each device, at least one, as are in proportion to its room; but so that the fullest is
    /// as empty as can be: what fits at all fits so.
    fn share_out(&self, rooms: &[Room], context: usize, kv: DType) -> Placement {
        let (n, n_layers) = (rooms.len(), self.layers.len());
        if n == 1 {
            return Placement::whole(n_layers);
        }
        // Where nothing is known, it is as much as the others have.
        let known = rooms.iter().filter_map(Room::free).max();
        let of_layer = |layer| self.need(layer..layer + 1, context, kv);
        let alone: Vec<f64> = (0..n_layers)
            .map(|layer| (self.layers[layer] + of_layer(layer).cache) as f64)
            .collect();
        let room = |at: usize| {
            let pool = &rooms[rooms[at].pool];
            let members = rooms.iter().filter(|r| r.pool == rooms[at].pool).count();
            let free = pool.free().or(known).unwrap_or(1 << 40) / members as u64;
            // What is there whichever layers are.
            let ends = [(0, self.embed), (n - 1, self.head)];
            let ends = ends.iter().filter(|(end, _)| *end == at);
            let fixed = ends.fold(scratch(self.config, context), |all, (_, bytes)| {
                all.saturating_add(*bytes)
            });
            free.saturating_sub(fixed).max(1) as f64
        };
        let rooms: Vec<f64> = (0..n).map(room).collect();
        // Whether the layers from one on fit a share of the rooms from one on, each of which takes one at least.
        let fits = |share: f64, at: usize, mut layer: usize| {
            for (at, room) in rooms.iter().enumerate().skip(at) {
                let (first, end, mut sum) = (layer, n_layers - (n - 1 - at), 0.0);
                while layer < end && (layer == first || sum + alone[layer] <= share * room) {
                    sum += alone[layer];
                    layer += 1;
                }
                if sum > share * room {
                    return false;
                }
            }
            layer == n_layers
        };
        let least = rooms.iter().copied().fold(f64::INFINITY, f64::min);
        let (mut low, mut share) = (0.0, 2.0 * alone.iter().sum::<f64>() / least + 1.0);
        for _ in 0..200 {
            let middle = 0.5 * (low + share);
            if fits(middle, 0, 0) {
                share = middle;
            } else {
                low = middle;
            }
        }
        let (mut counts, mut layer) = (Vec::with_capacity(n), 0);
        for (at, room) in rooms.iter().enumerate() {
            let (first, end, mut sum) = (layer, n_layers - (n - 1 - at), 0.0);
            let others: f64 = rooms[at + 1..].iter().sum();
            while layer < end {
                let rest: f64 = alone[layer..].iter().sum();
                let is_due = (sum + alone[layer]) * others <= rest * room;
                let may = layer == first || sum + alone[layer] <= share * room;
                if !(may && (layer == first || is_due || !fits(share, at + 1, layer))) {
                    break;
                }
                sum += alone[layer];
                layer += 1;
            }
            counts.push(layer - first);
        }
        // The last takes what is left, which fits it as well as can be.
        *counts.last_mut().expect("there is a device") += n_layers - layer;
        Placement::new(counts, n_layers).expect("each has a layer")
    }

    /// Where the layers go.
    fn place(&self, wish: Wish<'_>, rooms: &[Room]) -> Placement {
        let in_proportion = || self.share_out(rooms, wish.context, wish.kv);
        wish.by_hand.cloned().unwrap_or_else(in_proportion)
    }

    /// The first memory that has not the room for what it would get.
    fn shortage(&self, wish: Wish<'_>, rooms: &[Room]) -> Option<Shortage> {
        let placement = self.place(wish, rooms);
        (0..rooms.len()).find_map(|pool| {
            let have = rooms[pool].free()?;
            let mut who = Who::default();
            let mut need = Need::default();
            let of_pool = rooms.iter().zip(placement.ranges());
            for (room, layers) in of_pool.filter(|(room, _)| room.pool == pool) {
                need = need.plus(self.need(layers.clone(), wish.context, wish.kv));
                if !who.devices.contains(&room.device) {
                    who.devices.push(room.device.clone());
                }
                who.layers.push(layers);
            }
            (need.total() > have).then_some(Shortage { need, have, who })
        })
    }
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

fn cache(config: &Config, n_layers: usize, context: usize, dtype: DType) -> u64 {
    let shape = CacheShape {
        n_layers,
        n_kv_heads: config.n_kv_heads,
        head_dim: config.head_dim,
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
        e.routing.top_k * width + e.count
    });
    let row = 2 * hidden + 4 * q + 2 * kv + 2 * ff + of_experts;
    let rows = product(&[PREFILL_ROWS, row, 4]);
    let splits = pages_for(context) * PAGE / SPLIT + 2;
    let pairs = (MAX_WORKERS * splits)
        .max(PREFILL_PAIRS)
        .next_power_of_two();
    let partials = product(&[pairs, config.n_heads, config.head_dim + 2, 4]);
    let logits = product(&[MAX_WORKERS, config.vocab_size + 2 * hidden, 4]);
    let angles = product(&[context, config.head_dim, 4]);
    [rows, partials, logits, angles]
        .iter()
        .fold(RESERVE, |all, bytes| all.saturating_add(*bytes))
}

/// Bytes of the weights of a layer as they are stored; with `as_codes`, if its matrices were quantised.
fn weights(files: &ModelFiles, layer: usize, as_codes: Option<DType>) -> u64 {
    let config = &files.config;
    // Norms and biases, in f32: those that a model does not have are zeros.
    let biases = config.q_size() + 2 * config.kv_size() + 2 * padded(config.intermediate_size);
    let vectors = biases + 4 * padded(config.hidden_size) + 2 * config.head_dim;
    matrices(config, layer)
        .iter()
        .map(|(parts, cols)| matrix(files, parts, *cols, as_codes))
        .fold(product(&[vectors, 4]), u64::saturating_add)
}

/// Bytes of a fused matrix. Orders of channels that differ among its parts are only known once it is read.
fn matrix(files: &ModelFiles, parts: &[Part], cols: usize, as_codes: Option<DType>) -> u64 {
    let rows = parts.iter().map(|part| part.padded).sum();
    let names = || parts.iter().map(|part| files.tensors.place(&part.name).0);
    let packed = names().map(|name| files.tensors.packed(name).cloned());
    let packed: Option<Vec<Packed>> = packed.collect();
    let scheme = match (as_codes, packed) {
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
