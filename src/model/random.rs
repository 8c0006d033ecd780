//! Weights of pseudo-random numbers, made on the device: a shape is measured without a checkpoint.
//!
//! The tensors are those that a checkpoint of the shape would have, in the same storage types, and small
//! enough for activations to stay of order one.

use super::families::Heads;
use super::latent::{self, LatentWeights};
use super::load::{
    Attention, Head, Layer, Matrix, Parts, Pieces, Router, Shared, Weights, feed_forward, out,
    padded, router, rows_of, shared,
};
use super::{Config, Latent};
use crate::Result;
use crate::device::{DType, Device, Recording, Tensor};
use crate::ops::fill::{Contents, fill};

/// How random weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RandomWeights {
    /// Storage type of the layers' matrices; with codes, embedding and head are in f16, as AWQ has them.
    pub dtype: DType,
    /// Whether all layers are one layer's tensors, so that a large shape fits a small machine.
    pub shared: bool,
}

/// A device with a tensor counter, which seeds the numbers.
struct Maker<'a> {
    device: &'a Device,
    seed: u32,
    /// Stands where floats have no scales.
    no_scales: Tensor,
}

/// Channels under one scale.
const GROUP: usize = 128;

/// Makes the weights of a shape.
pub(super) fn random(device: &Device, config: &Config, how: RandomWeights) -> Result<Weights> {
    let mut make = Maker {
        device,
        seed: 0,
        no_scales: device.tensor(&[1], DType::U32)?,
    };
    let outer = match how.dtype {
        DType::U4 | DType::U8 | DType::F8 => DType::F16,
        dtype => dtype,
    };
    let (rows, cols) = (config.vocab_size, config.hidden_size);
    let embed = make.pieces(rows, cols, outer)?;
    let mut layers: Vec<Layer> = Vec::new();
    for layer in 0..config.n_layers {
        let is_like =
            |other: &usize| config.experts(*other).is_some() == config.experts(layer).is_some();
        layers.push(match (0..layer).find(is_like) {
            Some(other) if how.shared => layers[other].clone(),
            _ => make.layer(config, layer, how.dtype)?,
        });
    }
    let pieces = if config.tie_word_embeddings == Some(true) {
        embed.clone()
    } else {
        make.pieces(rows, cols, outer)?
    };
    Ok(Weights {
        embed,
        layers,
        head: Some(Head {
            norm: make.norm(cols)?,
            pieces,
            bias: device.tensor(&[rows], DType::F32)?,
        }),
        no_scales: make.no_scales,
        qk_norm: config.family.heads == Heads::Normed,
    })
}

impl Maker<'_> {
    fn filled(&mut self, shape: &[usize], dtype: DType, contents: Contents) -> Result<Tensor> {
        let tensor = self.device.tensor(shape, dtype)?;
        let mut r = Recording::default();
        self.seed = self.seed.wrapping_add(0x9e37_79b9);
        fill(&mut r, &tensor, contents, self.seed);
        self.device.play(&r)?;
        Ok(tensor)
    }

    /// Numbers that keep the size of what they are multiplied with.
    fn floats(&mut self, rows: usize, cols: usize, dtype: DType) -> Result<Tensor> {
        let scale = (3.0 / cols as f32).sqrt();
        let contents = Contents::Numbers { mean: 0.0, scale };
        self.filled(&[rows, padded(cols)], dtype, contents)
    }

    fn matrix(&mut self, rows: usize, cols: usize, dtype: DType) -> Result<Matrix> {
        if dtype.span() == 1 {
            return Ok(Matrix {
                weight: self.floats(rows, cols, dtype)?,
                scales: self.no_scales.clone(),
                group: 1,
                order: None,
            });
        }
        // Codes are uniform around the zero point, or floats below 2 whose size is 0.6; the scales' mean is
        // 1.25 times the least.
        let steps = f32::from(1u16 << dtype.bits());
        let (size, zero) = match dtype {
            DType::F8 => (0.6, 0),
            _ => (steps / 12f32.sqrt(), 1 << (dtype.bits() - 1)),
        };
        let scale = (cols as f32).sqrt().recip() / size / 1.25;
        let wide = padded(cols).next_multiple_of(dtype.span());
        let any = Contents::Numbers {
            mean: 0.0,
            scale: 0.0,
        };
        let scales = [rows, cols.div_ceil(GROUP)];
        Ok(Matrix {
            weight: self.filled(&[rows, wide], dtype, any)?,
            scales: self.filled(&scales, DType::U32, Contents::Scales { scale, zero })?,
            group: GROUP,
            order: None,
        })
    }

    fn pieces(&mut self, rows: usize, cols: usize, dtype: DType) -> Result<Pieces> {
        let most = (self.device.max_tensor_bytes() / (padded(cols) * dtype.size())).max(1);
        let starts = (0..rows).step_by(most);
        let piece = |first: usize| Ok((first, self.floats(most.min(rows - first), cols, dtype)?));
        Ok(Pieces(starts.map(piece).collect::<Result<_>>()?))
    }

    fn norm(&mut self, len: usize) -> Result<Tensor> {
        let contents = Contents::Numbers {
            mean: 1.0,
            scale: 0.1,
        };
        self.filled(&[padded(len)], DType::F32, contents)
    }

    fn bias(&mut self, len: usize, has: bool) -> Result<Tensor> {
        if !has {
            return self.device.tensor(&[padded(len)], DType::F32);
        }
        let contents = Contents::Numbers {
            mean: 0.0,
            scale: 0.1,
        };
        self.filled(&[padded(len)], DType::F32, contents)
    }

    /// A matrix of the shape that the parts of a checkpoint would make.
    fn of(&mut self, (parts, cols): &Parts, dtype: DType) -> Result<Matrix> {
        self.matrix(rows_of(parts), *cols, dtype)
    }

    fn heads(&mut self, c: &Config, dtype: DType) -> Result<Attention> {
        let qkv = c.q_size() + 2 * c.kv_size();
        let norms = c.family.heads == Heads::Normed;
        let mut norm = || {
            if norms {
                self.norm(c.head_dim)
            } else {
                self.bias(c.head_dim, false)
            }
        };
        let [q_norm, k_norm] = [norm()?, norm()?];
        Ok(Attention::Heads {
            qkv: self.matrix(qkv, c.hidden_size, dtype)?,
            qkv_bias: self.bias(qkv, c.family.heads == Heads::Biased)?,
            q_norm,
            k_norm,
        })
    }

    fn latent(&mut self, c: &Config, of: &Latent, layer: usize, dtype: DType) -> Result<Attention> {
        let (q_a, q, kv) = latent::parts(c, of, layer);
        let q_a = match (q_a, of.q_rank) {
            (Some(parts), Some(rank)) => Some((
                self.of(&parts, dtype)?,
                self.bias(rank, false)?,
                self.norm(rank)?,
            )),
            _ => None,
        };
        let q = self.of(&q, dtype)?;
        // What is taken apart is in float.
        let float = if dtype.span() > 1 { DType::F16 } else { dtype };
        Ok(Attention::Latent(Box::new(LatentWeights {
            q_a,
            no_bias: self.bias(q.weight.shape()[0], false)?,
            q,
            kv: self.of(&kv, dtype)?,
            kv_bias: self.bias(c.head_dim, false)?,
            kv_norm: self.norm(of.rank)?,
            to_latent: self.matrix(c.n_heads * of.dim(), of.nope_wide(), float)?,
            from_latent: self.matrix(c.n_heads * of.v_dim, of.dim(), float)?,
        })))
    }

    fn layer(&mut self, c: &Config, layer: usize, dtype: DType) -> Result<Layer> {
        let (hidden, ff) = (c.hidden_size, padded(c.intermediate_size));
        let [gate_up, down] = feed_forward(c, layer);
        let router = match router(c, layer) {
            None => None,
            Some(parts) => {
                let bias = self.device.tensor(&[rows_of(&parts.0)], DType::F32)?;
                Some(Router {
                    matrix: self.of(&parts, dtype)?,
                    choice: bias.clone(),
                    bias,
                })
            }
        };
        let shared = match shared(c, layer) {
            None => None,
            Some([gate_up, down]) => Some(Shared {
                no_bias: self.bias(rows_of(&gate_up.0).max(padded(hidden)), false)?,
                gate_up: self.of(&gate_up, dtype)?,
                down: self.of(&down, dtype)?,
            }),
        };
        Ok(Layer {
            attention_norm: self.norm(hidden)?,
            attention: match &c.latent {
                Some(of) => self.latent(c, of, layer, dtype)?,
                None => self.heads(c, dtype)?,
            },
            out: self.of(&out(c, layer), dtype)?,
            out_bias: self.bias(hidden, false)?,
            feed_forward_norm: self.norm(hidden)?,
            router,
            gate_up: self.of(&gate_up, dtype)?,
            gate_up_bias: self.bias(2 * ff, false)?,
            down: self.of(&down, dtype)?,
            down_bias: self.bias(hidden, false)?,
            shared,
        })
    }
}
