//! A portable engine for Hogwild! Inference (Rodionov et al., 2025).
//!
//! Several *workers* of one language model write at the same time over one shared key-value cache. Each
//! sees the others' tokens the moment they appear, and each sees the cache's blocks in its own order,
//! because a key is stored once, rotated to its index in its block, and every query is rotated to where
//! its worker sees the block. The layers run as WGSL compute shaders on any Vulkan adapter, or as Rust
//! kernels on the CPU; both are held to the same references.
//!
//! ```no_run
//! use std::{path::Path, sync::Arc};
//! use hogwild::cache::plan::Logits;
//! use hogwild::device::{DType, Device};
//! use hogwild::model::{Engine, Model, ModelFiles};
//! use hogwild::text::Text;
//!
//! # fn main() -> hogwild::Result<()> {
//! let directory = Path::new("Qwen3-0.6B");
//! let (files, text) = (ModelFiles::open(directory)?, Text::load(directory)?);
//! let device = Arc::new(Device::open("auto")?);
//! let model = Arc::new(Model::load(device, &files, 4096, &mut |_| {})?);
//! let mut engine = Engine::new(model, DType::F16, 256, false)?;
//! let block = engine.cache.pages.open();
//! let logits = engine.prefill(block, &text.encode("Once upon a time")?, Logits::Last)?;
//! # let _ = logits;
//! # Ok(())
//! # }
//! ```
//!
//! # Flow
//!
//! ```text
//! problem -> Protocol::open    -> tokens of prompt, headers, opening words   (protocol, text)
//!         -> Session::step     -> one batch: a range of tokens per worker     (session)
//!         -> cache::plan       -> slots to write, tiles to read, locations    (numbers only)
//!         -> Model::forward    -> Recording                                   (records, computes nothing)
//!         -> ops::sample       -> the same, and how a token is chosen         (sampler)
//!         -> Device::submit    -> one token per worker                        (WGSL or Rust kernels)
//!         -> Protocol::observe -> speak on, close the step, finish            (pure)
//!         -> Event             -> terminal, log; replay runs it again
//! ```
//!
//! While the device runs a pass, the engine plans and records the next one, guessing that every worker
//! will speak one token more. Only the tokens are missing then; a wrong guess is dropped.
//!
//! # Map
//!
//! * [`device`]: what an op is, recordings as plain data, the two players, the judge. The only place
//!   that names `wgpu`.
//! * [`ops`]: every kind of dispatch: its verb, f64 reference, cases, tolerance, kernels.
//! * [`cache`]: blocks over pages, layouts (who sees what), the plan of a pass.
//! * [`model`]: a model directory, its checks, quantised weights, the forward pass, and
//!   [`model::Engine`], which plays it; [`model::placement`]: which layers are on which device.
//! * [`hub`]: a model's name to a model directory, through the Hugging Face cache.
//! * [`text`], [`sampler`], [`protocol`]: tokenizer and templates, what a choice of a token is (the op
//!   [`ops::sample`] computes it), what may be said.
//! * [`session`]: the loop, its events, logs and replay.
//! * [`cli`]: the command line.
//!
//! # Invariants
//!
//! * A key is written once, to one slot, and never moved: closing a step relabels its block.
//! * Within a pass every worker's new tokens are stored before any of them attends.
//! * A worker's bits depend on what it sees, not on who shares the pass, in which order, or where a
//!   prefill was cut.
//! * The same logits give the same token on every device; only ids come back from it, and hidden rows where
//!   the next layers are on another.
//! * Header and events of a log are the session: the same model runs them again to the same ids.
//! * Any file may be hostile; the worst result is an [`Error`] that names it.

pub mod cache;
pub mod caught;
pub mod cli;
pub mod demo;
pub mod device;
pub mod error;
mod files;
pub mod hub;
pub mod model;
pub mod ops;
pub mod protocol;
pub mod sampler;
pub mod session;
pub mod text;

pub use error::{Error, Result};

/// Id of a token in the tokenizer's vocabulary.
pub type TokenId = u32;
