//! The shared cache: blocks over pages, in one arena for each layer.
//!
//! `pages` says where a token lives, `layout` who sees it, `plan` what a pass reads; this file holds the
//! device memory. A key is stored once, rotated to its index in its block, and serves at every position
//! because the query is rotated instead (paper 3.4). Invariant: slots are written once, never moved.

pub mod layout;
pub mod pages;
pub mod plan;

use crate::device::{DType, Device, Tensor};
use crate::{Error, Result};
use pages::{PAGE, Pages};

/// Blocks, and the keys and values of every layer.
#[derive(Debug)]
pub struct KvCache {
    /// Which pages each block has.
    pub pages: Pages,
    dtype: DType,
    layers: Vec<[Tensor; 2]>,
}

/// Shape of a cache.
#[derive(Clone, Copy, Debug)]
pub struct CacheShape {
    /// Layers of the model.
    pub n_layers: usize,
    /// KV heads of a layer.
    pub n_kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Storage type: f16, bf16 or f32.
    pub dtype: DType,
    /// Whether all layers use the memory of one, as no model does: for benches of large shapes.
    pub shared: bool,
}

impl CacheShape {
    /// Bytes of keys and values of one token in all layers.
    pub fn bytes_per_token(&self) -> usize {
        self.n_layers * 2 * self.n_kv_heads * self.head_dim * self.dtype.size()
    }
}

impl KvCache {
    /// Reserves `n_pages` pages on a device.
    ///
    /// # Errors
    /// [`Error::Limit`] or [`Error::Device`] if the device cannot hold it.
    pub fn new(device: &Device, shape: CacheShape, n_pages: usize) -> Result<Self> {
        Self::over(|_| device, shape, n_pages)
    }

    /// Reserves `n_pages` pages; those of a layer are where the layer is.
    ///
    /// # Errors
    /// [`Error::Limit`] or [`Error::Device`] if a device cannot hold them.
    pub fn over<'a>(
        device_of: impl Fn(usize) -> &'a Device,
        shape: CacheShape,
        n_pages: usize,
    ) -> Result<Self> {
        let n_slots = n_pages
            .checked_mul(PAGE)
            .filter(|&n| n < 1 << 31)
            .ok_or_else(|| {
                Error::Usage(format!(
                    "a context of {n_pages} pages has more slots than there are numbers"
                ))
            })?;
        let dims = [n_slots, shape.n_kv_heads, shape.head_dim];
        let mut layers: Vec<[Tensor; 2]> = Vec::new();
        for layer in 0..shape.n_layers {
            let device = device_of(layer);
            layers.push(match layers.first() {
                Some(first) if shape.shared => first.clone(),
                _ => [
                    device.tensor(&dims, shape.dtype)?,
                    device.tensor(&dims, shape.dtype)?,
                ],
            });
        }
        Ok(Self {
            pages: Pages::new(n_pages),
            dtype: shape.dtype,
            layers,
        })
    }

    /// Keys and values of a layer, `[n_slots, n_kv_heads, head_dim]`.
    pub fn layer(&self, layer: usize) -> [&Tensor; 2] {
        let [keys, values] = &self.layers[layer];
        [keys, values]
    }

    /// Storage type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
}
