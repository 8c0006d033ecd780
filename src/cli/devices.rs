//! `hogwild devices`: what there is, what it can do, and what `--device auto` would use.
//!
//! `--json` prints one object; fields are only ever added:
//!
//! ```text
//! version   1
//! adapters  [{ name, kind, driver, pci, heaps: [{ bytes, device_local }], subgroup: [least, most],
//!              limits: { name: number }, features: { name: bool }, refused: null or why }]
//! cpu       { threads, instructions }
//! auto      { device: an adapter's name or "cpu", why }
//! ```

use std::fmt::Write as _;
use std::process::ExitCode;

use serde_json::{Map, Value, json};

use super::output::neutralise;
use crate::Result;
use crate::device::{AdapterReport, Choice, Cpu, CpuReport, adapters, choose};

/// Arguments of `hogwild devices`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let (adapters, cpu, auto) = (adapters(), Cpu::report(), choose("auto")?);
    if args.json {
        super::print_json(&to_json(&adapters, cpu, &auto))?;
    } else {
        super::print(&to_text(&adapters, cpu, &auto))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn to_json(adapters: &[AdapterReport], cpu: CpuReport, auto: &Choice) -> Value {
    let adapter = |a: &AdapterReport| {
        let heap = |&(bytes, local): &(u64, bool)| json!({ "bytes": bytes, "device_local": local });
        let limits: Map<_, _> = a
            .limits
            .iter()
            .map(|&(k, v)| (k.into(), v.into()))
            .collect();
        let features: Map<_, _> = a
            .features
            .iter()
            .map(|&(k, v)| (k.into(), v.into()))
            .collect();
        json!({
            "name": a.name,
            "kind": a.kind,
            "driver": a.driver,
            "pci": a.pci,
            "heaps": a.heaps.iter().map(heap).collect::<Vec<_>>(),
            "subgroup": [a.subgroup.0, a.subgroup.1],
            "limits": limits,
            "features": features,
            "refused": a.refused,
        })
    };
    json!({
        "version": 1,
        "adapters": adapters.iter().map(adapter).collect::<Vec<_>>(),
        "cpu": cpu,
        "auto": { "device": auto.name(), "why": auto.why() },
    })
}

fn to_text(adapters: &[AdapterReport], cpu: CpuReport, auto: &Choice) -> String {
    let mut out = String::new();
    for a in adapters {
        head(&mut out, &a.name);
        line(&mut out, "kind", &format!("{}, PCI {}", a.kind, a.pci));
        line(&mut out, "driver", &a.driver);
        line(&mut out, "memory", &memory(&a.heaps));
        line(&mut out, "subgroup", &range(a.subgroup));
        for (i, &(name, value)) in a.limits.iter().enumerate() {
            let label = if i == 0 { "limits" } else { "" };
            line(
                &mut out,
                label,
                &format!("{name:<38} {}", limit(name, value)),
            );
        }
        let (has, lacks) = features(&a.features);
        line(&mut out, "has", &has);
        line(&mut out, "lacks", &lacks);
        if let Some(why) = &a.refused {
            line(&mut out, "refused", why);
        }
        out.push('\n');
    }
    head(&mut out, "cpu");
    line(&mut out, "threads", &cpu.threads.to_string());
    line(&mut out, "using", cpu.instructions);
    let (name, why) = (auto.name(), auto.why());
    let _ = writeln!(
        out,
        "\n--device auto uses {}: {}",
        neutralise(&name),
        neutralise(&why)
    );
    out
}

fn head(out: &mut String, name: &str) {
    let _ = writeln!(out, "{}", neutralise(name));
}

fn line(out: &mut String, label: &str, text: &str) {
    if !text.is_empty() {
        let _ = writeln!(out, "  {label:<9} {}", neutralise(text));
    }
}

fn memory(heaps: &[(u64, bool)]) -> String {
    let heap = |&(bytes, local): &(u64, bool)| {
        let place = if local {
            "on the device"
        } else {
            "of the host"
        };
        format!("{} {place}", size(bytes))
    };
    heaps.iter().map(heap).collect::<Vec<_>>().join(", ")
}

fn range((least, most): (u32, u32)) -> String {
    if least == most {
        format!("{least} lanes")
    } else {
        format!("{least} to {most} lanes")
    }
}

/// A limit with its unit: sizes in bytes, the others are counts.
fn limit(name: &str, value: u64) -> String {
    if name.ends_with("_size") {
        size(value)
    } else {
        value.to_string()
    }
}

fn size(bytes: u64) -> String {
    let (unit, name) = match bytes {
        0..0x10_0000 => (1u64 << 10, "KiB"),
        0x10_0000..0x4000_0000 => (1 << 20, "MiB"),
        _ => (1 << 30, "GiB"),
    };
    if bytes.is_multiple_of(unit) {
        format!("{} {name}", bytes / unit)
    } else {
        format!("{:.2} {name}", bytes as f64 / unit as f64)
    }
}

fn features(features: &[(&'static str, bool)]) -> (String, String) {
    let names = |want: bool| {
        let names = features.iter().filter(|f| f.1 == want).map(|f| f.0);
        names.collect::<Vec<_>>().join(", ")
    };
    (names(true), names(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_the_unit_that_reads_best() {
        assert_eq!(size(32 << 10), "32 KiB");
        assert_eq!(size(128 << 20), "128 MiB");
        assert_eq!(size((1 << 31) - 1), "2.00 GiB");
        assert_eq!(size(150_000_000_000), "139.70 GiB");
    }

    #[test]
    fn a_name_cannot_move_the_cursor() {
        let adapter = AdapterReport {
            name: "GPU\u{1b}[2J".into(),
            kind: "discrete",
            driver: "any".into(),
            pci: "10de:2335".into(),
            heaps: vec![(1 << 30, true), (3 << 29, false)],
            subgroup: (32, 32),
            limits: vec![("max_buffer_size", 1 << 31)],
            features: vec![("subgroup", true), ("shader_f16", false)],
            refused: None,
        };
        let cpu = CpuReport {
            threads: 2,
            instructions: "any",
        };
        let auto = Choice::Cpu { why: "why".into() };
        let text = to_text(&[adapter], cpu, &auto);
        assert!(text.starts_with("GPU␛[2J\n"), "{text}");
        assert!(
            text.contains("1 GiB on the device, 1.50 GiB of the host\n"),
            "{text}"
        );
        assert!(text.ends_with("--device auto uses cpu: why\n"), "{text}");
    }
}
