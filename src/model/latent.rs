//! Attention by a latent that all heads share (MLA): its weights, and its dispatches around attention itself.
//!
//! The cache holds the latent, not the keys and values that are made of it. So a query is brought to where
//! the latent is, by the matrix that makes its head's keys; what attention gathers are latents, and the matrix
//! that makes the head's values is applied to their sum. Both come from one tensor of the files, the first of
//! them turned around. Heads then meet one key, which is their value too (DeepSeek-V2, 2.1.2 and appendix C).

use super::config::{Config, Latent};
use super::load::{Loader, Matrix, PIECE, Part, Parts, padded};
use super::tensors::{
    Group, KV_A, KV_A_BIAS, KV_B, KV_NORM, Q, Q_A, Q_A_BIAS, Q_B, Q_NORM, layer_name,
};
use crate::Result;
use crate::device::{DType, Device, Recording, Tensor};
use crate::ops::heads::{Gap, heads};
use crate::ops::latent::latent;
use crate::ops::linear::{By, Norm};
use crate::ops::project::{Into, project};

/// What queries and latents are made by.
#[derive(Clone, Debug)]
pub(super) struct LatentWeights {
    /// What queries are made from, its bias and the norm on it, if that is not the residual stream.
    pub(super) q_a: Option<(Matrix, Tensor, Tensor)>,
    /// The queries' heads, in [`Latent::query_order`].
    pub(super) q: Matrix,
    /// Zeros, one for each of their channels.
    pub(super) no_bias: Tensor,
    /// The latent with its rotated channels, in [`Latent::key_order`].
    pub(super) kv: Matrix,
    pub(super) kv_bias: Tensor,
    pub(super) kv_norm: Tensor,
    /// From a query's head to the latent, `[n_heads * dim, nope_wide]`.
    pub(super) to_latent: Matrix,
    /// From the latent to a head's value, `[n_heads * v_dim, dim]`.
    pub(super) from_latent: Matrix,
}

/// What is between them in a pass, one row for each new token.
#[derive(Clone, Debug)]
pub(super) struct LatentRows {
    q_a: Option<Tensor>,
    q: Tensor,
    kv: Tensor,
    /// What attention gives, as the heads' values.
    pub(super) values: Tensor,
}

/// The matrices of a layer; keys and values of heads count as what becomes of them.
pub(super) fn matrices(config: &Config, of: &Latent, layer: usize) -> Vec<Parts> {
    let [q_a, q, kv] = parts(config, of, layer);
    let kv_b = Part {
        padded: config.n_heads * (of.nope_wide() + of.v_dim),
        ..Part::new(layer, KV_B, config.n_heads * (of.nope_dim + of.v_dim))
    };
    let mut all: Vec<Parts> = q_a.into_iter().collect();
    all.extend(q.into_iter().chain(kv));
    all.push((vec![kv_b], of.rank));
    all
}

/// What queries are made from, if it is not the residual stream; the queries; the latent.
fn parts(config: &Config, of: &Latent, layer: usize) -> [Option<Parts>; 3] {
    let hidden = config.hidden_size;
    let q = |tensor: &str| {
        let part = Part::new(layer, tensor, config.n_heads * (of.nope_dim + of.rope_dim));
        vec![part.ordered(of.nope_dim + of.rope_dim, of.query_order())]
    };
    let kv = Part::new(layer, KV_A, of.rank + of.rope_dim);
    let kv = vec![kv.ordered(of.rank + of.rope_dim, of.key_order())];
    let q_a = of
        .q_rank
        .map(|rank| (vec![Part::new(layer, Q_A, rank)], hidden));
    let q = match of.q_rank {
        Some(rank) => (q(Q_B), rank),
        None => (q(Q), hidden),
    };
    [q_a, Some(q), Some((kv, hidden))]
}

/// Numbers of the norms and biases of a layer.
pub(super) fn n_numbers(config: &Config, of: &Latent) -> usize {
    let q = config.n_heads * (of.nope_wide() + 2 * of.gap());
    q + config.head_dim + of.dim() + 2 * padded(of.q_rank.unwrap_or(0))
}

impl Loader<'_> {
    /// What queries and latents of a layer are made by.
    pub(super) fn latent(
        &mut self,
        config: &Config,
        of: &Latent,
        layer: usize,
    ) -> Result<LatentWeights> {
        let name = |tensor: &str| layer_name(layer, tensor);
        let mut plain = |parts: Parts| {
            let what = parts.0[0].name.clone();
            match self.matrix(parts)? {
                (matrix, None) => Ok(matrix),
                _ => Err(self.reordered(&what)),
            }
        };
        let [q_a, q, kv] = parts(config, of, layer);
        let q_a = q_a.map(&mut plain).transpose()?;
        let [q, kv] = [q, kv].map(|parts| plain(parts.expect("every layer has them")));
        let (q, kv) = (q?, kv?);
        let q_a = match (q_a, of.q_rank) {
            (Some(matrix), Some(rank)) => {
                let bias = vec![Part::new(layer, Q_A_BIAS, rank)];
                let bias = self.vector(Group::QkvBias, bias)?;
                Some((matrix, bias, self.norm(&name(Q_NORM), rank, None)?))
            }
            _ => None,
        };
        let of_kv = Part::new(layer, KV_A_BIAS, of.rank + of.rope_dim);
        let of_kv = of_kv.ordered(of.rank + of.rope_dim, of.key_order());
        let [to_latent, from_latent] = self.split(config, of, layer)?;
        Ok(LatentWeights {
            q_a,
            no_bias: self.device.tensor(&[q.weight.shape()[0]], DType::F32)?,
            q,
            kv,
            kv_bias: self.vector(Group::QkvBias, vec![of_kv])?,
            kv_norm: self.norm(&name(KV_NORM), of.rank, None)?,
            to_latent,
            from_latent,
        })
    }

    /// The matrix that makes keys and values of the latent, head by head: that of the keys turned around, and
    /// that of the values. What is packed is widened to f32.
    fn split(&mut self, config: &Config, of: &Latent, layer: usize) -> Result<[Matrix; 2]> {
        let name = layer_name(layer, KV_B);
        let (n_heads, rank, dim, nope_wide) = (config.n_heads, of.rank, of.dim(), of.nope_wide());
        let packed = match self.files.tensors.packed(&name).cloned() {
            None => None,
            Some(packed) => {
                let order = self.order(&packed)?;
                let [codes, scales] = self.unpacked(&packed, order.as_deref())?;
                Some((packed, order, codes, scales))
            }
        };
        let dtype = match &packed {
            None => self.dtype(&name)?,
            Some(_) => DType::F32,
        };
        let size = dtype.size();
        let weights = [
            self.device.tensor(&[n_heads * dim, nope_wide], dtype)?,
            self.device.tensor(&[n_heads * of.v_dim, dim], dtype)?,
        ];
        let rows = of.nope_dim + of.v_dim;
        let step = (PIECE / (rows * rank * size)).max(1);
        let mut bytes = Vec::new();
        for first in (0..n_heads).step_by(step) {
            let n = step.min(n_heads - first);
            if let Some((packed, order, codes, scales)) = &packed {
                let mut wide = vec![0.0; n * rows * rank];
                for (i, row) in wide.chunks_exact_mut(rank).enumerate() {
                    let at = first * rows + i;
                    let codes = &codes[at * packed.row_words()..][..packed.row_words()];
                    let scales = &scales[at * packed.groups()..][..packed.groups()];
                    packed.widen(codes, scales, order.as_deref(), row);
                }
                bytes = bytemuck::cast_slice(&wide).to_vec();
            } else {
                let checkpoint = &self.files.checkpoint;
                checkpoint.read_rows(&name, first * rows, n * rows, &mut bytes)?;
                (self.progress)(bytes.len() as u64);
            }
            let mut keys = vec![0; n * dim * nope_wide * size];
            let mut values = vec![0; n * of.v_dim * dim * size];
            for (h, head) in bytes.chunks_exact(rows * rank * size).enumerate() {
                for (j, row) in head.chunks_exact(rank * size).enumerate() {
                    if j >= of.nope_dim {
                        let to = (h * of.v_dim + j - of.nope_dim) * dim * size;
                        values[to..to + row.len()].copy_from_slice(row);
                        continue;
                    }
                    for (i, number) in row.chunks_exact(size).enumerate() {
                        let to = ((h * dim + i) * nope_wide + j) * size;
                        keys[to..to + size].copy_from_slice(number);
                    }
                }
            }
            for (weight, bytes) in weights.iter().zip([keys, values]) {
                let of_head = weight.bytes() / n_heads;
                self.device.write(weight, first * of_head, &bytes)?;
            }
        }
        Ok(weights.map(|weight| Matrix {
            weight,
            scales: self.no_scales.clone(),
            group: 1,
            order: None,
        }))
    }
}

impl LatentWeights {
    pub(super) fn matrices(&self) -> Vec<&Matrix> {
        let mut all: Vec<&Matrix> = self.q_a.iter().map(|(matrix, ..)| matrix).collect();
        all.extend([&self.q, &self.kv, &self.to_latent, &self.from_latent]);
        all
    }

    pub(super) fn vectors(&self) -> Vec<&Tensor> {
        let mut all = vec![&self.no_bias, &self.kv_bias, &self.kv_norm];
        all.extend(self.q_a.iter().flat_map(|(_, bias, norm)| [bias, norm]));
        all
    }

    /// Records what comes before attention: latents of `n` rows to their slots in `keys`, queries to `q`.
    #[expect(clippy::too_many_arguments, reason = "what one layer needs of a pass")]
    pub(super) fn before(
        &self,
        r: &mut Recording,
        of: &Latent,
        x: &Tensor,
        before: Norm<'_>,
        [angles, targets]: [&Tensor; 2],
        rows: &LatentRows,
        [q, keys]: [&Tensor; 2],
        (n, by): (usize, By),
    ) {
        let norm = |weight, count| Norm {
            weight,
            count,
            eps: Latent::EPS,
        };
        let (to, by) = (Into::Replace, (n, by));
        if let (Some((matrix, bias, weight)), Some(q_a)) = (&self.q_a, &rows.q_a) {
            let rank = of.q_rank.expect("it has a matrix");
            project(r, x, Some(before), matrix.linear(bias), q_a, by, to);
            let norm = Some(norm(weight, rank));
            project(r, q_a, norm, self.q.linear(&self.no_bias), &rows.q, by, to);
        } else {
            let to_q = self.q.linear(&self.no_bias);
            project(r, x, Some(before), to_q, &rows.q, by, to);
        }
        let to_kv = self.kv.linear(&self.kv_bias);
        project(r, x, Some(before), to_kv, &rows.kv, by, to);
        let norm = norm(&self.kv_norm, of.rank);
        latent(r, &rows.kv, norm, angles, targets, keys, n);
        let (matrix, gap) = (self.to_latent.linear(&self.no_bias), Gap::Output(of.gap()));
        let sizes = [n, q.shape()[1], of.nope_wide()];
        heads(r, &rows.q, matrix, gap, q, sizes);
    }

    /// Records what comes behind it: the heads' values of the latents that they gathered.
    pub(super) fn behind(
        &self,
        r: &mut Recording,
        of: &Latent,
        gathered: &Tensor,
        rows: &LatentRows,
        [n, n_heads]: [usize; 2],
    ) {
        let (matrix, gap) = (self.from_latent.linear(&self.no_bias), Gap::Input(of.gap()));
        heads(
            r,
            gathered,
            matrix,
            gap,
            &rows.values,
            [n, n_heads, of.dim()],
        );
    }
}

impl LatentRows {
    /// Room for `n` rows.
    pub(super) fn new(device: &Device, config: &Config, of: &Latent, n: usize) -> Result<Self> {
        let wide = |cols: usize| device.tensor(&[n, padded(cols)], DType::F32);
        Ok(Self {
            q_a: of.q_rank.map(wide).transpose()?,
            q: wide(config.n_heads * (of.nope_wide() + 2 * of.gap()))?,
            kv: wide(config.head_dim)?,
            values: wide(config.attention_size())?,
        })
    }

    /// Numbers of one row.
    pub(super) fn width(config: &Config, of: &Latent) -> usize {
        let q = config.n_heads * (of.nope_wide() + 2 * of.gap());
        padded(of.q_rank.unwrap_or(0)) + q + config.head_dim + padded(config.attention_size())
    }
}
