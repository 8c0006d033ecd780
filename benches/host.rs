//! What a pass of QwQ-32B costs the host, without a GPU: `cargo bench --bench host`. The goal is 0.8 ms.

#![allow(clippy::print_stdout, reason = "its output is its purpose")]

#[path = "../tests/common/host.rs"]
mod host;

fn main() {
    println!("{}", host::measure());
}
