//! What the test binaries share: an independent opinion, the files it is held to, and models to disagree about.
//!
//! Nothing here names the engine, so that nothing here can share its mistakes.

#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(unreachable_pub, reason = "a test binary has no outside")]
#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "in a test, a file that cannot be read is a failure"
)]

pub mod golden;
pub mod packed;
pub mod textbook;
pub mod tiny;
