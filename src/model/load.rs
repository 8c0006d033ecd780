//! Weights from files to device memory, in their own width, piece by piece.
//!
//! Matrices that are used together become one: queries, keys and values; gate and up. Rows and columns
//! that feed another matrix are padded with zeros to a multiple of eight, so that kernels read eight
//! numbers at a time. Rows of queries and keys lie as [`Config::head_order`] has them, or a latent's orders: a
//! product of two permuted vectors is that of the vectors. Host memory holds one piece of a float matrix; of a quantised
//! one, whose codes a file has in another order, the codes of one tensor.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;

use safetensors::Dtype;

use super::latent::{self, LatentWeights};
use super::quant::{Packed, Role, positions};
use super::tensors::{
    CHOICE_BIAS, EMBED, Group, HEAD, NORM, ROUTER, SHARED, expert_name, layer_name,
};
use super::{Config, Experts, ModelFiles};
use crate::device::{DType, Device, Tensor};
use crate::ops::linear::Linear;
use crate::{Error, Result};

/// Bytes of a matrix that are on the host at a time.
pub(super) const PIECE: usize = 16 << 20;

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
    pub(super) attention: Attention,
    pub(super) out: Matrix,
    pub(super) out_bias: Tensor,
    pub(super) feed_forward_norm: Tensor,
    /// What chooses experts; with it, `gate_up` and `down` hold those of all experts below each other.
    pub(super) router: Option<Router>,
    pub(super) gate_up: Matrix,
    pub(super) gate_up_bias: Tensor,
    pub(super) down: Matrix,
    pub(super) down_bias: Tensor,
    /// What all tokens go through beside the experts that they choose.
    pub(super) shared: Option<Shared>,
}

/// What queries and keys are made by.
#[derive(Clone, Debug)]
pub(super) enum Attention {
    /// Keys and values of heads.
    Heads {
        qkv: Matrix,
        qkv_bias: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
    },
    /// A latent that all heads share.
    Latent(Box<LatentWeights>),
}

/// What chooses experts.
#[derive(Clone, Debug)]
pub(super) struct Router {
    pub(super) matrix: Matrix,
    /// Zeros.
    pub(super) bias: Tensor,
    /// Added to the scores for the choice alone.
    pub(super) choice: Tensor,
}

/// A feed-forward block without biases.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub(super) gate_up: Matrix,
    pub(super) down: Matrix,
    /// Zeros, as many as either matrix has rows.
    pub(super) no_bias: Tensor,
}

impl Layer {
    /// Its matrices, but what chooses experts.
    pub(super) fn matrices(&self) -> Vec<&Matrix> {
        let mut all = match &self.attention {
            Attention::Heads { qkv, .. } => vec![qkv],
            Attention::Latent(latent) => latent.matrices(),
        };
        all.extend([&self.out, &self.gate_up, &self.down]);
        all.extend(self.shared.iter().flat_map(|s| [&s.gate_up, &s.down]));
        all
    }

    /// Its norms and biases.
    pub(super) fn vectors(&self) -> Vec<&Tensor> {
        let mut all = vec![&self.attention_norm, &self.feed_forward_norm];
        match &self.attention {
            Attention::Heads {
                qkv_bias,
                q_norm,
                k_norm,
                ..
            } => all.extend([qkv_bias, q_norm, k_norm]),
            Attention::Latent(latent) => all.extend(latent.vectors()),
        }
        all.extend([&self.out_bias, &self.gate_up_bias, &self.down_bias]);
        all.extend(self.shared.iter().map(|shared| &shared.no_bias));
        all
    }
}

/// What makes logits of the hidden state.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) norm: Tensor,
    pub(super) pieces: Pieces,
    pub(super) bias: Tensor,
}

/// The tensors of a range of a model's layers.
#[derive(Debug)]
pub(super) struct Weights {
    /// No piece where the first layer is not among them.
    pub(super) embed: Pieces,
    pub(super) layers: Vec<Layer>,
    /// None where the last layer is not among them.
    pub(super) head: Option<Head>,
    /// One word, which stands in for the scales of float matrices.
    pub(super) no_scales: Tensor,
    /// Whether queries and keys are normalised.
    pub(super) qk_norm: bool,
}

impl Weights {
    /// Bytes of all of them on the device.
    pub(super) fn bytes(&self) -> u64 {
        let mut all: Vec<&Tensor> = self.embed.0.iter().map(|(_, piece)| piece).collect();
        if let Some(head) = &self.head {
            all.extend([&head.norm, &head.bias]);
            all.extend(head.pieces.0.iter().map(|(_, piece)| piece));
        }
        for l in &self.layers {
            let matrices = l.matrices();
            all.extend(matrices.iter().flat_map(|m| [&m.weight, &m.scales]));
            all.extend(matrices.iter().filter_map(|m| m.order.as_ref()));
            all.extend(l.vectors());
            let router = l.router.iter();
            all.extend(
                router.flat_map(|r| [&r.matrix.weight, &r.matrix.scales, &r.bias, &r.choice]),
            );
        }
        // A tied head is the embedding.
        all.sort_unstable_by_key(|tensor| tensor.id());
        all.dedup_by_key(|tensor| tensor.id());
        all.iter().map(|tensor| tensor.bytes() as u64).sum()
    }

    /// Whether a matrix stores its channels in an order of its own.
    pub(super) fn has_order(&self) -> bool {
        let mut all = self.layers.iter().flat_map(Layer::matrices);
        all.any(|m| m.order.is_some())
    }
}

/// A part of a fused matrix or vector: a tensor, by the name that it has where files fuse nothing, padded
/// to a number of rows.
pub(super) struct Part {
    pub(super) name: String,
    pub(super) rows: usize,
    pub(super) padded: usize,
    /// How its rows lie on the device, if not in the order of the file.
    pub(super) order: Option<Rc<Order>>,
}

/// An order of rows that repeats head by head.
#[derive(Debug)]
pub(super) struct Order {
    /// Rows of a head in the file.
    unit: usize,
    /// Those of a head on the device: the row of the file, or zeros.
    rows: Vec<Option<usize>>,
}

impl Part {
    pub(super) fn new(layer: usize, tensor: &str, rows: usize) -> Self {
        Self {
            name: layer_name(layer, tensor),
            rows,
            padded: padded(rows),
            order: None,
        }
    }

    /// Heads whose channels are rotated, in the model's order.
    fn rotated(config: &Config, layer: usize, tensor: &str, rows: usize) -> Self {
        let part = Self::new(layer, tensor, rows);
        match config.head_order() {
            Some(order) => part.ordered(config.head_dim, order.into_iter().map(Some).collect()),
            None => part,
        }
    }

    /// The same part with its rows, in units of `unit`, in another order.
    pub(super) fn ordered(self, unit: usize, rows: Vec<Option<usize>>) -> Self {
        Self {
            padded: self.rows / unit * rows.len(),
            order: Some(Rc::new(Order { unit, rows })),
            ..self
        }
    }
}

/// Queries, keys and values of a layer: their weights or their biases.
fn qkv(config: &Config, layer: usize, end: &str) -> Vec<Part> {
    let (q, kv) = (config.q_size(), config.kv_size());
    vec![
        Part::rotated(config, layer, &format!("self_attn.q_proj.{end}"), q),
        Part::rotated(config, layer, &format!("self_attn.k_proj.{end}"), kv),
        Part::new(layer, &format!("self_attn.v_proj.{end}"), kv),
    ]
}

/// Gate and up of a layer: their weights or their biases.
fn gate_up(config: &Config, layer: usize, end: &str) -> Vec<Part> {
    let ff = config.intermediate_size;
    let part = |module: &str| Part::new(layer, &format!("mlp.{module}.{end}"), ff);
    vec![part("gate_proj"), part("up_proj")]
}

/// Gate and up of every expert of a layer, and down of every expert.
fn experts(config: &Config, layer: usize, experts: &Experts) -> [Vec<Part>; 2] {
    let (hidden, ff) = (config.hidden_size, experts.intermediate_size);
    let part = |e: usize, module: &str, rows| Part::new(layer, &expert_name(e, module), rows);
    let all = 0..experts.count;
    [
        all.clone()
            .flat_map(|e| [part(e, "gate_proj", ff), part(e, "up_proj", ff)])
            .collect(),
        all.map(|e| part(e, "down_proj", hidden)).collect(),
    ]
}

/// A matrix: its parts from above to below, and its input channels.
pub(super) type Parts = (Vec<Part>, usize);

/// Gate and up of a layer, or of all its experts, and down.
fn feed_forward(config: &Config, layer: usize) -> [Parts; 2] {
    let (hidden, ff) = (config.hidden_size, config.intermediate_size);
    let ([gate_up, down], ff) = if let Some(all) = config.experts(layer) {
        (experts(config, layer, all), all.intermediate_size)
    } else {
        let down = vec![Part::new(layer, "mlp.down_proj.weight", hidden)];
        ([gate_up(config, layer, "weight"), down], ff)
    };
    [(gate_up, hidden), (down, ff)]
}

/// Gate and up of what all tokens share beside their experts, and down.
fn shared(config: &Config, layer: usize) -> Option<[Parts; 2]> {
    let (hidden, ff) = (config.hidden_size, config.experts(layer)?.shared_size?);
    let part = |module: &str, rows| Part::new(layer, &format!("{SHARED}.{module}.weight"), rows);
    let gate_up = vec![part("gate_proj", ff), part("up_proj", ff)];
    Some([(gate_up, hidden), (vec![part("down_proj", hidden)], ff)])
}

/// The projection after attention.
fn out(config: &Config, layer: usize) -> Parts {
    let part = Part::new(layer, "self_attn.o_proj.weight", config.hidden_size);
    (vec![part], config.attention_size())
}

/// The matrix that chooses experts.
fn router(config: &Config, layer: usize) -> Option<Parts> {
    // Not padded: what is not an expert must not compete.
    let count = config.experts(layer)?.count;
    let part = Part {
        padded: count,
        ..Part::new(layer, ROUTER, count)
    };
    Some((vec![part], config.hidden_size))
}

/// All matrices of a layer.
pub(super) fn matrices(config: &Config, layer: usize) -> Vec<Parts> {
    let mut all = match &config.latent {
        Some(latent) => latent::matrices(config, latent, layer),
        None => vec![(qkv(config, layer, "weight"), config.hidden_size)],
    };
    all.push(out(config, layer));
    all.extend(feed_forward(config, layer));
    all.extend(shared(config, layer).into_iter().flatten());
    all.extend(router(config, layer));
    all
}

/// A tensor in the file with the parts that it holds, and the row at which each begins.
struct Stored {
    name: String,
    parts: Vec<(usize, Part)>,
}

/// A packed matrix, and the order of its channels if that is not their own.
type Ordered = (Packed, Option<Vec<u32>>);

pub(super) struct Loader<'a> {
    pub(super) device: &'a Device,
    pub(super) files: &'a ModelFiles,
    pub(super) progress: &'a mut dyn FnMut(u64),
    /// One word, which stands in for the scales of float matrices.
    pub(super) no_scales: Tensor,
    /// Matrices whose parts are stored in different ways, and were widened therefore.
    widened: Vec<String>,
}

/// Loads the weights of a range of layers, with the embedding before the first layer of the model and the
/// head after the last; `progress` is told the bytes read by each step.
pub(super) fn load(
    device: &Device,
    files: &ModelFiles,
    layers: Range<usize>,
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
    let (is_first, is_last) = (layers.start == 0, layers.end == config.n_layers);
    let embed = if is_first {
        loader.pieces(EMBED, config.vocab_size, config.hidden_size)?
    } else {
        Pieces(Vec::new())
    };
    let layers = layers
        .map(|l| loader.layer(config, l))
        .collect::<Result<_>>()?;
    let head = is_last.then(|| loader.head(config, &embed)).transpose()?;
    if let [first, ..] = &loader.widened[..] {
        log::warn!(
            "{first} and {} other fused matrices are widened to f32: their parts are stored in different ways",
            loader.widened.len() - 1
        );
    }
    let qk_norm = files.tensors.has(Group::QkNorm);
    Ok(Weights {
        embed,
        layers,
        head,
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
    pub(super) fn dtype(&self, name: &str) -> Result<DType> {
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

    /// Where the file has parts that become one.
    fn stored(&self, parts: Vec<Part>) -> Vec<Stored> {
        let mut all: Vec<Stored> = Vec::new();
        for part in parts {
            let (name, first) = self.files.tensors.place(&part.name);
            match all.last_mut().filter(|last| last.name == name) {
                Some(last) => last.parts.push((first, part)),
                None => all.push(Stored {
                    name: name.to_owned(),
                    parts: vec![(first, part)],
                }),
            }
        }
        all
    }

    /// A matrix of several parts below each other; `[sum of padded rows, padded cols]`. With it, the order
    /// of its channels if that is not their own.
    pub(super) fn matrix(&mut self, (parts, cols): Parts) -> Result<(Matrix, Option<Vec<u32>>)> {
        let stored = self.stored(parts);
        let mut packed = Vec::with_capacity(stored.len());
        for tensor in &stored {
            let matrix = self.files.tensors.packed(&tensor.name).cloned();
            let order = matrix
                .as_ref()
                .map(|matrix| self.order(matrix))
                .transpose()?;
            packed.push(matrix.zip(order));
        }
        let whole: Option<Vec<_>> = packed.iter().cloned().collect();
        match whole {
            // All of a checkpoint is packed in one way, so that only the orders may differ.
            Some(all) if all.iter().all(|(_, order)| *order == all[0].1) => {
                self.codes(&stored, &all)
            }
            _ => Ok((self.floats(&stored, &packed, cols)?, None)),
        }
    }

    /// The order of the channels of a packed matrix.
    pub(super) fn order(&mut self, packed: &Packed) -> Result<Option<Vec<u32>>> {
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
    fn codes(&mut self, stored: &[Stored], all: &[Ordered]) -> Result<(Matrix, Option<Vec<u32>>)> {
        let (first, order) = &all[0];
        let rows = rows_of(stored);
        let weight = self
            .device
            .tensor(&[rows, first.wide()], first.scheme.dtype)?;
        let scales = self.device.tensor(&[rows, first.groups()], DType::U32)?;
        let mut row = 0;
        for (tensor, (packed, order)) in stored.iter().zip(all) {
            let unpacked = self.unpacked(packed, order.as_deref())?;
            for (at, part) in &tensor.parts {
                let [codes, words] = Self::codes_of(packed, &unpacked, *at, part);
                let to_bytes: fn(&[u32]) -> &[u8] = bytemuck::cast_slice;
                self.device
                    .write(&weight, row * first.row_words() * 4, to_bytes(&codes))?;
                self.device
                    .write(&scales, row * first.groups() * 4, to_bytes(&words))?;
                row += part.padded;
            }
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
    pub(super) fn unpacked(
        &mut self,
        packed: &Packed,
        order: Option<&[u32]>,
    ) -> Result<[Vec<u32>; 2]> {
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
                        let words = words_of_rows(&bytes, n);
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
        Ok([codes, words])
    }

    /// Codes and scales of a part, in the order of its rows on the device.
    fn codes_of<'a>(
        packed: &Packed,
        [codes, scales]: &'a [Vec<u32>; 2],
        first: usize,
        part: &Part,
    ) -> [Cow<'a, [u32]>; 2] {
        [(codes, packed.row_words()), (scales, packed.groups())].map(|(all, wide)| {
            let rows = &all[first * wide..][..part.rows * wide];
            turned(rows, wide, part.order.as_deref())
        })
    }

    /// A matrix in float. Parts in different types, and packed parts, are widened to f32.
    fn floats(
        &mut self,
        stored: &[Stored],
        packed: &[Option<Ordered>],
        cols: usize,
    ) -> Result<Matrix> {
        let dtypes: Vec<Option<DType>> = stored
            .iter()
            .zip(packed)
            .map(|(tensor, packed)| match packed {
                None => self.dtype(&tensor.name).map(Some),
                Some(_) => Ok(None),
            })
            .collect::<Result<_>>()?;
        // Widening is exact; narrowing would not be.
        let alike = dtypes[0].filter(|_| dtypes.iter().all(|&d| d == dtypes[0]));
        if packed.iter().any(Option::is_some) {
            self.widened.push(stored[0].name.clone());
        }
        let dtype = alike.unwrap_or(DType::F32);
        let (rows, wide) = (rows_of(stored), padded(cols));
        let weight = self.device.tensor(&[rows, wide], dtype)?;
        let mut row = 0;
        for (tensor, packed) in stored.iter().zip(packed) {
            let unpacked = packed
                .as_ref()
                .map(|(packed, order)| self.unpacked(packed, order.as_deref()))
                .transpose()?;
            for (first, part) in &tensor.parts {
                let at = row * wide * dtype.size();
                if let (Some((packed, order)), Some(unpacked)) = (packed, &unpacked) {
                    let codes = Self::codes_of(packed, unpacked, *first, part);
                    self.wide_rows(&weight, at, packed, order.as_deref(), &codes)?;
                } else {
                    let rows = (*first, part.rows, part.order.as_deref());
                    self.rows(&weight, at, &tensor.name, rows, cols)?;
                }
                row += part.padded;
            }
        }
        Ok(Matrix {
            weight,
            scales: self.no_scales.clone(),
            group: 1,
            order: None,
        })
    }

    /// Copies rows of a packed matrix to a byte offset of one in f32.
    fn wide_rows(
        &self,
        to: &Tensor,
        mut at: usize,
        packed: &Packed,
        order: Option<&[u32]>,
        [codes, scales]: &[Cow<'_, [u32]>; 2],
    ) -> Result<()> {
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

    /// Copies rows of a file's tensor to a byte offset of a wider or equal tensor: the first of them, how
    /// many, and in which order.
    fn rows(
        &mut self,
        to: &Tensor,
        mut at: usize,
        name: &str,
        (first, n, order): (usize, usize, Option<&Order>),
        cols: usize,
    ) -> Result<()> {
        let (from, wide) = (self.dtype(name)?, padded(cols));
        // Whole heads where there are any.
        let unit = order.map_or(1, |order| order.unit);
        let step = (PIECE / (wide * 4)).next_multiple_of(unit).max(unit);
        let mut bytes = Vec::new();
        let mut row = first;
        while row < first + n {
            let count = step.min(first + n - row);
            let checkpoint = &self.files.checkpoint;
            checkpoint.read_rows(name, row, count, &mut bytes)?;
            (self.progress)(bytes.len() as u64);
            let bytes = turned(&bytes, cols * from.size(), order);
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
            self.rows(&tensor, 0, name, (first, n, None), cols)?;
            pieces.push((first, tensor));
        }
        Ok(Pieces(pieces))
    }

    /// The norm and the matrix of logits: the embedding's where they are tied.
    fn head(&mut self, config: &Config, embed: &Pieces) -> Result<Head> {
        let norm = self.norm(NORM, config.hidden_size, None)?;
        let pieces = if self.files.tensors.has(Group::Head) {
            self.pieces(HEAD, config.vocab_size, config.hidden_size)?
        } else if embed.0.is_empty() {
            // The embedding is on another device.
            self.pieces(EMBED, config.vocab_size, config.hidden_size)?
        } else {
            embed.clone()
        };
        let bias = self.device.tensor(&[config.vocab_size], DType::F32)?;
        Ok(Head { norm, pieces, bias })
    }

    /// Elements of a vector: the first of them, and how many.
    fn numbers(&mut self, name: &str, first: usize, len: usize) -> Result<Vec<f32>> {
        let mut bytes = Vec::new();
        let from = self.dtype(name)?;
        let checkpoint = &self.files.checkpoint;
        checkpoint.read_rows(name, first, len, &mut bytes)?;
        (self.progress)(bytes.len() as u64);
        let numbers = bytes.chunks_exact(from.size());
        Ok(numbers.map(|number| widened(number, from)).collect())
    }

    /// The weights of a norm, in the order of the channels that the matrix after it has.
    pub(super) fn norm(&mut self, name: &str, len: usize, order: Option<&[u32]>) -> Result<Tensor> {
        let mut weights = self.numbers(name, 0, len)?;
        if let Some(order) = order {
            weights = order
                .iter()
                .map(|&channel| weights[channel as usize])
                .collect();
        }
        weights.resize(padded(len), 0.0);
        self.device.upload(&[weights.len()], DType::F32, &weights)
    }

    /// Vectors after each other in f32, or zeros where the model has no such tensors.
    pub(super) fn vector(&mut self, group: Group, parts: Vec<Part>) -> Result<Tensor> {
        if !self.files.tensors.has(group) {
            let len = parts.iter().map(|part| part.padded).sum();
            return self.device.tensor(&[len], DType::F32);
        }
        let mut all: Vec<f32> = Vec::new();
        for Stored { name, parts } in self.stored(parts) {
            for (first, part) in parts {
                let numbers = self.numbers(&name, first, part.rows)?;
                let end = all.len() + part.padded;
                all.extend_from_slice(&turned(&numbers, 1, part.order.as_deref()));
                all.resize(end, 0.0);
            }
        }
        self.device.upload(&[all.len()], DType::F32, &all)
    }

    fn layer(&mut self, config: &Config, layer: usize) -> Result<Layer> {
        let hidden = config.hidden_size;
        let name = |tensor: &str| layer_name(layer, tensor);
        let bias = |tensor: &str| vec![Part::new(layer, tensor, hidden)];
        let (attention, order) = match &config.latent {
            Some(latent) => {
                let weights = self.latent(config, latent, layer)?;
                (Attention::Latent(Box::new(weights)), None)
            }
            None => self.heads(config, layer)?,
        };
        let before = name("input_layernorm.weight");
        let attention_norm = self.norm(&before, hidden, order.as_deref())?;
        let (out, _) = self.matrix(out(config, layer))?;
        let [of_gate_up, down] = feed_forward(config, layer);
        let (gate_up_matrix, order) = self.matrix(of_gate_up)?;
        let before = name("post_attention_layernorm.weight");
        let feed_forward_norm = self.norm(&before, hidden, order.as_deref())?;
        let (down, _) = self.matrix(down)?;
        let router = match router(config, layer) {
            None => None,
            Some(_) if gate_up_matrix.order.is_some() || down.order.is_some() => {
                return Err(self.reordered(&format!("experts of layer {layer}")));
            }
            Some(parts) => Some(self.router(config, layer, parts)?),
        };
        Ok(Layer {
            attention_norm,
            attention,
            out,
            out_bias: self.vector(Group::OutBias, bias("self_attn.o_proj.bias"))?,
            feed_forward_norm,
            router,
            gate_up: gate_up_matrix,
            gate_up_bias: self.vector(Group::MlpBias, gate_up(config, layer, "bias"))?,
            down,
            down_bias: self.vector(Group::MlpBias, bias("mlp.down_proj.bias"))?,
            shared: shared(config, layer)
                .map(|parts| self.shared(layer, parts))
                .transpose()?,
        })
    }

    /// Queries, keys and values of heads, and the order of their input channels if that is not their own.
    fn heads(&mut self, config: &Config, layer: usize) -> Result<(Attention, Option<Vec<u32>>)> {
        let (matrix, order) = self.matrix((qkv(config, layer, "weight"), config.hidden_size))?;
        let norm = |tensor: &str| vec![Part::rotated(config, layer, tensor, config.head_dim)];
        let heads = Attention::Heads {
            qkv: matrix,
            qkv_bias: self.vector(Group::QkvBias, qkv(config, layer, "bias"))?,
            q_norm: self.vector(Group::QkNorm, norm("self_attn.q_norm.weight"))?,
            k_norm: self.vector(Group::QkNorm, norm("self_attn.k_norm.weight"))?,
        };
        Ok((heads, order))
    }

    fn router(&mut self, config: &Config, layer: usize, parts: Parts) -> Result<Router> {
        let count = parts.0[0].rows;
        let (matrix, order) = self.matrix(parts)?;
        if order.is_some() {
            return Err(self.reordered(&format!("{ROUTER} of layer {layer}")));
        }
        let bias = self.device.tensor(&[count], DType::F32)?;
        let choice = if config.experts(layer).is_some_and(|e| e.routing.sigmoid) {
            let numbers = self.numbers(&layer_name(layer, CHOICE_BIAS), 0, count)?;
            self.device.upload(&[count], DType::F32, &numbers)?
        } else {
            bias.clone()
        };
        Ok(Router {
            matrix,
            bias,
            choice,
        })
    }

    fn shared(&mut self, layer: usize, [gate_up, down]: [Parts; 2]) -> Result<Shared> {
        let (gate_up, order) = self.matrix(gate_up)?;
        let (down, other) = self.matrix(down)?;
        if order.is_some() || other.is_some() {
            return Err(self.reordered(&format!("{SHARED} of layer {layer}")));
        }
        let rows = gate_up.weight.shape()[0].max(down.weight.shape()[0]);
        Ok(Shared {
            gate_up,
            down,
            no_bias: self.device.tensor(&[rows], DType::F32)?,
        })
    }

    /// The refusal of matrices whose channels are stored in an order of their own, where that is not
    /// computed.
    pub(super) fn reordered(&self, what: &str) -> Error {
        Error::unsupported(
            self.files.checkpoint.main_path(),
            format!("{what} with reordered channels (desc_act)"),
            "use a checkpoint quantised without desc_act",
        )
    }
}

/// Whole heads of rows of `wide` elements each, in the order of their rows on the device.
fn turned<'a, T: Copy + Default>(
    rows: &'a [T],
    wide: usize,
    order: Option<&Order>,
) -> Cow<'a, [T]> {
    let Some(order) = order else {
        return Cow::Borrowed(rows);
    };
    let mut out = Vec::with_capacity(rows.len() / order.unit * order.rows.len());
    for head in rows.chunks_exact(order.unit * wide) {
        for row in &order.rows {
            match row {
                Some(row) => out.extend_from_slice(&head[row * wide..][..wide]),
                None => out.resize(out.len() + wide, T::default()),
            }
        }
    }
    Cow::Owned(out)
}

/// Rows of a fused matrix.
fn rows_of(stored: &[Stored]) -> usize {
    let parts = stored.iter().flat_map(|tensor| &tensor.parts);
    parts.map(|(_, part)| part.padded).sum()
}

/// The words of little-endian bytes.
fn words_of(bytes: &[u8]) -> Cow<'_, [u32]> {
    bytemuck::try_cast_slice(bytes).map_or_else(
        |_| Cow::Owned(bytemuck::pod_collect_to_vec(bytes)),
        Cow::Borrowed,
    )
}

/// As [`words_of`], of `n` rows, each of which begins with a word.
fn words_of_rows(bytes: &[u8], n: usize) -> Cow<'_, [u32]> {
    let row = bytes.len() / n;
    if row.is_multiple_of(4) {
        return words_of(bytes);
    }
    let mut padded = vec![0u8; n * row.next_multiple_of(4)];
    let rows = padded.chunks_exact_mut(row.next_multiple_of(4));
    rows.zip(bytes.chunks_exact(row))
        .for_each(|(to, from)| to[..row].copy_from_slice(from));
    Cow::Owned(bytemuck::pod_collect_to_vec(&padded))
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
