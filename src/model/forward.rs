//! The forward pass of a dense decoder, recorded once for every family.
//!
//! What differs between families is data: which biases and norms exist, how wide a head is, how angles
//! are scaled. A pass is: embed; for each layer six dispatches: q, k and v to the cache (two where their
//! heads are normalised), attend, merge, project out, gate and up, project down; then norm and head for
//! the rows whose logits are wanted. Of a model on several devices, each records the part of its own
//! layers. Recording computes nothing.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::load::{Layer, Matrix, Weights, padded};
use super::{Config, Experts};
use crate::Result;
use crate::cache::plan::{self, Plan, Sight};
use crate::cache::{CacheShape, KvCache};
use crate::device::{DType, Device, Recording, Tensor};
use crate::ops::attend::{self, Work, attend, rows_per_work};
use crate::ops::embed::embed;
use crate::ops::expert_down::expert_down;
use crate::ops::expert_up::expert_up;
use crate::ops::gate_up::gate_up;
use crate::ops::gather::gather;
use crate::ops::linear::{By, Linear, Norm};
use crate::ops::merge::merge;
use crate::ops::place::{Arena, HeadNorms, place};
use crate::ops::project::{Into, project};
use crate::ops::qkv::qkv;
use crate::ops::rms_norm::rms_norm;
use crate::ops::route::route;
use crate::ops::select_rows::select_rows;

const _: () = assert!(
    plan::SPLIT <= attend::SPLIT,
    "attention serves the plan's splits"
);

/// The layers of a model that one device holds, usually all: with the first the embedding, with the last
/// the head.
#[derive(Debug)]
pub struct Stage {
    config: Config,
    device: Arc<Device>,
    layers: Range<usize>,
    weights: Weights,
    /// Cosine and sine of every location, `[n_positions, head_dim / 2, 2]`.
    angles: Tensor,
    /// Whether all layers are one layer's tensors.
    pub(super) shared: bool,
    /// Tokens that the layers see: each number once; none stands for all.
    windows: Vec<Option<usize>>,
    /// Which of them each layer has.
    window_of_layer: Vec<usize>,
}

/// Memory of one device that a pass works in; grows with the largest pass, kept between passes.
#[derive(Debug, Default)]
pub struct Scratch {
    rows: Option<Rows>,
    partials: Option<[Tensor; 2]>,
    logits: Option<Tensor>,
    selected: Option<[Tensor; 2]>,
    inputs: Vec<Option<Tensor>>,
}

/// Activations, one row for each new token.
#[derive(Clone, Debug)]
struct Rows {
    x: Tensor,
    qkv: Tensor,
    q: Tensor,
    attention: Tensor,
    hidden: Tensor,
    routed: Option<Routed>,
    /// For the channels of x, attention or hidden in a matrix's own order, by width; where one has any.
    ordered: Vec<Tensor>,
}

/// What experts need: logits of the choice, the choice, and what is inside the experts.
#[derive(Clone, Debug)]
struct Routed {
    logits: Tensor,
    chosen: Tensor,
    gates: Tensor,
    hidden: Tensor,
}

impl Rows {
    /// What goes into a matrix: its channels in the matrix's own order, if that has one.
    fn ordered<'a>(
        &'a self,
        r: &mut Recording,
        from: &'a Tensor,
        matrix: &Matrix,
        n: usize,
    ) -> &'a Tensor {
        let Some(order) = &matrix.order else {
            return from;
        };
        let fits = |t: &&Tensor| t.cols() == from.cols();
        let to = self
            .ordered
            .iter()
            .find(fits)
            .expect("made for every width");
        gather(r, from, order, to, n);
        to
    }
}

impl Stage {
    pub(super) fn new(
        device: Arc<Device>,
        config: &Config,
        layers: Range<usize>,
        weights: Weights,
        n_positions: usize,
    ) -> Result<Self> {
        // A window that no position leaves is none.
        let window = |layer: &Option<usize>| layer.filter(|&window| window < n_positions);
        let of_layer: Vec<_> = config.windows.iter().map(window).collect();
        let mut windows = of_layer.clone();
        windows.sort_unstable();
        windows.dedup();
        let place = |window| windows.binary_search(window).expect("each is there");
        Ok(Self {
            window_of_layer: of_layer.iter().map(place).collect(),
            windows,
            angles: angles(&device, config, n_positions)?,
            config: config.clone(),
            device,
            layers,
            weights,
            shared: false,
        })
    }

    /// The numbers that describe it.
    pub fn config(&self) -> &Config {
        &self.config
    }

    pub(super) fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Where it lives.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Bytes of all its weights on the device.
    pub fn stored_bytes(&self) -> u64 {
        self.weights.bytes()
    }

    /// Which layers these are, from 0.
    pub fn layers(&self) -> Range<usize> {
        self.layers.clone()
    }

    /// Positions that its table of angles covers.
    pub fn n_positions(&self) -> usize {
        self.angles.shape()[0]
    }

    /// Rows that one work item of attention serves at most; for [`crate::cache::plan::plan`].
    pub fn rows_per_work(&self) -> usize {
        let c = &self.config;
        rows_per_work(c.head_dim, c.n_heads, c.n_kv_heads)
    }

    /// Tokens that its layers see, each number once; none stands for all. For [`crate::cache::plan::plan`].
    pub fn windows(&self) -> &[Option<usize>] {
        &self.windows
    }

    /// Shape of a cache for all layers of the model.
    pub fn cache_shape(&self, dtype: DType) -> CacheShape {
        let c = &self.config;
        CacheShape {
            n_layers: c.n_layers,
            n_kv_heads: c.n_kv_heads,
            head_dim: c.head_dim,
            dtype,
            shared: self.shared,
        }
    }

    /// Records this part of one pass. By tiles goes the prefill of a block that no other row sees, everything
    /// else by columns.
    ///
    /// Without the first layer, it goes on from the rows that are in [`Scratch::hidden`] when it runs; without
    /// the last, it leaves there those that the next stage goes on from. With the last, the wanted logits
    /// will be the first rows of [`Scratch::logits`].
    ///
    /// # Errors
    /// If the device cannot hold the scratch of a pass this large.
    ///
    /// # Panics
    /// If the plan has no row, a position outside the table of angles, or other windows than
    /// [`Stage::windows`].
    #[expect(
        clippy::too_many_lines,
        reason = "a pass reads best from its first dispatch to its last"
    )]
    pub fn forward(
        &self,
        plan: &Plan,
        by: By,
        cache: &KvCache,
        scratch: &mut Scratch,
    ) -> Result<Recording> {
        let (c, w) = (&self.config, &self.weights);
        let n = plan.n_rows();
        assert!(n > 0, "a pass has a row");
        let furthest = plan.locations.iter().copied().max().unwrap_or(0);
        assert!(
            usize::try_from(furthest).is_ok_and(|l| l < self.n_positions()),
            "the context bounds positions"
        );
        let mut r = Recording::default();
        let inputs = self.inputs(plan, scratch, &mut r)?;
        let [tokens, targets, tiles, locations, wanted] = &inputs[..5] else {
            unreachable!("five arrays, then four for each window");
        };
        let rows = self.rows(n, scratch)?;
        let n_pairs = plan.sights.iter().map(Sight::n_pairs).max();
        let partials = self.partials(n_pairs.unwrap_or(0), scratch)?;

        for (first, piece) in &w.embed.0 {
            embed(&mut r, tokens, piece, *first, &rows.x, n);
        }
        assert_eq!(
            plan.sights.len(),
            self.windows.len(),
            "a plan for the model's windows"
        );
        let [partial, stats] = [&partials[0], &partials[1]];
        let scale = 1.0 / (c.head_dim as f32).sqrt();
        let norm = |weight| Norm {
            weight,
            count: c.hidden_size,
            eps: c.rms_norm_eps,
        };
        for (i, layer) in self.layers().zip(&w.layers) {
            let [keys, values] = cache.layer(i);
            let arena = Arena { keys, values };
            let before = norm(&layer.attention_norm);
            let [to_qkv, to_out, to_hidden, to_x] = [
                layer.qkv.linear(&layer.qkv_bias),
                layer.out.linear(&layer.out_bias),
                layer.gate_up.linear(&layer.gate_up_bias),
                layer.down.linear(&layer.down_bias),
            ];
            let of = self.window_of_layer[i];
            let [work, pair_rows, ranges, order] = &inputs[5 + 4 * of..][..4] else {
                unreachable!("four arrays for each window");
            };
            let work = Work {
                tiles,
                work,
                pair_rows,
                locations,
                n_work: plan.sights[of].n_work(),
                n_rows: n,
                rows_per_work: plan.sights[of].most_pairs,
                window: self.windows[of],
            };
            let x = rows.ordered(&mut r, &rows.x, &layer.qkv, n);
            if w.qk_norm {
                let norms = self.norms(layer);
                project(
                    &mut r,
                    x,
                    Some(before),
                    to_qkv,
                    &rows.qkv,
                    (n, by),
                    Into::Replace,
                );
                place(
                    &mut r,
                    &rows.qkv,
                    norms,
                    &self.angles,
                    targets,
                    &rows.q,
                    arena,
                    n,
                );
            } else {
                qkv(
                    &mut r,
                    x,
                    before,
                    to_qkv,
                    &self.angles,
                    targets,
                    &rows.q,
                    arena,
                    (n, by),
                );
            }
            attend(
                &mut r,
                work,
                &self.angles,
                &rows.q,
                arena,
                [partial, stats],
                scale,
            );
            merge(
                &mut r,
                [ranges, order],
                [partial, stats],
                &rows.attention,
                n,
            );
            let attention = rows.ordered(&mut r, &rows.attention, &layer.out, n);
            project(&mut r, attention, None, to_out, &rows.x, (n, by), Into::Add);
            let before = norm(&layer.feed_forward_norm);
            if let (Some((router, bias)), Some(routed)) = (&layer.router, &rows.routed) {
                let routing = c.experts(i).expect("it has a router").routing;
                let choice = [&routed.chosen, &routed.gates];
                let (chosen, x) = (&routed.chosen, &rows.x);
                let (to_logits, norm) = (router.linear(bias), Some(before));
                let replace = Into::Replace;
                project(&mut r, x, norm, to_logits, &routed.logits, (n, by), replace);
                route(&mut r, &routed.logits, bias, routing, choice, n);
                expert_up(&mut r, x, before, to_hidden, chosen, &routed.hidden, n);
                expert_down(&mut r, &routed.hidden, to_x, choice, x, n);
                continue;
            }
            let x = rows.ordered(&mut r, &rows.x, &layer.gate_up, n);
            gate_up(&mut r, x, before, to_hidden, &rows.hidden, (n, by));
            let hidden = rows.ordered(&mut r, &rows.hidden, &layer.down, n);
            project(&mut r, hidden, None, to_x, &rows.x, (n, by), Into::Add);
        }
        let n_wanted = plan.wanted.len();
        if let Some(head) = w.head.as_ref().filter(|_| n_wanted > 0) {
            let (logits, [last, normed]) = self.outputs(n_wanted, scratch)?;
            select_rows(&mut r, wanted, &rows.x, &last, n_wanted);
            rms_norm(&mut r, &last, norm(&head.norm), &normed, n_wanted);
            for (first, weight) in &head.pieces.0 {
                let piece = Linear {
                    weight,
                    scales: &w.no_scales,
                    group: 1,
                    bias: &head.bias,
                    first: *first,
                };
                let rows = (n_wanted, By::Columns);
                project(&mut r, &normed, None, piece, &logits, rows, Into::Replace);
            }
        }
        Ok(r)
    }

    fn norms<'a>(&self, layer: &'a Layer) -> HeadNorms<'a> {
        HeadNorms {
            q: &layer.q_norm,
            k: &layer.k_norm,
            eps: self.config.rms_norm_eps,
        }
    }

    /// Uploads the plan's arrays, first those of the rows, then those of each window; they keep their tensors
    /// from pass to pass.
    fn inputs(&self, plan: &Plan, scratch: &mut Scratch, r: &mut Recording) -> Result<Vec<Tensor>> {
        let locations: &[u32] = bytemuck::cast_slice(&plan.locations);
        let mut arrays: Vec<&[u32]> = vec![
            &plan.tokens,
            &plan.targets,
            &plan.tiles,
            locations,
            &plan.wanted,
        ];
        for s in &plan.sights {
            arrays.extend([&s.work[..], &s.pair_rows, &s.ranges, &s.order]);
        }
        scratch.inputs.resize(arrays.len(), None);
        let mut out = Vec::with_capacity(arrays.len());
        for (array, slot) in arrays.into_iter().zip(&mut scratch.inputs) {
            let tensor = grown(&self.device, slot, &[array.len().max(16)], DType::U32)?;
            r.upload(&tensor, array);
            out.push(tensor);
        }
        Ok(out)
    }

    fn rows(&self, n: usize, scratch: &mut Scratch) -> Result<Rows> {
        if let Some(rows) = scratch.rows.as_ref().filter(|rows| rows.x.shape()[0] >= n) {
            return Ok(rows.clone());
        }
        // The old rows go first: the new ones may need their memory.
        scratch.rows = None;
        let (c, n) = (&self.config, n.next_power_of_two());
        let wide = |cols: usize| self.device.tensor(&[n, cols], DType::F32);
        let mut widths = vec![
            padded(c.hidden_size),
            c.q_size(),
            padded(c.intermediate_size),
        ];
        widths.sort_unstable();
        widths.dedup();
        widths.retain(|_| self.weights.has_order());
        let rows = Rows {
            ordered: widths.into_iter().map(wide).collect::<Result<_>>()?,
            x: wide(padded(c.hidden_size))?,
            qkv: wide(c.q_size() + 2 * c.kv_size())?,
            q: self
                .device
                .tensor(&[n, c.n_heads, c.head_dim], DType::F32)?,
            attention: wide(c.q_size())?,
            hidden: wide(padded(c.intermediate_size))?,
            routed: c.experts.as_ref().map(|e| self.routed(e, n)).transpose()?,
        };
        scratch.rows = Some(rows.clone());
        Ok(rows)
    }

    fn routed(&self, experts: &Experts, n: usize) -> Result<Routed> {
        let top_k = experts.routing.top_k;
        let tensor = |shape: &[usize], dtype| self.device.tensor(shape, dtype);
        let width = padded(experts.intermediate_size);
        Ok(Routed {
            logits: tensor(&[n, experts.count], DType::F32)?,
            chosen: tensor(&[n, top_k], DType::U32)?,
            gates: tensor(&[n, top_k], DType::F32)?,
            hidden: tensor(&[n, top_k, width], DType::F32)?,
        })
    }

    fn partials(&self, n: usize, scratch: &mut Scratch) -> Result<[Tensor; 2]> {
        if let Some(p) = scratch.partials.as_ref().filter(|p| p[0].shape()[0] >= n) {
            return Ok(p.clone());
        }
        scratch.partials = None;
        let (c, n) = (&self.config, n.next_power_of_two());
        let partials = [
            self.device
                .tensor(&[n, c.n_heads, c.head_dim], DType::F32)?,
            self.device.tensor(&[n, c.n_heads, 2], DType::F32)?,
        ];
        scratch.partials = Some(partials.clone());
        Ok(partials)
    }

    fn outputs(&self, n: usize, scratch: &mut Scratch) -> Result<(Tensor, [Tensor; 2])> {
        let c = &self.config;
        if scratch
            .selected
            .as_ref()
            .is_none_or(|s| s[0].shape()[0] < n)
        {
            scratch.selected = None;
            let wide = || {
                self.device
                    .tensor(&[n.next_power_of_two(), padded(c.hidden_size)], DType::F32)
            };
            scratch.selected = Some([wide()?, wide()?]);
        }
        let logits = grown(
            &self.device,
            &mut scratch.logits,
            &[n, c.vocab_size],
            DType::F32,
        )?;
        let selected = scratch.selected.clone().expect("set above");
        Ok((logits, selected))
    }
}

impl Scratch {
    /// The tokens of the last pass that was recorded, one for each row.
    pub fn tokens(&self) -> Option<&Tensor> {
        self.inputs.first()?.as_ref()
    }

    /// The hidden rows of the last pass that was recorded, `[>= n_rows, hidden_size padded]` in f32.
    pub fn hidden(&self) -> Option<&Tensor> {
        Some(&self.rows.as_ref()?.x)
    }

    /// The logits of the last pass, `[>= n_wanted, vocab_size]`, if any were wanted.
    pub fn logits(&self) -> Option<&Tensor> {
        self.logits.as_ref()
    }
}

/// The tensor in a slot if it has as many rows as `shape`, else a new one of at least that many.
fn grown(
    device: &Device,
    slot: &mut Option<Tensor>,
    shape: &[usize],
    dtype: DType,
) -> Result<Tensor> {
    if let Some(tensor) = slot.as_ref().filter(|t| t.shape()[0] >= shape[0]) {
        return Ok(tensor.clone());
    }
    *slot = None;
    let mut shape = shape.to_vec();
    shape[0] = shape[0].next_power_of_two();
    let tensor = device.tensor(&shape, dtype)?;
    *slot = Some(tensor.clone());
    Ok(tensor)
}

/// The table of angles: location times transformers' f32 inverse frequency, evaluated in f64, with the
/// rope type's multiplier on cosine and sine: each query and each key is rotated once, so it applies once.
/// Pairs that are not rotated keep their numbers.
fn angles(device: &Device, config: &Config, n_positions: usize) -> Result<Tensor> {
    let (inv_freq, multiplier) = config.inv_freq(n_positions);
    let half = config.head_dim / 2;
    let tensor = device.tensor(&[n_positions, half, 2], DType::F32)?;
    // Some megabytes at a time.
    let step = (1usize << 20).div_ceil(half);
    for first in (0..n_positions).step_by(step) {
        let n = step.min(n_positions - first);
        let mut table = vec![0.0f32; n * half * 2];
        table
            .par_chunks_exact_mut(half * 2)
            .enumerate()
            .for_each(|(i, row)| {
                let (rotated, rest) = row.split_at_mut(2 * inv_freq.len());
                for still in rest.chunks_exact_mut(2) {
                    still.copy_from_slice(&[1.0, 0.0]);
                }
                for (pair, &freq) in rotated.chunks_exact_mut(2).zip(&inv_freq) {
                    let angle = (first + i) as f64 * f64::from(freq);
                    let scaled = [angle.cos(), angle.sin()].map(|v| v * f64::from(multiplier));
                    #[expect(clippy::cast_possible_truncation, reason = "the table is in f32")]
                    pair.copy_from_slice(&scaled.map(|v| v as f32));
                }
            });
        device.write(&tensor, first * half * 8, bytemuck::cast_slice(&table))?;
    }
    Ok(tensor)
}
