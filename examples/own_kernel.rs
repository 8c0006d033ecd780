//! A kernel of one's own: written here, judged by the op's reference, and caught when it is wrong.
//!
//! ```text
//! cargo run --example own_kernel                # the first GPU
//! cargo run --example own_kernel -- llvmpipe    # the software driver
//! ```
//!
//! The same without Rust, on a file: `hogwild kernels check rms_norm --wgsl mine.wgsl`.

use std::io::Write;

use hogwild::device::judge::{Verdict, judge};
use hogwild::device::{Choice, Device, Kernel, Run, Wgsl, choose};
use hogwild::ops::rms_norm;
use hogwild::{Error, Result};

/// The op's own shader adds its lanes up in workgroup memory, with a barrier. This one gives a row to
/// a single subgroup: no workgroup memory, no barrier, and the sum is one instruction.
///
/// Binding 0 holds the op's params, the others its arguments, by their names and in their order:
/// `hogwild kernels list` shows them.
const BY_SUBGROUP: &str = "
struct Params {
    n_rows: u32,
    dim: u32,
    count: u32,
    eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;               // [n_rows, dim]
@group(0) @binding(2) var<storage, read> weight: array<f32>;          // [dim]
@group(0) @binding(3) var<storage, read_write> y: array<f32>;         // [n_rows, dim]

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) num_subgroups: u32,
    @builtin(subgroup_size) lanes: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    // A row behind the end reads row 0 and stores nothing: all lanes stay together.
    for (var i = subgroup; i < ROWS_PER_GROUP; i += num_subgroups) {
        let n = group.x * ROWS_PER_GROUP + i;
        let row = select(0u, n, n < params.n_rows) * params.dim;
        var sum = 0.0;
        for (var at = lane; at < params.dim; at += lanes) {
            sum = fma(x[row + at], x[row + at], sum);
        }
        let scale = inverseSqrt(subgroupAdd(sum) / f32(params.count) + params.eps);
        for (var at = lane; at < params.dim && n < params.n_rows; at += lanes) {
            y[row + at] = x[row + at] * scale * weight[at];
        }
    }
}
";

const ROWS_PER_GROUP: u32 = 4;

/// The variant as a kernel: its text, the constants before it, and how many workgroups it takes.
fn kernel(name: &'static str, source: &'static str) -> Kernel {
    Kernel {
        name,
        run: Run::Wgsl(Wgsl {
            file: "examples/own_kernel.rs",
            source,
            consts: |_, _| vec![("ROWS_PER_GROUP", ROWS_PER_GROUP)],
            elements: &[],
            // The first parameter is n_rows.
            groups: |d, _| [d.params.get::<[u32; 4]>()[0].div_ceil(ROWS_PER_GROUP), 1, 1],
            loads: None,
        }),
        // A kernel says on which devices and shapes it can run; the judge calls the rest unsupported.
        fits: |_, caps| caps.subgroup.0 >= 4,
    }
}

/// Judges a kernel on every case of the op and says what was found.
fn report(out: &mut impl Write, device: &Device, kernel: &Kernel) -> Result<()> {
    let mut lines = vec![format!("{} on {}", kernel.name, device.name())];
    for case in (rms_norm::OP.cases)() {
        let line = match judge(device, &rms_norm::OP, kernel, &case)? {
            Verdict::Pass(a) => format!("pass: worst {:.1e}, NMSE {:.1e}", a.worst, a.nmse),
            Verdict::Fail(problem) => format!("FAIL: {problem}"),
            Verdict::Unsupported => "unsupported".into(),
        };
        lines.push(format!("  {}: {line}", case.name));
    }
    writeln!(out, "{}", lines.join("\n")).map_err(Error::io("standard output"))
}

fn main() -> Result<()> {
    let mut out = std::io::stdout().lock();
    let wanted = std::env::args().nth(1).unwrap_or_else(|| "auto".into());
    if let Choice::Cpu { why } = choose(&wanted)? {
        let advice = "name an adapter, for example the software driver: -- llvmpipe";
        return writeln!(out, "A shader needs a Vulkan adapter, and {why}; {advice}")
            .map_err(Error::io("standard output"));
    }
    let device = Device::open(&wanted)?;
    report(&mut out, &device, &kernel("by subgroup", BY_SUBGROUP))?;

    // The mean over the padding, too: one case exists so that this cannot pass.
    let broken = BY_SUBGROUP.replace("f32(params.count)", "f32(params.dim)");
    let broken = kernel("by subgroup, broken", broken.leak());
    report(&mut out, &device, &broken)
}
