//! The ops: every kind of dispatch that a forward pass is made of, one file each.
//!
//! A file holds the typed verb that records the op, its parameters, the f64 reference that defines
//! it, the cases and the tolerance that kernels are judged by, and the list of kernels. [`OPS`] feeds
//! the forward pass, the tests, the benches and the command line. Invariant: ops know shapes and
//! numbers; no config, cache, worker.

pub mod attend;
pub mod embed;
pub mod expert_down;
pub mod expert_up;
pub mod fill;
pub mod gate_up;
pub mod gather;
pub mod heads;
pub mod latent;
pub mod linear;
pub mod merge;
pub mod place;
pub mod project;
pub mod qkv;
pub mod rms_norm;
pub mod route;
pub mod sample;
pub mod select_rows;

mod case;
mod dot;

use crate::device::Op;

/// Every op, in the order in which a forward pass meets them.
pub static OPS: &[&Op] = &[
    &embed::OP,
    &rms_norm::OP,
    &gather::OP,
    &qkv::OP,
    &project::OP,
    &place::OP,
    &latent::OP,
    &heads::OP,
    &attend::OP,
    &merge::OP,
    &gate_up::OP,
    &route::OP,
    &expert_up::OP,
    &expert_down::OP,
    &select_rows::OP,
    &sample::OP,
    &fill::OP,
];

/// Most rows that a column kernel serves at once; more rows take another group.
pub const MAX_COLS: usize = 16;

/// The op of a name.
pub fn find(name: &str) -> Option<&'static Op> {
    OPS.iter().copied().find(|op| op.name == name)
}

/// A count as `u32`.
///
/// # Panics
/// If it does not fit: no tensor of this crate is that long.
pub fn u32_of(n: usize) -> u32 {
    u32::try_from(n).expect("counts fit 32 bits")
}
