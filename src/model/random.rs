//! Weights of pseudo-random numbers, made on the device: a shape is measured without a checkpoint.
//!
//! The tensors are those that a checkpoint of the shape would have, in the same storage types, and small
//! enough for activations to stay of order one.

use super::Config;
use super::load::{Attention, Head, Layer, Matrix, Pieces, Weights, padded};
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
    for _ in 0..config.n_layers {
        layers.push(match layers.first() {
            Some(first) if how.shared => first.clone(),
            _ => make.layer(config, how.dtype)?,
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
        qk_norm: config.family.model_type == "qwen3",
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

    fn layer(&mut self, c: &Config, dtype: DType) -> Result<Layer> {
        let (hidden, ff) = (c.hidden_size, padded(c.intermediate_size));
        let (q, qkv) = (c.q_size(), c.q_size() + 2 * c.kv_size());
        let norms = c.family.model_type == "qwen3";
        Ok(Layer {
            attention_norm: self.norm(hidden)?,
            attention: Attention::Heads {
                qkv: self.matrix(qkv, hidden, dtype)?,
                qkv_bias: self.bias(qkv, c.family.model_type == "qwen2")?,
                q_norm: if norms {
                    self.norm(c.head_dim)
                } else {
                    self.bias(c.head_dim, false)
                }?,
                k_norm: if norms {
                    self.norm(c.head_dim)
                } else {
                    self.bias(c.head_dim, false)
                }?,
            },
            out: self.matrix(padded(hidden), q, dtype)?,
            out_bias: self.bias(hidden, false)?,
            feed_forward_norm: self.norm(hidden)?,
            router: None,
            gate_up: self.matrix(2 * ff, hidden, dtype)?,
            gate_up_bias: self.bias(2 * ff, false)?,
            down: self.matrix(padded(hidden), ff, dtype)?,
            down_bias: self.bias(hidden, false)?,
            shared: None,
        })
    }
}
