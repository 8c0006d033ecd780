//! The bytes that a pass must move, whatever its kernels do: the roof that a bench measures against.

use super::Model;
use super::load::{Layer, Matrix, Pieces, Weights};
use crate::cache::CacheShape;
use crate::device::Tensor;

impl Model {
    /// Bytes of weights that a pass of some rows needs, each once: all layers, of experts as many as the rows
    /// choose if all choose others, the head, the rows' embeddings.
    pub fn weight_bytes(&self, n_rows: usize) -> u64 {
        let experts = self.config().experts.as_ref();
        let share = experts.map_or(1.0, |e| {
            ((n_rows * e.routing.top_k) as f64 / e.count as f64).min(1.0)
        });
        let of = |weights: &Weights| {
            let layers: usize = weights.layers.iter().map(|l| layer(l, share)).sum();
            let embedding = weights
                .embed
                .0
                .first()
                .map_or(0, |(_, piece)| piece.bytes() / piece.shape()[0]);
            let head = weights.head.as_ref();
            let head = head.map_or(0, |head| head.norm.bytes() + pieces(&head.pieces));
            layers + head + n_rows * embedding
        };
        let stages = self.stages().iter();
        stages.map(|stage| of(stage.weights())).sum::<usize>() as u64
    }

    /// Bytes of keys and values that a pass needs, each once, of `keys` tokens that its rows see.
    pub fn cache_bytes(&self, shape: CacheShape, keys: usize) -> u64 {
        (shape.bytes_per_token() * keys) as u64
    }

    /// Multiplications and additions of `rows` rows in the matrices of all layers.
    pub fn flops(&self, rows: usize) -> f64 {
        let elements = |layer: &Layer| -> usize { matrices(layer).map(|m| m.weight.len()).sum() };
        let layers = self.stages().iter().flat_map(|s| &s.weights().layers);
        let elements: usize = layers.map(elements).sum();
        2.0 * elements as f64 * rows as f64
    }
}

fn pieces(pieces: &Pieces) -> usize {
    pieces.0.iter().map(|(_, piece)| piece.bytes()).sum()
}

fn matrices(layer: &Layer) -> impl Iterator<Item = &Matrix> {
    [&layer.qkv, &layer.out, &layer.gate_up, &layer.down].into_iter()
}

fn layer(layer: &Layer, share: f64) -> usize {
    let vectors = [
        &layer.attention_norm,
        &layer.feed_forward_norm,
        &layer.qkv_bias,
        &layer.q_norm,
        &layer.k_norm,
    ];
    let bytes = |m: &Matrix| m.weight.bytes() + m.scales.bytes();
    let small: usize = vectors.into_iter().map(Tensor::bytes).sum();
    let attention = bytes(&layer.qkv) + bytes(&layer.out);
    let feed_forward = bytes(&layer.gate_up) + bytes(&layer.down);
    let Some((router, _)) = &layer.router else {
        return small + attention + feed_forward;
    };
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of a count of bytes"
    )]
    let chosen = (feed_forward as f64 * share) as usize;
    small + attention + bytes(router) + chosen
}
