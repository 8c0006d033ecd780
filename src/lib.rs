//! A portable engine for Hogwild! Inference.

pub mod error;
pub mod protocol;
pub mod sampler;
pub mod text;

pub use error::{Error, Result};

/// Id of a token in the tokenizer's vocabulary.
pub type TokenId = u32;
