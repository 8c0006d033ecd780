//! What a pass costs the host, held to a bound. `cargo bench --bench host` prints it for an optimised build.

#![allow(
    clippy::print_stdout,
    reason = "what a test measures is for people, too"
)]

#[path = "common/host.rs"]
mod host;

#[test]
fn a_pass_costs_the_host_at_most_four_times_its_bare_dispatches() {
    let host = host::measure();
    println!("{host}");
    assert!(host.all <= 4.0 * host.bare, "{host}");
}
