//! A portable engine for Hogwild! Inference.

pub mod cache;
pub mod caught;
pub mod cli;
pub mod device;
pub mod error;
pub mod model;
pub mod ops;
pub mod protocol;
pub mod sampler;
pub mod session;
pub mod text;

pub use error::{Error, Result};

/// Id of a token in the tokenizer's vocabulary.
pub type TokenId = u32;
