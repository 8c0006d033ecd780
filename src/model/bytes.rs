//! The bytes that a pass must move, whatever its kernels do: the roof that a bench measures against.

use super::Model;
use super::load::{Layer, Matrix, Pieces};
use crate::cache::CacheShape;
use crate::device::Tensor;

impl Model {
    /// Bytes of weights that a pass of some rows needs, each once: all layers, the head, the rows' embeddings.
    pub fn weight_bytes(&self, n_rows: usize) -> u64 {
        let weights = self.weights();
        let layers: usize = weights.layers.iter().map(layer).sum();
        let embedding = weights
            .embed
            .0
            .first()
            .map_or(0, |(_, piece)| piece.bytes() / piece.shape()[0]);
        let rest = weights.norm.bytes() + pieces(&weights.head) + n_rows * embedding;
        (layers + rest) as u64
    }

    /// Bytes of keys and values that a pass needs, each once, of `keys` tokens that its rows see.
    pub fn cache_bytes(&self, shape: CacheShape, keys: usize) -> u64 {
        (shape.bytes_per_token() * keys) as u64
    }

    /// Multiplications and additions of `rows` rows in the matrices of all layers.
    pub fn flops(&self, rows: usize) -> f64 {
        let weights = self.weights();
        let elements = |layer: &Layer| -> usize { matrices(layer).map(|m| m.weight.len()).sum() };
        let elements: usize = weights.layers.iter().map(elements).sum();
        2.0 * elements as f64 * rows as f64
    }
}

fn pieces(pieces: &Pieces) -> usize {
    pieces.0.iter().map(|(_, piece)| piece.bytes()).sum()
}

fn matrices(layer: &Layer) -> impl Iterator<Item = &Matrix> {
    [&layer.qkv, &layer.out, &layer.gate_up, &layer.down].into_iter()
}

fn layer(layer: &Layer) -> usize {
    let vectors = [
        &layer.attention_norm,
        &layer.feed_forward_norm,
        &layer.qkv_bias,
        &layer.q_norm,
        &layer.k_norm,
    ];
    let matrices = matrices(layer).flat_map(|m| [&m.weight, &m.scales]);
    matrices.chain(vectors).map(Tensor::bytes).sum()
}
