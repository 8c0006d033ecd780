//! Attention of rows to splits: one partial for each pair of a split and a row that sees it.
//!
//! A *split* is a list of tiles of keys; a *work item* is a split and the rows that it serves at once,
//! so that a key is read once for all of them. A tile lies in one block, where the row's query has the
//! `location`: the angle it is rotated to, and the last key index it sees (paper 3.4, appendix B); with a
//! window, the keys that far before it are the last that it sees. A pair (split, row) yields one unnormalised partial with its largest score and its sum; [`super::merge`]
//! puts them together.
//!
//! A row's arithmetic depends only on the tiles of its splits, in their order, and on which of their keys
//! it sees: not on other rows of the group, nor on keys behind those that it sees.

#![allow(
    clippy::inline_always,
    reason = "what is not in line is not compiled for the instruction set of the dispatch"
)]

use std::collections::BTreeSet;

use bytemuck::{Pod, Zeroable};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::case::{Rng, case, floats, output, words};
use super::dot::{ARCH, dot_products, widen};
use super::place::Arena;
use super::u32_of;
use crate::device::Access::{Read, Write};
use crate::device::{
    Args, Bound, Caps, Case, DType, Dispatch, Ints, Kernel, Op, Recording, Run, Tensor, Tolerance,
    View, Wgsl,
};

/// Most keys of a tile.
pub const TILE: usize = 16;

/// Most keys of a split.
pub const SPLIT: usize = 256;

/// Largest score of a partial that has seen no key; as `NEG_LARGE` in WGSL.
pub const EMPTY: f32 = -3.0e38;

/// Widest head.
pub const MAX_DIM: usize = 1024;

/// The op.
pub static OP: Op = Op {
    name: "attend",
    summary: "one partial of attention for each pair of a split and a row that sees it",
    params: &[
        "n_work",
        "n_heads",
        "n_kv_heads",
        "head_dim",
        "n_pairs",
        "n_rows",
        "rows_per_work",
        "scale",
        "window",
    ],
    args: &[
        ("tiles", Read),
        ("work", Read),
        ("pair_rows", Read),
        ("locations", Read),
        ("angles", Read),
        ("q", Read),
        ("keys", Read),
        ("values", Read),
        ("partial", Write),
        ("stats", Write),
    ],
    reference,
    kernels: &[
        Kernel {
            name: "split",
            run: Run::Wgsl(Wgsl {
                file: "shaders/attend.wgsl",
                source: include_str!("../../shaders/attend.wgsl"),
                consts,
                elements: &[("Kv", 6)],
                groups: |d, _| {
                    let p: Params = d.params.get();
                    let gqa = p.n_heads / p.n_kv_heads;
                    let heads = Geometry::of(p.head_dim, gqa).heads();
                    [p.n_work, p.n_kv_heads, gqa.div_ceil(heads)]
                },
                loads: Some(loads),
            }),
            fits: fits_wgsl,
        },
        Kernel {
            name: "split",
            run: Run::Cpu(by_work),
            fits,
        },
    ],
    cases,
    tolerance: Tolerance {
        f32: Bound {
            abs: 1e-5,
            rel: 1e-4,
            nmse: 1e-10,
        },
        ..Tolerance::with_abs(1e-5)
    },
};

/// Uniform of `attend.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    n_work: u32,
    n_heads: u32,
    n_kv_heads: u32,
    head_dim: u32,
    n_pairs: u32,
    n_rows: u32,
    rows_per_work: u32,
    scale: f32,
    window: u32,
}

impl Params {
    /// The first key index that a row sees from a location; all before it lie outside its window.
    fn first_seen(self, location: i32) -> i64 {
        i64::from(location) + 1 - i64::from(self.window)
    }
}

/// The window of rows that see everything: more than any location.
const NO_WINDOW: u32 = i32::MAX.cast_unsigned();

/// How a workgroup of `attend.wgsl` is laid out; only `rows` depends on the batch.
struct Geometry {
    /// Query heads that one lane serves.
    lane_heads: u32,
    /// Teams of lanes that share the heads of a row.
    parts: u32,
    /// Most rows of a work item.
    rows: u32,
}

impl Geometry {
    fn of(head_dim: u32, gqa: u32) -> Self {
        // A lane keeps a slice of each of its queries, and sums for eight channels of each: at most 80
        // numbers of either, or they do not stay in registers.
        let most = (10 / (head_dim / 8).div_ceil(8)).clamp(1, 5);
        let lane_heads = gqa.div_ceil(gqa.div_ceil(most));
        let teams = if lane_heads > 2 || head_dim > 256 {
            8
        } else {
            16
        };
        let parts = gqa.div_ceil(lane_heads).min(teams);
        Self {
            lane_heads,
            parts,
            rows: teams / parts,
        }
    }

    /// Query heads of one KV head that a workgroup serves together.
    fn heads(&self) -> u32 {
        self.lane_heads * self.parts
    }
}

/// Most rows of a work item for a model's heads: a constant of the model, never of the batch.
pub fn rows_per_work(head_dim: usize, n_heads: usize, n_kv_heads: usize) -> usize {
    let gqa = u32_of((n_heads / n_kv_heads).max(1));
    Geometry::of(u32_of(head_dim), gqa).rows as usize
}

/// Keys of a tile, and how many keys of its split come before it.
fn keys_and_start(tile: &[u32]) -> (usize, usize) {
    (tile[2] as usize & 0xffff, tile[2] as usize >> 16)
}

fn consts(d: &Dispatch, _: &Caps) -> Vec<(&'static str, u32)> {
    let p: Params = d.params.get();
    let geometry = Geometry::of(p.head_dim, p.n_heads / p.n_kv_heads);
    // Teams without a row are idle; so there are few variants.
    let rows = p.rows_per_work.next_power_of_two().min(geometry.rows);
    let teams = rows * geometry.parts;
    let steps = teams.div_ceil(4).next_power_of_two();
    vec![
        ("HEAD_DIM", p.head_dim),
        ("PAIRS", p.n_pairs),
        ("LANE_HEADS", geometry.lane_heads),
        ("PARTS", geometry.parts),
        ("TEAMS", teams.next_multiple_of(steps)),
        ("STEPS", steps),
    ]
}

fn fits(d: &Dispatch, _: &Caps) -> bool {
    let p: Params = d.params.get();
    p.head_dim.is_multiple_of(8)
        && p.head_dim as usize <= MAX_DIM
        && p.n_pairs.is_multiple_of(4)
        && (1..=p.head_dim / 2).contains(&p.n_pairs)
        && d.args[6].dtype() == d.args[7].dtype()
}

fn fits_wgsl(d: &Dispatch, caps: &Caps) -> bool {
    let p: Params = d.params.get();
    let geometry = Geometry::of(p.head_dim, p.n_heads / p.n_kv_heads);
    // Two lines of scores for each query, and the places of the keys.
    let bytes = geometry.rows * geometry.heads() * (2 * 17 * 16 + 4) + 3 * 4 * u32_of(SPLIT);
    fits(d, caps) && caps.subgroup.0 >= 4 && bytes <= caps.workgroup_bytes
}

/// What a workgroup loads: keys and values of its split for one KV head, the queries of its rows and heads,
/// and an angle for each row and block.
fn loads(d: &Dispatch, _: &Caps, ints: &Ints<'_>, group: [u32; 3]) -> Vec<u64> {
    let p: Params = d.params.get();
    let [tiles, work, pair_rows, locations] = [0, 1, 2, 3].map(|i| ints.get(&d.args[i]));
    let item: Vec<usize> = work[group[0] as usize * 4..][..4]
        .iter()
        .map(|&n| n as usize)
        .collect();
    let tiles = &tiles[item[0] * 4..item[1] * 4];
    let keys: usize = tiles.chunks_exact(4).map(|t| keys_and_start(t).0).sum();
    let rows: BTreeSet<u32> = pair_rows[item[2]..][..item[3]].iter().copied().collect();
    let blocks: BTreeSet<u32> = tiles.chunks_exact(4).map(|t| t[3]).collect();
    let at = |block: u32, row: u32| locations[(block * p.n_rows + row) as usize].cast_signed();
    let angles: BTreeSet<i32> = blocks
        .iter()
        .flat_map(|&block| rows.iter().map(move |&row| at(block, row).max(0)))
        .collect();
    let gqa = p.n_heads / p.n_kv_heads;
    let heads = Geometry::of(p.head_dim, gqa).heads();
    let heads = heads.min(gqa - group[2] * heads) as usize;
    let head = p.head_dim as usize * 4;
    let row_angles = p.n_pairs as usize * 8;
    let arena = keys * p.head_dim as usize * d.args[6].dtype().size();
    [
        tiles.len() * 4,
        16,
        item[3] * 4,
        blocks.len() * rows.len() * 4,
        angles.len() * row_angles,
        rows.len() * heads * head,
        arena,
        arena,
        0,
        0,
    ]
    .map(|bytes| bytes as u64)
    .to_vec()
}

/// What is attended to, as numbers: see `cache::plan`.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a> {
    /// `[n_tiles, 4]`: slot of the first key, its index in the block, keys plus 65,536 times the keys of the
    /// split that come before, block. A split has at most [`SPLIT`] keys. A work item may leave out tiles at
    /// the front of its split, which none of its rows sees: bits are as if they were there.
    pub tiles: &'a Tensor,
    /// `[n_work, 4]`: first tile, end of the tiles, first pair, pairs.
    pub work: &'a Tensor,
    /// `[n_pairs]`: the row of each pair.
    pub pair_rows: &'a Tensor,
    /// `[n_blocks, n_rows]`: the row's location in the block; negative where it sees none of it.
    pub locations: &'a Tensor,
    /// Work items.
    pub n_work: usize,
    /// Rows of the pass, the stride of `locations`.
    pub n_rows: usize,
    /// Most pairs of a work item; at most [`rows_per_work`].
    pub rows_per_work: usize,
    /// Keys that a row sees at most, back from its location in a block; none: all of them.
    pub window: Option<usize>,
}

/// Records the partials of all work items.
///
/// Shapes: `angles` `[n, pairs, 2]`, of the first pairs of channels that stand half a head apart, a multiple of
/// four; the pairs behind them are not rotated; `q` `[>= n_rows, n_heads, head_dim]`; `partial`
/// `[>= n_pairs, n_heads, head_dim]`; `stats` `[>= n_pairs, n_heads, 2]`, largest score and sum.
///
/// # Panics
/// If the shapes disagree, or a work item has more rows than [`rows_per_work`].
pub fn attend(
    r: &mut Recording,
    work: Work<'_>,
    angles: &Tensor,
    q: &Tensor,
    arena: Arena<'_>,
    [partial, stats]: [&Tensor; 2],
    scale: f32,
) {
    let (n_heads, n_kv_heads) = (q.shape()[1], arena.keys.shape()[1]);
    assert_eq!(
        q.cols(),
        arena.keys.cols(),
        "attend: q and keys differ in head_dim"
    );
    assert!(
        angles.shape()[1] * 2 <= q.cols(),
        "attend: angles do not fit the head"
    );
    assert_eq!(
        n_heads % n_kv_heads,
        0,
        "attend: heads are divided among the KV heads"
    );
    assert!(
        work.rows_per_work <= rows_per_work(q.cols(), n_heads, n_kv_heads),
        "attend: a work item has more rows than are served at once"
    );
    let params = Params {
        n_work: u32_of(work.n_work),
        n_heads: u32_of(n_heads),
        n_kv_heads: u32_of(n_kv_heads),
        head_dim: u32_of(q.cols()),
        n_pairs: u32_of(angles.shape()[1]),
        n_rows: u32_of(work.n_rows),
        rows_per_work: u32_of(work.rows_per_work),
        scale,
        window: work
            .window
            .and_then(|window| u32::try_from(window).ok())
            .map_or(NO_WINDOW, |window| window.min(NO_WINDOW)),
    };
    let Work {
        tiles,
        work,
        pair_rows,
        locations,
        ..
    } = work;
    let args = [
        tiles,
        work,
        pair_rows,
        locations,
        angles,
        q,
        arena.keys,
        arena.values,
        partial,
        stats,
    ];
    r.push(&OP, &params, &args);
}

fn reference(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [
        tiles,
        work,
        pair_rows,
        locations,
        angles,
        q,
        keys,
        values,
        mut partial,
        mut stats,
    ] = args.views();
    let (heads, kv_heads, dim) = (
        p.n_heads as usize,
        p.n_kv_heads as usize,
        p.head_dim as usize,
    );
    let (half, n_pairs) = (dim / 2, p.n_pairs as usize);
    for work in work.u32s().chunks_exact(4).take(p.n_work as usize) {
        for pair in work[2] as usize..(work[2] + work[3]) as usize {
            let row = pair_rows.u32s()[pair] as usize;
            for head in 0..heads {
                let kv_head = head / (heads / kv_heads);
                let query = |i: usize| q.get((row * heads + head) * dim + i);
                // All keys that the row sees: score, and where the value is.
                let mut seen: Vec<(f64, usize)> = Vec::new();
                for tile in tiles.u32s()[work[0] as usize * 4..work[1] as usize * 4].chunks_exact(4)
                {
                    let location = locations.i32s()[tile[3] as usize * p.n_rows as usize + row];
                    for key in 0..u32_of(keys_and_start(tile).0) {
                        let index = i64::from(tile[1] + key);
                        if index > i64::from(location) || index < p.first_seen(location) {
                            continue;
                        }
                        let location = usize::try_from(location).expect("it sees a key");
                        let at = ((tile[0] + key) as usize * kv_heads + kv_head) * dim;
                        let pair = |i: usize| {
                            let [cos, sin] = if i < n_pairs {
                                [0, 1].map(|j| angles.get((location * n_pairs + i) * 2 + j))
                            } else {
                                [1.0, 0.0]
                            };
                            let (a, b) = (query(i), query(i + half));
                            (a * cos - b * sin) * keys.get(at + i)
                                + (b * cos + a * sin) * keys.get(at + i + half)
                        };
                        seen.push(((0..half).map(pair).sum::<f64>() * f64::from(p.scale), at));
                    }
                }
                let max = seen.iter().map(|s| s.0).fold(f64::from(EMPTY), f64::max);
                let at = pair * heads + head;
                stats.set(at * 2, max);
                stats.set(at * 2 + 1, seen.iter().map(|s| (s.0 - max).exp()).sum());
                for d in 0..dim {
                    let sum = seen
                        .iter()
                        .map(|s| (s.0 - max).exp() * values.get(s.1 + d))
                        .sum();
                    partial.set(at * dim + d, sum);
                }
            }
        }
    }
}

fn by_work(args: &mut Args<'_>) {
    let p: Params = args.params();
    let [
        tiles,
        work,
        pair_rows,
        locations,
        angles,
        q,
        keys,
        values,
        mut partial,
        mut stats,
    ] = args.views();
    let (heads, kv_heads, dim) = (
        p.n_heads as usize,
        p.n_kv_heads as usize,
        p.head_dim as usize,
    );
    let gqa = heads / kv_heads;
    let inputs = Inputs {
        p,
        tiles: tiles.u32s(),
        pair_rows: pair_rows.u32s(),
        locations: locations.i32s(),
        angles: angles.f32s(),
        q: q.f32s(),
        keys: &keys,
        values: &values,
    };
    // Pairs lie in the order of the work items. The outputs of a pair and a KV head are one stretch, and
    // a job is a work item with one of the KV heads.
    let mut outputs = std::iter::zip(
        partial.f32s_mut().chunks_exact_mut(gqa * dim),
        stats.f32s_mut().chunks_exact_mut(gqa * 2),
    );
    let mut jobs = Vec::new();
    for work in work.u32s()[..p.n_work as usize * 4].chunks_exact(4) {
        let mut of_heads: Vec<Vec<_>> = (0..kv_heads).map(|_| Vec::new()).collect();
        for _ in 0..work[3] {
            for (mine, outputs) in of_heads.iter_mut().zip(&mut outputs) {
                mine.push(outputs);
            }
        }
        jobs.extend(of_heads.into_iter().enumerate().map(|job| (work, job)));
    }
    jobs.into_par_iter()
        .for_each(|(work, (kv_head, outputs))| inputs.attend(work, kv_head, outputs));
}

struct Inputs<'a> {
    p: Params,
    tiles: &'a [u32],
    pair_rows: &'a [u32],
    locations: &'a [i32],
    angles: &'a [f32],
    q: &'a [f32],
    keys: &'a View<'a>,
    values: &'a View<'a>,
}

impl Inputs<'_> {
    /// One work item for one KV head; `outputs` are the partials and stats of each pair's heads.
    fn attend(&self, work: &[u32], kv_head: usize, mut outputs: Vec<(&mut [f32], &mut [f32])>) {
        let p = self.p;
        let (heads, kv_heads, dim) = (
            p.n_heads as usize,
            p.n_kv_heads as usize,
            p.head_dim as usize,
        );
        let gqa = heads / kv_heads;
        let rows = &self.pair_rows[work[2] as usize..][..work[3] as usize];
        for (partial, stats) in &mut outputs {
            partial.fill(0.0);
            for stats in stats.chunks_exact_mut(2) {
                stats.copy_from_slice(&[EMPTY, 0.0]);
            }
        }
        let mut rotated = vec![0.0; rows.len() * gqa * dim];
        let (mut keys, mut values) = (vec![0.0; TILE * dim], vec![0.0; TILE * dim]);
        let row_angles = 2 * p.n_pairs as usize;
        let mut angles = vec![0.0; row_angles];
        let mut block = u32::MAX;
        for tile in self.tiles[work[0] as usize * 4..work[1] as usize * 4].chunks_exact(4) {
            let location =
                |row: u32| self.locations[tile[3] as usize * p.n_rows as usize + row as usize];
            if tile[3] != block {
                block = tile[3];
                for (row, to) in rows.iter().zip(rotated.chunks_exact_mut(gqa * dim)) {
                    let from = (*row as usize * heads + kv_head * gqa) * dim;
                    let at = usize::try_from(location(*row)).unwrap_or(0) * row_angles;
                    let (cos, sin) = angles.split_at_mut(row_angles / 2);
                    let pairs = self.angles[at..at + row_angles].chunks_exact(2);
                    for ((cos, sin), pair) in cos.iter_mut().zip(sin).zip(pairs) {
                        (*cos, *sin) = (pair[0], pair[1]);
                    }
                    ARCH.dispatch(Rotate {
                        from: &self.q[from..from + gqa * dim],
                        to,
                        head_dim: dim,
                        angles: &angles,
                    });
                }
            }
            let (n_keys, _) = keys_and_start(tile);
            for key in 0..n_keys {
                let at = ((tile[0] as usize + key) * kv_heads + kv_head) * dim;
                widen(self.keys, at, &mut keys[key * dim..][..dim]);
                widen(self.values, at, &mut values[key * dim..][..dim]);
            }
            let queries = rotated.chunks_exact(gqa * dim);
            for ((row, queries), (partial, stats)) in rows.iter().zip(queries).zip(&mut outputs) {
                // From the first key that the row sees to the first that it does not see any more.
                let location = location(*row);
                let in_tile = |index: i64| {
                    let at = index.saturating_sub(i64::from(tile[1])).max(0);
                    usize::try_from(at).map_or(n_keys, |at| at.min(n_keys))
                };
                let end = in_tile(i64::from(location) + 1);
                let seen = in_tile(p.first_seen(location)).min(end) * dim..end * dim;
                ARCH.dispatch(Tile {
                    keys: &keys[seen.clone()],
                    values: &values[seen],
                    scale: p.scale,
                    queries,
                    partial,
                    stats,
                });
            }
        }
    }
}

/// Heads, whose first pairs are rotated by the cosines and then the sines of one location.
struct Rotate<'a> {
    from: &'a [f32],
    to: &'a mut [f32],
    head_dim: usize,
    angles: &'a [f32],
}

impl WithSimd for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (half, n_pairs) = (self.head_dim / 2, self.angles.len() / 2);
        let (cos, sin) = self.angles.split_at(n_pairs);
        let ((cos, cos_tail), (sin, sin_tail)) = (S::as_simd_f32s(cos), S::as_simd_f32s(sin));
        let heads = self.from.chunks_exact(2 * half);
        for (from, to) in heads.zip(self.to.chunks_exact_mut(2 * half)) {
            let ((a, b), (x, y)) = (from.split_at(half), to.split_at_mut(half));
            let ((a, a_rest), (b, b_rest)) = (a.split_at(n_pairs), b.split_at(n_pairs));
            let (x, x_rest) = x.split_at_mut(n_pairs);
            let (y, y_rest) = y.split_at_mut(n_pairs);
            x_rest.copy_from_slice(a_rest);
            y_rest.copy_from_slice(b_rest);
            let ((a, a_tail), (b, b_tail)) = (S::as_simd_f32s(a), S::as_simd_f32s(b));
            let ((x, x_tail), (y, y_tail)) = (S::as_mut_simd_f32s(x), S::as_mut_simd_f32s(y));
            for i in 0..x.len() {
                x[i] =
                    simd.mul_add_e_f32s(a[i], cos[i], simd.neg_f32s(simd.mul_f32s(b[i], sin[i])));
                y[i] = simd.mul_add_e_f32s(b[i], cos[i], simd.mul_f32s(a[i], sin[i]));
            }
            for i in 0..x_tail.len() {
                x_tail[i] = a_tail[i] * cos_tail[i] - b_tail[i] * sin_tail[i];
                y_tail[i] = b_tail[i] * cos_tail[i] + a_tail[i] * sin_tail[i];
            }
        }
    }
}

/// The keys of a tile that a row sees, and the row's heads: their states go on by the tile.
struct Tile<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    scale: f32,
    queries: &'a [f32],
    partial: &'a mut [f32],
    stats: &'a mut [f32],
}

impl WithSimd for Tile<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let dim = self.queries.len() / (self.stats.len() / 2);
        let n = self.keys.len() / dim;
        if n == 0 {
            return;
        }
        let states = self.stats.chunks_exact_mut(2);
        let heads = self.queries.chunks_exact(dim).zip(states);
        for ((query, stats), acc) in heads.zip(self.partial.chunks_exact_mut(dim)) {
            let mut scores = [EMPTY; TILE];
            let mut keys = self.keys.chunks_exact(4 * dim);
            let mut fours = scores.chunks_exact_mut(4);
            for (keys, scores) in (&mut keys).zip(&mut fours) {
                let keys = [0, 1, 2, 3].map(|i| &keys[i * dim..][..dim]);
                scores.copy_from_slice(&dot_products(simd, query, keys));
            }
            let done = n / 4 * 4;
            for (key, score) in keys.remainder().chunks_exact(dim).zip(&mut scores[done..]) {
                [*score] = dot_products(simd, query, [key]);
            }
            let scores = &mut scores[..n];
            let mut best = stats[0];
            for score in &mut *scores {
                *score *= self.scale;
                best = best.max(*score);
            }
            let fade = (stats[0] - best).exp();
            let mut sum = stats[1] * fade;
            for score in &mut *scores {
                *score = (*score - best).exp();
                sum += *score;
            }
            stats.copy_from_slice(&[best, sum]);
            let (acc, tail) = S::as_mut_simd_f32s(acc);
            let width = (dim - tail.len()) / acc.len().max(1);
            for (i, acc) in acc.iter_mut().enumerate() {
                let mut sum = simd.mul_f32s(*acc, simd.splat_f32s(fade));
                for (weight, value) in scores.iter().zip(self.values.chunks_exact(dim)) {
                    let value = S::as_simd_f32s(&value[i * width..][..width]).0[0];
                    sum = simd.mul_add_e_f32s(simd.splat_f32s(*weight), value, sum);
                }
                *acc = sum;
            }
            let first = dim - tail.len();
            for (i, acc) in tail.iter_mut().enumerate() {
                *acc *= fade;
                for (weight, value) in scores.iter().zip(self.values.chunks_exact(dim)) {
                    *acc += weight * value[first + i];
                }
            }
        }
    }
}

/// A case: blocks of keys, rows that see some of them at locations, cut into splits of `split` keys.
struct Scene<'a> {
    name: &'a str,
    dtype: DType,
    /// Query heads, KV heads, `head_dim`.
    heads: [usize; 3],
    /// Length of each block.
    blocks: &'a [usize],
    /// For each row, its location in each block; negative where it does not see the block.
    locations: &'a [&'a [i32]],
    /// Keys of a split.
    split: usize,
    /// Range of the inputs.
    range: f32,
    /// Keys that a row sees back from its location.
    window: Option<usize>,
    /// Pairs of channels that rotate; none: all of them.
    pairs: Option<usize>,
}

impl Scene<'_> {
    /// Whether a tile, with its index and its block, is not wholly before a row's window.
    fn reaches(&self, row: &[i32], [_, first, keys, block]: &[usize; 4]) -> bool {
        usize::try_from(row[*block]).is_ok_and(|location| {
            self.window
                .is_none_or(|window| location < first + keys - 1 + window)
        })
    }

    #[expect(clippy::too_many_lines, reason = "the arguments of one dispatch")]
    fn case(&self) -> Case {
        let mut rng = Rng::named(self.name);
        let [heads, kv_heads, dim] = self.heads;
        let pairs = self.pairs.unwrap_or(dim / 2);
        let n_rows = self.locations.len();
        let total: usize = self.blocks.iter().sum();
        let n_slots = total + self.blocks.len() * TILE + 9;
        let (mut tiles, mut work, mut pair_rows) = (Vec::new(), Vec::new(), Vec::new());
        let cap = rows_per_work(dim, heads, kv_heads);
        // Blocks lie in the arena from behind to front, each at the start of a page.
        let mut slot = n_slots;
        let mut flat = Vec::new();
        for (block, &len) in self.blocks.iter().enumerate() {
            slot -= len.next_multiple_of(TILE);
            let tile = |first: usize| {
                let keys = TILE.min(len - first);
                [slot + first, first, keys, block]
            };
            flat.extend((0..len).step_by(TILE).map(tile));
        }
        let mut rest = flat.as_slice();
        while !rest.is_empty() {
            // A split ends before the first tile that does not fit.
            let first_tile = tiles.len() / 4;
            let ends = rest.iter().scan(0, |end, tile: &[usize; 4]| {
                *end += tile[2];
                Some(*end)
            });
            let n = ends.take_while(|&end| end <= self.split).count();
            let (chunk, later) = rest.split_at(n);
            rest = later;
            // As in a plan: in front, what no row sees is left out.
            let (mut start, mut is_outside) = (0, true);
            for tile @ &[slot, first, keys, block] in chunk {
                is_outside &= !self.locations.iter().any(|row| self.reaches(row, tile));
                if !is_outside {
                    tiles.extend([slot, first, keys | start << 16, block].map(u32_of));
                }
                start += keys;
            }
            if is_outside {
                continue;
            }
            let sees = |row: &usize| chunk.iter().any(|tile| self.locations[*row][tile[3]] >= 0);
            let rows: Vec<u32> = (0..n_rows).filter(sees).map(u32_of).collect();
            for rows in rows.chunks(cap) {
                let item = [first_tile, tiles.len() / 4, pair_rows.len(), rows.len()];
                work.extend(item.map(u32_of));
                pair_rows.extend_from_slice(rows);
            }
        }
        let most = work.chunks_exact(4).map(|w| w[3]).max().unwrap_or(1);
        let params = Params {
            n_work: u32_of(work.len() / 4),
            n_heads: u32_of(heads),
            n_kv_heads: u32_of(kv_heads),
            head_dim: u32_of(dim),
            n_pairs: u32_of(pairs),
            n_rows: u32_of(n_rows),
            rows_per_work: most,
            scale: 1.0 / (dim as f32).sqrt(),
            window: self.window.map_or(NO_WINDOW, u32_of),
        };
        let locations: Vec<u32> = (0..self.blocks.len())
            .flat_map(|block| {
                self.locations
                    .iter()
                    .map(move |row| row[block].cast_unsigned())
            })
            .collect();
        let n_angles = 1 + locations
            .iter()
            .map(|l| l.cast_signed())
            .max()
            .unwrap_or(0)
            .cast_unsigned() as usize;
        let angles: Vec<f32> = (0..n_angles)
            .flat_map(|at| (0..pairs).map(move |i| (at, i)))
            .flat_map(|(at, i)| {
                let angle = at as f64 * 10_000f64.powf(-(i as f64) / pairs as f64);
                #[expect(clippy::cast_possible_truncation, reason = "a table in f32")]
                [angle.cos() as f32, angle.sin() as f32]
            })
            .collect();
        let q = rng.scaled(n_rows * heads * dim, self.range);
        // Slots that no tile reaches hold large noise.
        let mut arena = || {
            let mut data = rng.scaled(n_slots * kv_heads * dim, 3.0e4);
            for tile in tiles.chunks_exact(4) {
                let from = tile[0] as usize * kv_heads * dim;
                for v in &mut data[from..][..keys_and_start(tile).0 * kv_heads * dim] {
                    *v *= self.range / 3.0e4;
                }
            }
            floats(self.dtype, &[n_slots, kv_heads, dim], data)
        };
        let (keys, values) = (arena(), arena());
        let n_pairs = pair_rows.len();
        case(
            self.name,
            &params,
            vec![
                words(&[tiles.len() / 4, 4], tiles.clone()),
                words(&[work.len() / 4, 4], work),
                words(&[n_pairs], pair_rows),
                words(&[self.blocks.len(), n_rows], locations),
                floats(DType::F32, &[n_angles, pairs, 2], angles),
                floats(DType::F32, &[n_rows, heads, dim], q),
                keys,
                values,
                output(DType::F32, &[n_pairs, heads, dim]),
                output(DType::F32, &[n_pairs, heads, 2]),
            ],
        )
    }
}

#[expect(clippy::too_many_lines, reason = "a list")]
fn cases() -> Vec<Case> {
    let base = Scene {
        name: "",
        dtype: DType::F32,
        heads: [4, 2, 32],
        blocks: &[],
        locations: &[],
        split: 64,
        range: 1.5,
        window: None,
        pairs: None,
    };
    // The authors' kernel test: 2 workers with 2 new tokens each, QwQ-32B heads, everything in [-2, 2].
    let authors = |bites: bool| -> [[i32; 4]; 4] {
        let far = if bites { 0 } else { 500 };
        [[10, 3, 0, 5], [11, 4, 1, 6], [10, 3, 5, 0], [11, 4, 6, 1]].map(|r| r.map(|l| l + far))
    };
    let (all, bites) = (authors(false), authors(true));
    let all: Vec<&[i32]> = all.iter().map(<[i32; 4]>::as_slice).collect();
    let bites: Vec<&[i32]> = bites.iter().map(<[i32; 4]>::as_slice).collect();
    // Rows at the ends of causal prefixes, 16 of them; and rows far behind two blocks.
    let prefix: Vec<[i32; 1]> = (0..16).map(|i| [5 * i]).collect();
    let prefix: Vec<&[i32]> = prefix.iter().map(<[i32; 1]>::as_slice).collect();
    let singles: Vec<i32> = (0..70).map(|i| 400 - i).collect();
    let others: Vec<i32> = (0..70)
        .map(|i| if i % 7 == 3 { -1 } else { i % 2 * 9 })
        .collect();
    let scenes = [
        Scene {
            name: "one key",
            heads: [1, 1, 8],
            blocks: &[1],
            locations: &[&[0]],
            ..base
        },
        Scene {
            name: "causal rows of one block",
            blocks: &[19],
            locations: &[&[16], &[17], &[18]],
            ..base
        },
        Scene {
            name: "a hidden block",
            dtype: DType::F16,
            blocks: &[33, 20, 7],
            locations: &[&[59, -1, 6], &[59, 26, -1]],
            ..base
        },
        Scene {
            name: "short blocks, uneven, one query head for each KV head",
            heads: [3, 3, 40],
            blocks: &[3, 1, 16, 17, 2, 31, 5],
            locations: &[
                &[74, 71, 70, 54, 37, 35, 4],
                &[174, 171, 170, 154, 137, 135, 104],
            ],
            ..base
        },
        Scene {
            name: "more query heads than a group holds, widest head",
            heads: [28, 1, 256],
            blocks: &[30],
            locations: &[&[29], &[40]],
            ..base
        },
        Scene {
            name: "more rows than a work item holds",
            dtype: DType::BF16,
            heads: [8, 1, 64],
            blocks: &[70],
            locations: &[&[9], &[19], &[29], &[39], &[49], &[59], &[69], &[99], &[0]],
            ..base
        },
        Scene {
            name: "many blocks of one key, some hidden between others",
            dtype: DType::F16,
            heads: [10, 2, 128],
            blocks: &[1; 70],
            locations: &[&singles, &others, &singles],
            ..base
        },
        Scene {
            name: "blocks of exactly one page, one of two",
            heads: [6, 2, 72],
            blocks: &[16, 32, 16],
            locations: &[&[99, 83, 51], &[15, -1, 15], &[0, 31, -1]],
            ..base
        },
        Scene {
            name: "a whole split and one key",
            dtype: DType::BF16,
            heads: [8, 1, 96],
            blocks: &[257],
            locations: &[&[256], &[255], &[254], &[1000]],
            split: SPLIT,
            ..base
        },
        Scene {
            name: "sixteen rows, each its own prefix",
            dtype: DType::F16,
            heads: [4, 2, 64],
            blocks: &[76],
            locations: &prefix,
            split: SPLIT,
            ..base
        },
        Scene {
            name: "seven query heads for each KV head, a head of 24",
            heads: [14, 2, 24],
            blocks: &[40, 1, 33],
            locations: &[
                &[73, 33, 32],
                &[90, -1, 3],
                &[39, 0, 0],
                &[41, 2, 99],
                &[0, -1, -1],
            ],
            ..base
        },
        Scene {
            name: "a head of 136",
            dtype: DType::F16,
            heads: [5, 1, 136],
            blocks: &[20, 50],
            locations: &[&[69, 49], &[19, -1], &[300, 280]],
            split: SPLIT,
            ..base
        },
        Scene {
            name: "the smallest head, three query heads for each KV head",
            dtype: DType::BF16,
            heads: [6, 2, 8],
            blocks: &[90, 3],
            locations: &[&[92, 2], &[50, -1], &[500, 410]],
            split: SPLIT,
            ..base
        },
        Scene {
            name: "forty query heads of one KV head",
            heads: [40, 1, 16],
            blocks: &[35],
            locations: &[&[34], &[12]],
            ..base
        },
        Scene {
            name: "the widest head, two rows",
            dtype: DType::F16,
            heads: [8, 2, 256],
            blocks: &[9, 40],
            locations: &[&[48, 39], &[60, 20]],
            ..base
        },
        Scene {
            name: "a window that ends within tiles and leaves out others",
            heads: [4, 2, 32],
            blocks: &[150, 20, 7],
            locations: &[&[176, 26, 6], &[140, -1, 3], &[160, 10, 300]],
            split: SPLIT,
            window: Some(90),
            ..base
        },
        Scene {
            name: "a window of one key",
            dtype: DType::F16,
            heads: [5, 1, 128],
            blocks: &[100, 3],
            locations: &[&[40, -1], &[102, 2], &[99, 0]],
            window: Some(1),
            ..base
        },
        Scene {
            name: "a window in which rows share no key, a head of 24",
            dtype: DType::BF16,
            heads: [14, 2, 24],
            blocks: &[3, 1, 70, 2, 250],
            locations: &[&[40, 37, 36, -1, -1], &[325, 322, 321, 251, 249]],
            split: SPLIT,
            window: Some(33),
            ..base
        },
        Scene {
            name: "a latent that heads of DeepSeek-V3 share, of which 32 pairs rotate",
            dtype: DType::F16,
            heads: [20, 1, 576],
            blocks: &[19, 5],
            locations: &[&[23, 4], &[40, -1]],
            range: 0.5,
            pairs: Some(32),
            ..base
        },
        Scene {
            name: "four pairs of a small head rotate",
            heads: [3, 1, 24],
            blocks: &[33, 2],
            locations: &[&[34, 1], &[90, 7], &[12, -1]],
            pairs: Some(4),
            ..base
        },
        Scene {
            name: "the authors' CUDA kernel test, f32",
            heads: [40, 8, 128],
            blocks: &[500, 3, 20, 20],
            locations: &all,
            range: 2.0,
            ..base
        },
        Scene {
            name: "the authors' CUDA kernel test, f16",
            dtype: DType::F16,
            heads: [40, 8, 128],
            blocks: &[500, 3, 20, 20],
            locations: &all,
            range: 2.0,
            ..base
        },
        Scene {
            name: "the authors' CUDA kernel test where the bound bites, f32",
            heads: [40, 8, 128],
            blocks: &[500, 3, 20, 20],
            locations: &bites,
            range: 2.0,
            ..base
        },
    ];
    scenes.iter().map(Scene::case).collect()
}
