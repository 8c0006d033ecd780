//! Weights from files to device memory, in their own width, piece by piece.
//!
//! Matrices that are used together become one: queries, keys and values; gate and up. Rows and columns
//! that feed another matrix are padded with zeros to a multiple of eight, so that kernels read eight
//! numbers at a time. Host memory holds one piece of a float matrix; of a quantised one, whose codes a
//! file has in another order, the codes of one part.

use std::borrow::Cow;
use std::path::Path;

use safetensors::Dtype;

use super::quant::{Packed, Role, positions};
use super::tensors::{EMBED, Group, HEAD, NORM, layer_name};
use super::{Config, ModelFiles};
use crate::device::{DType, Device, Tensor};
use crate::ops::linear::Linear;
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

/// A matrix as kernels read it: floats, or codes with their scales.
#[derive(Clone, Debug)]
pub(super) struct Matrix {
    /// `[n, k padded]`.
    pub(super) weight: Tensor,
    /// Scale and zero point of every row and group, `[n, ceil(k / group)]`; one word beside floats.
    pub(super) scales: Tensor,
    /// Channels under one scale, a multiple of 32; 1 beside floats.
    pub(super) group: usize,
    /// The channel that each column is of, `[k]`, where they are stored in another order: what is
    /// multiplied with the matrix is gathered in it first.
    pub(super) order: Option<Tensor>,
}

impl Matrix {
    /// The whole matrix, with a bias.
    pub(super) fn linear<'a>(&'a self, bias: &'a Tensor) -> Linear<'a> {
        Linear {
            weight: &self.weight,
            scales: &self.scales,
            group: self.group,
            bias,
            first: 0,
        }
    }
}

/// The tensors of one layer. A norm's weights are in the order of the matrix that follows it.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    pub(super) attention_norm: Tensor,
    pub(super) qkv: Matrix,
    pub(super) qkv_bias: Tensor,
    pub(super) q_norm: Tensor,
    pub(super) k_norm: Tensor,
    pub(super) out: Matrix,
    pub(super) out_bias: Tensor,
    pub(super) feed_forward_norm: Tensor,
    pub(super) gate_up: Matrix,
    pub(super) gate_up_bias: Tensor,
    pub(super) down: Matrix,
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
    /// One word, which stands in for the scales of float matrices.
    pub(super) no_scales: Tensor,
    /// Whether queries and keys are normalised.
    pub(super) qk_norm: bool,
}

impl Weights {
    /// Bytes of all of them on the device.
    pub(super) fn bytes(&self) -> u64 {
        let mut all: Vec<&Tensor> = vec![&self.norm, &self.head_bias];
        let pieces = self.embed.0.iter().chain(&self.head.0);
        all.extend(pieces.map(|(_, piece)| piece));
        for l in &self.layers {
            let matrices = [&l.qkv, &l.out, &l.gate_up, &l.down];
            all.extend(matrices.iter().flat_map(|m| [&m.weight, &m.scales]));
            all.extend(matrices.iter().filter_map(|m| m.order.as_ref()));
            all.extend([
                &l.attention_norm,
                &l.feed_forward_norm,
                &l.q_norm,
                &l.k_norm,
            ]);
            all.extend([&l.qkv_bias, &l.out_bias, &l.gate_up_bias, &l.down_bias]);
        }
        // A tied head is the embedding.
        all.sort_unstable_by_key(|tensor| tensor.id());
        all.dedup_by_key(|tensor| tensor.id());
        all.iter().map(|tensor| tensor.bytes() as u64).sum()
    }

    /// Whether a matrix stores its channels in an order of its own.
    pub(super) fn has_order(&self) -> bool {
        let of = |l: &Layer| [&l.qkv, &l.out, &l.gate_up, &l.down].map(|m| m.order.is_some());
        self.layers.iter().flat_map(of).any(|has| has)
    }
}

/// A part of a fused matrix: rows of a tensor in the file, padded to a number of rows.
pub(super) struct Part {
    pub(super) name: String,
    pub(super) rows: usize,
    pub(super) padded: usize,
}

/// The matrices of a layer: queries, keys and values; out; gate and up; down. Their parts from above to
/// below, and their input channels.
pub(super) fn matrices(config: &Config, layer: usize) -> [(Vec<Part>, usize); 4] {
    let (hidden, ff) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.q_size(), config.kv_size());
    let part = |tensor: &str, rows: usize| Part {
        name: layer_name(layer, tensor),
        rows,
        padded: padded(rows),
    };
    [
        (
            vec![
                part("self_attn.q_proj.weight", q),
                part("self_attn.k_proj.weight", kv),
                part("self_attn.v_proj.weight", kv),
            ],
            hidden,
        ),
        (vec![part("self_attn.o_proj.weight", hidden)], q),
        (
            vec![
                part("mlp.gate_proj.weight", ff),
                part("mlp.up_proj.weight", ff),
            ],
            hidden,
        ),
        (vec![part("mlp.down_proj.weight", hidden)], ff),
    ]
}

/// A packed matrix, and the order of its channels if that is not their own.
type Ordered = (Packed, Option<Vec<u32>>);

struct Loader<'a> {
    device: &'a Device,
    files: &'a ModelFiles,
    progress: &'a mut dyn FnMut(u64),
    /// One word, which stands in for the scales of float matrices.
    no_scales: Tensor,
    /// Matrices whose parts are stored in different ways, and were widened therefore.
    widened: Vec<String>,
}

/// Loads all weights; `progress` is told the bytes read by each step.
pub(super) fn load(
    device: &Device,
    files: &ModelFiles,
    progress: &mut dyn FnMut(u64),
) -> Result<Weights> {
    let config = &files.config;
    let mut loader = Loader {
        device,
        files,
        progress,
        no_scales: device.tensor(&[1], DType::U32)?,
        widened: Vec::new(),
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
    let head = if files.tensors.has(Group::Head) {
        loader.pieces(HEAD, config.vocab_size, config.hidden_size)?
    } else {
        embed.clone()
    };
    if let [first, ..] = &loader.widened[..] {
        log::warn!(
            "{first} and {} other fused matrices are widened to f32: their parts are stored in different ways",
            loader.widened.len() - 1
        );
    }
    let head_bias = device.tensor(&[config.vocab_size], DType::F32)?;
    let qk_norm = files.tensors.has(Group::QkNorm);
    Ok(Weights {
        embed,
        layers,
        norm,
        head,
        head_bias,
        no_scales: loader.no_scales,
        qk_norm,
    })
}

/// The storage type of a float type of files.
pub(super) fn dtype_of(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        _ => None,
    }
}

impl Loader<'_> {
    fn dtype(&self, name: &str) -> Result<DType> {
        let checkpoint = &self.files.checkpoint;
        let entry = &checkpoint.tensors()[name];
        dtype_of(entry.dtype).ok_or_else(|| {
            let path = checkpoint.files().nth(entry.file).unwrap_or(Path::new(""));
            let what = format!("tensor {name} in {:?}", entry.dtype);
            Error::unsupported(
                path,
                what,
                "weights are F32, F16 or BF16; convert the checkpoint",
            )
        })
    }

    /// A matrix of several parts below each other; `[sum of padded rows, padded cols]`. With it, the order
    /// of its channels if that is not their own.
    fn matrix(&mut self, parts: &[Part], cols: usize) -> Result<(Matrix, Option<Vec<u32>>)> {
        let mut packed = Vec::with_capacity(parts.len());
        for part in parts {
            let matrix = self.files.tensors.packed(&part.name).cloned();
            let order = matrix
                .as_ref()
                .map(|matrix| self.order(matrix))
                .transpose()?;
            packed.push(matrix.zip(order));
        }
        let whole: Option<Vec<_>> = packed.iter().cloned().collect();
        match whole {
            // All of a checkpoint is packed in one way, so that only the orders may differ.
            Some(all) if all.iter().all(|(_, order)| *order == all[0].1) => self.codes(parts, &all),
            _ => Ok((self.floats(parts, &packed, cols)?, None)),
        }
    }

    /// The order of the channels of a packed matrix.
    fn order(&mut self, packed: &Packed) -> Result<Option<Vec<u32>>> {
        let files = self.files;
        for (role, _) in packed.tensors() {
            if matches!(role, Role::Order | Role::Shape) {
                let entry = files.checkpoint.tensors().get(&packed.name(role));
                (self.progress)(entry.map_or(0, |entry| entry.len));
            }
        }
        files.checkpoint.order(packed)
    }

    /// A matrix of packed parts that have the same order.
    fn codes(&mut self, parts: &[Part], all: &[Ordered]) -> Result<(Matrix, Option<Vec<u32>>)> {
        let (first, order) = &all[0];
        let rows = parts.iter().map(|p| p.padded).sum();
        let weight = self
            .device
            .tensor(&[rows, first.wide()], first.scheme.dtype)?;
        let scales = self.device.tensor(&[rows, first.groups()], DType::U32)?;
        let mut row = 0;
        for (part, (packed, order)) in parts.iter().zip(all) {
            let (codes, words) = self.unpacked(packed, order.as_deref())?;
            let to_bytes: fn(&[u32]) -> &[u8] = bytemuck::cast_slice;
            self.device
                .write(&weight, row * first.row_words() * 4, to_bytes(&codes))?;
            self.device
                .write(&scales, row * first.groups() * 4, to_bytes(&words))?;
            row += part.padded;
        }
        let matrix = Matrix {
            weight,
            scales,
            group: first.group(),
            order: order
                .as_ref()
                .map(|o| self.device.upload(&[o.len()], DType::U32, o))
                .transpose()?,
        };
        Ok((matrix, order.clone()))
    }

    /// Codes and scales of a packed matrix, as kernels read them.
    fn unpacked(&mut self, packed: &Packed, order: Option<&[u32]>) -> Result<(Vec<u32>, Vec<u32>)> {
        let position = order.map(positions);
        let (mut scales, mut zeros) = (Vec::new(), Vec::new());
        let mut codes = vec![0; packed.n * packed.row_words()];
        let mut bytes = Vec::new();
        for (role, shape) in packed.tensors() {
            let (name, rows) = (packed.name(role), shape[0]);
            let cols = shape.get(1).copied().unwrap_or(1);
            match role {
                Role::Codes => {
                    let step = (PIECE / (cols * 4))
                        .next_multiple_of(packed.row_step())
                        .max(1);
                    for first in (0..rows).step_by(step) {
                        let n = step.min(rows - first);
                        self.files
                            .checkpoint
                            .read_rows(&name, first, n, &mut bytes)?;
                        (self.progress)(bytes.len() as u64);
                        let words: Cow<'_, [u32]> = words_of(&bytes);
                        packed.place(first, &words, position.as_deref(), &mut codes);
                    }
                }
                Role::Scales => {
                    let from = self.dtype(&name)?;
                    self.files
                        .checkpoint
                        .read_rows(&name, 0, rows, &mut bytes)?;
                    (self.progress)(bytes.len() as u64);
                    let numbers = bytes.chunks_exact(from.size());
                    scales = numbers.map(|number| widened(number, from)).collect();
                }
                Role::Zeros => {
                    self.files
                        .checkpoint
                        .read_rows(&name, 0, rows, &mut bytes)?;
                    (self.progress)(bytes.len() as u64);
                    zeros = words_of(&bytes).into_owned();
                }
                Role::Order | Role::Shape => {}
            }
        }
        let words = packed.scales(&scales, &zeros);
        packed.pad(&mut codes, &words);
        Ok((codes, words))
    }

    /// A matrix in float. Parts in different types, and packed parts, are widened to f32.
    fn floats(
        &mut self,
        parts: &[Part],
        packed: &[Option<Ordered>],
        cols: usize,
    ) -> Result<Matrix> {
        let dtypes: Vec<Option<DType>> = parts
            .iter()
            .zip(packed)
            .map(|(part, packed)| match packed {
                None => self.dtype(&part.name).map(Some),
                Some(_) => Ok(None),
            })
            .collect::<Result<_>>()?;
        // Widening is exact; narrowing would not be.
        let alike = dtypes[0].filter(|_| dtypes.iter().all(|&d| d == dtypes[0]));
        if packed.iter().any(Option::is_some) {
            self.widened.push(parts[0].name.clone());
        }
        let dtype = alike.unwrap_or(DType::F32);
        let (rows, wide) = (parts.iter().map(|p| p.padded).sum(), padded(cols));
        let weight = self.device.tensor(&[rows, wide], dtype)?;
        let mut first = 0;
        for (part, packed) in parts.iter().zip(packed) {
            let at = first * wide * dtype.size();
            match packed {
                None => self.rows(&weight, at, &part.name, 0, part.rows, cols)?,
                Some((packed, order)) => self.wide_rows(&weight, at, packed, order.as_deref())?,
            }
            first += part.padded;
        }
        Ok(Matrix {
            weight,
            scales: self.no_scales.clone(),
            group: 1,
            order: None,
        })
    }

    /// Copies a packed matrix to a byte offset of one in f32.
    fn wide_rows(
        &mut self,
        to: &Tensor,
        mut at: usize,
        packed: &Packed,
        order: Option<&[u32]>,
    ) -> Result<()> {
        let (codes, scales) = self.unpacked(packed, order)?;
        let wide = padded(packed.k);
        let step = (PIECE / (wide * 4)).max(1);
        let codes = codes.chunks(step * packed.row_words());
        for (codes, scales) in codes.zip(scales.chunks(step * packed.groups())) {
            let mut piece = vec![0.0; codes.len() / packed.row_words() * wide];
            let rows = piece.chunks_exact_mut(wide);
            let codes = codes.chunks_exact(packed.row_words());
            for ((row, codes), scales) in rows.zip(codes).zip(scales.chunks_exact(packed.groups()))
            {
                packed.widen(codes, scales, order, &mut row[..packed.k]);
            }
            self.device.write(to, at, bytemuck::cast_slice(&piece))?;
            at += piece.len() * 4;
        }
        Ok(())
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
        let (from, wide) = (self.dtype(name)?, padded(cols));
        let step = (PIECE / (wide * 4)).max(1);
        let mut bytes = Vec::new();
        let mut row = first;
        while row < first + n {
            let count = step.min(first + n - row);
            self.files
                .checkpoint
                .read_rows(&name, row, count, &mut bytes)?;
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
        let dtype = self.dtype(name)?;
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

    /// The elements of a vector.
    fn numbers(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        let mut bytes = Vec::new();
        let from = self.dtype(name)?;
        self.files.checkpoint.read_rows(name, 0, len, &mut bytes)?;
        (self.progress)(bytes.len() as u64);
        let numbers = bytes.chunks_exact(from.size());
        Ok(numbers.map(|number| widened(number, from)).collect())
    }

    /// Vectors after each other in f32: name, length, padded length.
    fn vector(&mut self, parts: &[(String, usize, usize)]) -> Result<Tensor> {
        let mut all: Vec<f32> = Vec::new();
        for (name, len, padded) in parts {
            all.extend(self.numbers(name, *len)?);
            all.resize(all.len() + padded - len, 0.0);
        }
        self.device.upload(&[all.len()], DType::F32, &all)
    }

    /// The weights of a norm, in the order of the channels that the matrix after it has.
    fn norm(&mut self, name: &str, len: usize, order: Option<&[u32]>) -> Result<Tensor> {
        let mut weights = self.numbers(name, len)?;
        if let Some(order) = order {
            weights = order
                .iter()
                .map(|&channel| weights[channel as usize])
                .collect();
        }
        weights.resize(padded(len), 0.0);
        self.device.upload(&[weights.len()], DType::F32, &weights)
    }

    /// As [`Self::vector`], or zeros where the model has no such tensors.
    fn bias(&mut self, group: Group, parts: &[(String, usize, usize)]) -> Result<Tensor> {
        if self.files.tensors.has(group) {
            return self.vector(parts);
        }
        self.device
            .tensor(&[parts.iter().map(|p| p.2).sum()], DType::F32)
    }

    fn layer(&mut self, config: &Config, layer: usize) -> Result<Layer> {
        let (hidden, ff) = (config.hidden_size, config.intermediate_size);
        let (q, kv, dim) = (config.q_size(), config.kv_size(), config.head_dim);
        let name = |tensor: &str| layer_name(layer, tensor);
        let vec = |tensor: &str, len: usize| (name(tensor), len, padded(len));
        let [qkv, out, gate_up, down] = matrices(config, layer);
        let (qkv, order) = self.matrix(&qkv.0, qkv.1)?;
        let before = name("input_layernorm.weight");
        let attention_norm = self.norm(&before, hidden, order.as_deref())?;
        let (out, _) = self.matrix(&out.0, out.1)?;
        let (gate_up, order) = self.matrix(&gate_up.0, gate_up.1)?;
        let before = name("post_attention_layernorm.weight");
        let feed_forward_norm = self.norm(&before, hidden, order.as_deref())?;
        let (down, _) = self.matrix(&down.0, down.1)?;
        Ok(Layer {
            attention_norm,
            qkv,
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
            out,
            out_bias: self.bias(Group::OutBias, &[vec("self_attn.o_proj.bias", hidden)])?,
            feed_forward_norm,
            gate_up,
            gate_up_bias: self.bias(
                Group::MlpBias,
                &[vec("mlp.gate_proj.bias", ff), vec("mlp.up_proj.bias", ff)],
            )?,
            down,
            down_bias: self.bias(Group::MlpBias, &[vec("mlp.down_proj.bias", hidden)])?,
        })
    }
}

/// The words of little-endian bytes.
fn words_of(bytes: &[u8]) -> Cow<'_, [u32]> {
    bytemuck::try_cast_slice(bytes).map_or_else(
        |_| Cow::Owned(bytemuck::pod_collect_to_vec(bytes)),
        Cow::Borrowed,
    )
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

/// A number of a file as f32.
pub(super) fn widened(number: &[u8], from: DType) -> f32 {
    match (from, number) {
        (DType::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).to_f32(),
        (DType::BF16, &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f32(),
        (_, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
        _ => panic!("{} bytes are no {from}", number.len()),
    }
}
