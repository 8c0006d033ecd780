//! The devices that tests run on: the CPU path, and one Vulkan adapter.
//!
//! `HOGWILD_DEVICE` names the adapter; without it a real GPU is taken, else the software driver
//! `llvmpipe`. Where there is none, the test says so and goes on without, unless
//! `HOGWILD_REQUIRE_GPU=1` asks for one.

#![allow(
    clippy::print_stdout,
    reason = "what a test says of its device is for people"
)]
#![allow(unreachable_pub, reason = "a test binary has no outside")]
#![allow(dead_code, reason = "each test binary uses a part of it")]

use hogwild::device::{Choice, Device, choose};

/// The Vulkan adapter under test, or `None` with a message.
pub(crate) fn adapter() -> Option<Device> {
    let named = std::env::var("HOGWILD_DEVICE").ok();
    let wanted = named.unwrap_or_else(|| match choose("auto") {
        Ok(Choice::Adapter(_)) => "auto".to_owned(),
        _ => "llvmpipe".to_owned(),
    });
    match Device::open(&wanted) {
        Ok(device) => {
            let (least, most) = device.caps().subgroup;
            println!("adapter: {}, subgroup {least} to {most}", device.name());
            Some(device)
        }
        Err(error) => {
            let required = std::env::var("HOGWILD_REQUIRE_GPU").is_ok_and(|v| v == "1");
            assert!(!required, "HOGWILD_REQUIRE_GPU=1, but: {error}");
            println!("skipped on the adapter: {error}");
            None
        }
    }
}

/// The CPU path and, where there is one, the adapter.
pub(crate) fn devices() -> Vec<Device> {
    [Some(Device::cpu()), adapter()]
        .into_iter()
        .flatten()
        .collect()
}
