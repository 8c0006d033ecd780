//! Weights from files to device memory, in their own width, piece by piece.
//!
//! Matrices that are used together become one: queries, keys and values; gate and up. Rows and columns
//! that feed another matrix are padded with zeros to a multiple of eight, so that kernels read eight
//! numbers at a time. Host memory holds one piece.

use std::path::Path;

use safetensors::Dtype;

use super::tensors::{EMBED, Group, HEAD, NORM, layer_name};
use super::{Config, ModelFiles};
use crate::device::judge::pack;
use crate::device::{DType, Device, Tensor};
use crate::ops::u32_of;
use crate::{Error, Result};

/// Bytes of a matrix that are on the host at a time.
const PIECE: usize = 16 << 20;

/// Rounds up to the multiple of eight that kernels read.
pub(super) fn padded(n: usize) -> usize {
    n.next_multiple_of(8)
}

/// A matrix in pieces of rows, each of which one binding holds.
#[derive(Clone, Debug)]
pub(super) struct Pieces(pub(super) Vec<(usize, Tensor)>);

/// The tensors of one layer.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) attention_norm: Tensor,
    pub(super) qkv: Tensor,
    pub(super) qkv_bias: Tensor,
    pub(super) q_norm: Tensor,
    pub(super) k_norm: Tensor,
    pub(super) out: Tensor,
    pub(super) out_bias: Tensor,
    pub(super) feed_forward_norm: Tensor,
    pub(super) gate_up: Tensor,
    pub(super) gate_up_bias: Tensor,
    pub(super) down: Tensor,
    pub(super) down_bias: Tensor,
}

/// All tensors of a model.
#[derive(Debug)]
pub(super) struct Weights {
    pub(super) embed: Pieces,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Tensor,
    pub(super) head: Pieces,
    pub(super) head_bias: Tensor,
    /// Stands where codes have their scales.
    pub(super) no_scales: Tensor,
    /// Whether queries and keys are normalised.
    pub(super) qk_norm: bool,
}

/// A part of a fused matrix: rows of a tensor in the file, padded to a number of rows.
struct Part {
    name: String,
    rows: usize,
    padded: usize,
}

/// Where weights come from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source<'a> {
    /// A model directory.
    Files(&'a ModelFiles),
    /// Pseudo-random numbers of a storage type, for benches: a shape is measured without a checkpoint.
    Random(&'a Config, DType),
}

impl<'a> Source<'a> {
    pub(super) fn config(self) -> &'a Config {
        match self {
            Self::Files(files) => &files.config,
            Self::Random(config, _) => config,
        }
    }

    /// Whether the model has the tensors of a group; a random one has those of Qwen3.
    fn has(self, group: Group) -> bool {
        match self {
            Self::Files(files) => files.tensors.has(group),
            Self::Random(config, _) => match group {
                Group::Always | Group::QkNorm => true,
                Group::Head => config.tie_word_embeddings != Some(true),
                _ => false,
            },
        }
    }

    fn dtype(self, name: &str) -> Result<DType> {
        let files = match self {
            Self::Files(files) => files,
            Self::Random(_, dtype) => return Ok(dtype),
        };
        let entry = &files.checkpoint.tensors()[name];
        dtype_of(entry.dtype).ok_or_else(|| {
            let path = files
                .checkpoint
                .files()
                .nth(entry.file)
                .unwrap_or(Path::new(""));
            let what = format!("tensor {name} in {:?}", entry.dtype);
            Error::unsupported(
                path,
                what,
                "weights are F32, F16 or BF16; convert the checkpoint",
            )
        })
    }

    /// Rows of a tensor as they are in the file.
    fn rows(
        self,
        name: &str,
        first: usize,
        n: usize,
        cols: usize,
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        let dtype = match self {
            Self::Files(files) => return files.checkpoint.read_rows(name, first, n, bytes),
            Self::Random(_, dtype) => dtype,
        };
        // Norms around one, everything else small enough for activations to stay of order one.
        let is_norm = name.ends_with("norm.weight");
        let scale = if is_norm {
            0.1
        } else {
            (3.0 / cols as f32).sqrt()
        };
        let mut state = u32_of(first % (1 << 24)).wrapping_mul(0x9e37_79b9) ^ u32_of(name.len());
        let values = (0..n * cols).map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let unit = (state >> 8) as f32 / (1u32 << 23) as f32 - 1.0;
            unit * scale + f32::from(u8::from(is_norm))
        });
        bytes.clear();
        let words = pack(values, dtype);
        bytes.extend_from_slice(&bytemuck::cast_slice(&words)[..n * cols * dtype.size()]);
        Ok(())
    }
}

struct Loader<'a> {
    device: &'a Device,
    source: Source<'a>,
    progress: &'a mut dyn FnMut(u64),
}

/// Loads all weights; `progress` is told the bytes read by each step.
pub(super) fn load(
    device: &Device,
    source: Source<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<Weights> {
    let config = source.config();
    let mut loader = Loader {
        device,
        source,
        progress,
    };
    let embed = loader.pieces(EMBED, config.vocab_size, config.hidden_size)?;
    let layers = (0..config.n_layers)
        .map(|l| loader.layer(config, l))
        .collect::<Result<_>>()?;
    let norm = loader.vector(&[(
        NORM.to_owned(),
        config.hidden_size,
        padded(config.hidden_size),
    )])?;
    let head = if source.has(Group::Head) {
        loader.pieces(HEAD, config.vocab_size, config.hidden_size)?
    } else {
        embed.clone()
    };
    let head_bias = device.tensor(&[config.vocab_size], DType::F32)?;
    let qk_norm = source.has(Group::QkNorm);
    Ok(Weights {
        embed,
        layers,
        norm,
        head,
        head_bias,
        no_scales: device.tensor(&[1], DType::U32)?,
        qk_norm,
    })
}

fn dtype_of(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        _ => None,
    }
}

impl Loader<'_> {
    /// A matrix of several parts below each other; `[sum of padded rows, padded cols]`.
    fn matrix(&mut self, parts: &[Part], cols: usize) -> Result<Tensor> {
        let dtypes: Vec<DType> = parts
            .iter()
            .map(|p| self.source.dtype(&p.name))
            .collect::<Result<_>>()?;
        // Widening is exact; narrowing would not be.
        let dtype = if dtypes.iter().all(|&d| d == dtypes[0]) {
            dtypes[0]
        } else {
            DType::F32
        };
        let (rows, wide) = (parts.iter().map(|p| p.padded).sum(), padded(cols));
        let tensor = self.device.tensor(&[rows, wide], dtype)?;
        let mut first = 0;
        for part in parts {
            let at = first * wide * dtype.size();
            self.rows(&tensor, at, &part.name, 0, part.rows, cols)?;
            first += part.padded;
        }
        Ok(tensor)
    }

    /// Copies rows of a file's tensor to a byte offset of a wider or equal tensor.
    fn rows(
        &mut self,
        to: &Tensor,
        mut at: usize,
        name: &str,
        first: usize,
        n: usize,
        cols: usize,
    ) -> Result<()> {
        let (from, wide) = (self.source.dtype(name)?, padded(cols));
        let step = (PIECE / (wide * 4)).max(1);
        let mut bytes = Vec::new();
        let mut row = first;
        while row < first + n {
            let count = step.min(first + n - row);
            self.source.rows(name, row, count, cols, &mut bytes)?;
            (self.progress)(bytes.len() as u64);
            let packed = repack(&bytes, from, to.dtype(), cols, wide);
            self.device.write(to, at, &packed)?;
            at += packed.len();
            row += count;
        }
        Ok(())
    }

    /// A matrix in pieces that one binding holds.
    fn pieces(&mut self, name: &str, rows: usize, cols: usize) -> Result<Pieces> {
        let dtype = self.source.dtype(name)?;
        let wide = padded(cols);
        let most = (self.device.max_tensor_bytes() / (wide * dtype.size())).max(1);
        let mut pieces = Vec::new();
        for first in (0..rows).step_by(most) {
            let n = most.min(rows - first);
            let tensor = self.device.tensor(&[n, wide], dtype)?;
            self.rows(&tensor, 0, name, first, n, cols)?;
            pieces.push((first, tensor));
        }
        Ok(Pieces(pieces))
    }

    /// Vectors after each other in f32: name, length, padded length.
    fn vector(&mut self, parts: &[(String, usize, usize)]) -> Result<Tensor> {
        let mut all: Vec<f32> = Vec::new();
        let mut bytes = Vec::new();
        for (name, len, padded) in parts {
            let from = self.source.dtype(name)?;
            self.source.rows(name, 0, *len, 1, &mut bytes)?;
            (self.progress)(bytes.len() as u64);
            let wide = repack(&bytes, from, DType::F32, *len, *len);
            all.extend(bytemuck::pod_collect_to_vec::<u8, f32>(&wide));
            all.resize(all.len() + padded - len, 0.0);
        }
        self.device.upload(&[all.len()], DType::F32, &all)
    }

    /// As [`Self::vector`], or zeros where the model has no such tensors.
    fn bias(&mut self, group: Group, parts: &[(String, usize, usize)]) -> Result<Tensor> {
        if self.source.has(group) {
            return self.vector(parts);
        }
        self.device
            .tensor(&[parts.iter().map(|p| p.2).sum()], DType::F32)
    }

    fn layer(&mut self, config: &Config, layer: usize) -> Result<Layer> {
        let (hidden, ff) = (config.hidden_size, config.intermediate_size);
        let (q, kv, dim) = (config.q_size(), config.kv_size(), config.head_dim);
        let name = |tensor: &str| layer_name(layer, tensor);
        let part = |tensor: &str, rows: usize, padded: usize| Part {
            name: name(tensor),
            rows,
            padded,
        };
        let vec = |tensor: &str, len: usize| (name(tensor), len, padded(len));
        let layer = Layer {
            attention_norm: self.vector(&[vec("input_layernorm.weight", hidden)])?,
            qkv: self.matrix(
                &[
                    part("self_attn.q_proj.weight", q, q),
                    part("self_attn.k_proj.weight", kv, kv),
                    part("self_attn.v_proj.weight", kv, kv),
                ],
                hidden,
            )?,
            qkv_bias: self.bias(
                Group::QkvBias,
                &[
                    vec("self_attn.q_proj.bias", q),
                    vec("self_attn.k_proj.bias", kv),
                    vec("self_attn.v_proj.bias", kv),
                ],
            )?,
            q_norm: self.bias(Group::QkNorm, &[vec("self_attn.q_norm.weight", dim)])?,
            k_norm: self.bias(Group::QkNorm, &[vec("self_attn.k_norm.weight", dim)])?,
            out: self.matrix(
                &[part("self_attn.o_proj.weight", hidden, padded(hidden))],
                q,
            )?,
            out_bias: self.bias(Group::OutBias, &[vec("self_attn.o_proj.bias", hidden)])?,
            feed_forward_norm: self.vector(&[vec("post_attention_layernorm.weight", hidden)])?,
            gate_up: self.matrix(
                &[
                    part("mlp.gate_proj.weight", ff, padded(ff)),
                    part("mlp.up_proj.weight", ff, padded(ff)),
                ],
                hidden,
            )?,
            gate_up_bias: self.bias(
                Group::MlpBias,
                &[vec("mlp.gate_proj.bias", ff), vec("mlp.up_proj.bias", ff)],
            )?,
            down: self.matrix(&[part("mlp.down_proj.weight", hidden, padded(hidden))], ff)?,
            down_bias: self.bias(Group::MlpBias, &[vec("mlp.down_proj.bias", hidden)])?,
        };
        Ok(layer)
    }
}

/// Rows of a file's numbers, padded to `wide` columns and widened to another type if it differs.
fn repack(bytes: &[u8], from: DType, to: DType, cols: usize, wide: usize) -> Vec<u8> {
    if from == to && cols == wide {
        return bytes.to_vec();
    }
    let mut out = Vec::with_capacity(bytes.len() / (cols * from.size()).max(1) * wide * to.size());
    for row in bytes.chunks_exact(cols * from.size()) {
        if from == to {
            out.extend_from_slice(row);
        } else {
            for number in row.chunks_exact(from.size()) {
                out.extend_from_slice(&widened(number, from).to_le_bytes());
            }
        }
        out.resize(out.len() + (wide - cols) * to.size(), 0);
    }
    out
}

fn widened(number: &[u8], from: DType) -> f32 {
    match (from, number) {
        (DType::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).to_f32(),
        (DType::BF16, &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f32(),
        (_, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
        _ => panic!("{} bytes are no {from}", number.len()),
    }
}
