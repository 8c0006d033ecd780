//! Every kernel against its reference, on every case; and canaries that show that the judge can fail.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
#![allow(
    clippy::print_stdout,
    reason = "the numbers of every case are for people"
)]

#[path = "common/adapter.rs"]
mod adapter;

use hogwild::device::judge::{Verdict, judge, trust};
use hogwild::device::{
    Access, Args, Case, CaseArg, DType, Data, Device, Kernel, Op, ParamBytes, Run, Tolerance,
    always,
};
use hogwild::ops::OPS;

/// Judges all kernels of one kind; returns how often, and the cases that none of them serves.
fn judge_all(device: &Device) -> (usize, Vec<String>) {
    let (mut judged, mut unserved, mut failed) = (0, Vec::new(), Vec::new());
    let on_cpu = matches!(device, Device::Cpu(_));
    for op in OPS {
        for case in (op.cases)() {
            let mut served = false;
            for kernel in op
                .kernels
                .iter()
                .filter(|k| matches!(k.run, Run::Cpu(_)) == on_cpu)
            {
                let name = format!("{} / {} / {}", op.name, kernel.name, case.name);
                match judge(device, op, kernel, &case).unwrap_or_else(|e| panic!("{name}: {e}")) {
                    Verdict::Pass(agreement) => {
                        (judged, served) = (judged + 1, true);
                        println!(
                            "pass  {name}: worst {:.1e}, NMSE {:.1e}",
                            agreement.worst, agreement.nmse
                        );
                    }
                    Verdict::Fail(problem) => {
                        served = true;
                        failed.push(format!("{name}: {problem}"));
                    }
                    Verdict::Unsupported => println!("unsupported  {name}"),
                }
            }
            if !served {
                unserved.push(format!("{} / {}", op.name, case.name));
            }
        }
    }
    assert!(
        failed.is_empty(),
        "{} of {}:\n{}",
        failed.len(),
        device.name(),
        failed.join("\n")
    );
    (judged, unserved)
}

#[test]
fn every_cpu_kernel_agrees_with_its_reference() {
    let (judged, unserved) = judge_all(&Device::cpu());
    assert!(judged > 50, "only {judged} cases were judged");
    assert!(unserved.is_empty(), "the CPU path serves all: {unserved:?}");
}

#[test]
fn every_wgsl_kernel_agrees_with_its_reference() {
    let Some(device) = adapter::adapter() else {
        return;
    };
    let (judged, unserved) = judge_all(&device);
    assert!(judged > 50, "only {judged} cases were judged");
    assert!(unserved.is_empty(), "the adapter serves all: {unserved:?}");
}

/// Trusting a device judges kernels twice, with runtime checks and without; some ops will do.
#[test]
fn wgsl_kernels_pass_without_runtime_checks() {
    let Some(device) = adapter::adapter() else {
        return;
    };
    let some = ["embed", "rms_norm", "merge", "sample"];
    let ops: Vec<_> = OPS
        .iter()
        .copied()
        .filter(|op| some.contains(&op.name))
        .collect();
    let n = trust(&device, &ops).unwrap();
    assert!(n > ops.len(), "only {n} variants are trusted");
    assert_eq!(trust(&Device::cpu(), OPS).unwrap(), 0, "no shader");
}

#[test]
fn a_kernel_that_fails_a_case_is_not_trusted() {
    use hogwild::device::Wgsl;
    const HALF: &str = "
struct Params { n: u32 }
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x < params.n / 2u { y[id.x] = 2.0 * x[id.x]; }
}";
    static HALVED: Op = Op {
        args: &[("x", Access::Read), ("y", Access::Write)],
        cases: || (DOUBLE.cases)(),
        kernels: &[Kernel {
            name: "half",
            run: Run::Wgsl(Wgsl {
                file: "half.wgsl",
                source: HALF,
                consts: |_, _| Vec::new(),
                elements: &[],
                groups: |d, _| [d.params.get::<[u32; 1]>()[0].div_ceil(64), 1, 1],
                loads: None,
            }),
            fits: always,
        }],
        ..copy_of_double()
    };
    let Some(device) = adapter::adapter() else {
        return;
    };
    let error = trust(&device, &[&HALVED]).unwrap_err().to_string();
    assert!(
        error.contains("half") && error.contains("1757 numbers"),
        "{error}"
    );
}

#[test]
fn every_op_has_a_kernel_of_each_kind_and_enough_cases() {
    for op in OPS {
        for cpu in [false, true] {
            let found = op
                .kernels
                .iter()
                .any(|k| matches!(k.run, Run::Cpu(_)) == cpu);
            assert!(found, "{} has no kernel of the kind cpu = {cpu}", op.name);
        }
        assert!((op.cases)().len() >= 3, "{} has few cases", op.name);
    }
}

/// For every parameter there is a case in which it matters: another value changes the reference.
#[test]
fn every_param_matters_in_some_case() {
    for op in OPS {
        for (at, param) in op.params.iter().enumerate() {
            // Sizes that a shader needs at compile time, or that only choose or bound the dispatch.
            let launch = [
                "head_dim",
                "rows_per_work",
                "n_heads",
                "n_kv_heads",
                "tiled",
            ];
            if launch.contains(param) {
                continue;
            }
            let matters = (op.cases)().iter().any(|case| {
                let mut words: Vec<u32> = bytemuck::pod_collect_to_vec(case.params.as_bytes());
                let right = words[at];
                words[at] = if right > 1_000_000 {
                    (f32::from_bits(right) * 1.5).to_bits()
                } else {
                    right.saturating_sub(1) + u32::from(right == 0)
                };
                let wrong = with_params(case, &words);
                let kernel = Kernel {
                    name: "other params",
                    run: Run::Cpu(op.reference),
                    fits: always,
                };
                let kernel = &*Box::leak(Box::new(kernel));
                // The reference under wrong parameters must be told apart from the right ones.
                let got = std::panic::catch_unwind(|| outputs(op, kernel, &wrong));
                got.is_err() || got.unwrap() != outputs(op, kernel, case)
            });
            assert!(matters, "{}: no case depends on {param}", op.name);
        }
    }
}

fn with_params(case: &Case, words: &[u32]) -> Case {
    Case {
        params: ParamBytes::from_words(words),
        ..case.clone()
    }
}

/// All written arguments after running a Rust kernel on a case.
fn outputs(op: &Op, kernel: &Kernel, case: &Case) -> Vec<Vec<u32>> {
    use hogwild::device::{View, judge::pack};
    let Run::Cpu(run) = kernel.run else {
        panic!("a Rust kernel")
    };
    let mut words: Vec<Vec<u32>> = case
        .args
        .iter()
        .map(|arg| {
            let len: usize = arg.shape.iter().product();
            match &arg.data {
                Data::Words(words) => words.clone(),
                Data::Floats(values) => pack(values.iter().copied(), arg.dtype),
                Data::Output => vec![0; arg.dtype.bytes(len).unwrap().div_ceil(4)],
            }
        })
        .collect();
    let views = words
        .iter_mut()
        .zip(&case.args)
        .zip(op.args)
        .map(|((words, arg), (_, access))| match access {
            Access::Read => View::read(arg.dtype, words),
            _ => View::write(arg.dtype, words),
        })
        .collect();
    run(&mut Args::new(case.params, views));
    words
}

// Canaries. The op doubles `n` numbers.

fn double(args: &mut Args<'_>, n: usize, tweak: impl Fn(usize, f64) -> f64) {
    let [x, mut y] = args.views();
    for i in 0..n {
        let v = tweak(i, 2.0 * x.get(i));
        y.set(i, v);
    }
}

fn count(args: &Args<'_>) -> usize {
    args.params::<[u32; 1]>()[0] as usize
}

static DOUBLE: Op = Op {
    name: "double",
    summary: "y = 2 x",
    params: &["n"],
    args: &[("x", Access::Read), ("y", Access::Write)],
    reference: |args| double(args, count(args), |_, v| v),
    kernels: &[],
    cases: || {
        let case = |n: usize| Case {
            name: format!("{n} numbers"),
            params: ParamBytes::new(&[u32::try_from(n).unwrap()]),
            args: vec![
                CaseArg {
                    dtype: DType::F32,
                    shape: vec![n],
                    data: Data::Floats((0..n).map(|i| (i as f32).sin()).collect()),
                },
                CaseArg {
                    dtype: DType::F32,
                    shape: vec![n],
                    data: Data::Output,
                },
            ],
        };
        vec![case(1757)]
    },
    tolerance: Tolerance::with_abs(1e-6),
};

fn verdict(run: fn(&mut Args<'_>)) -> Verdict {
    let kernel = Kernel {
        name: "canary",
        run: Run::Cpu(run),
        fits: always,
    };
    judge(&Device::cpu(), &DOUBLE, &kernel, &(DOUBLE.cases)()[0]).unwrap()
}

#[track_caller]
fn must_fail(run: fn(&mut Args<'_>), word: &str) {
    match verdict(run) {
        Verdict::Fail(problem) => assert!(problem.contains(word), "unexpected reason: {problem}"),
        other => panic!("the judge let it pass: {other:?}"),
    }
}

#[test]
fn the_judge_accepts_the_right_kernel() {
    assert!(matches!(
        verdict(|args| double(args, count(args), |_, v| v)),
        Verdict::Pass(_)
    ));
}

#[test]
fn the_judge_rejects_an_unwritten_output() {
    must_fail(|_| {}, "y[");
}

#[test]
fn the_judge_rejects_one_wrong_element() {
    must_fail(
        |args| {
            double(
                args,
                count(args),
                |i, v| if i == 1001 { v + 1e-4 } else { v },
            );
        },
        "y[1001]",
    );
}

#[test]
fn the_judge_rejects_a_dropped_tail() {
    must_fail(|args| double(args, count(args) / 64 * 64, |_, v| v), "y[");
}

#[test]
fn the_judge_rejects_a_write_behind_the_end() {
    must_fail(|args| double(args, count(args) + 1, |_, v| v), "left alone");
}

#[test]
fn the_judge_rejects_nan() {
    must_fail(
        |args| double(args, count(args), |i, v| if i == 3 { f64::NAN } else { v }),
        "y[3]",
    );
}

#[test]
fn the_judge_rejects_small_errors_everywhere() {
    let rough = |_, v: f64| v * (1.0 + 8e-6);
    must_fail(
        |args| {
            let n = count(args);
            double(args, n, |_, v| v * (1.0 + 8e-6));
        },
        "NMSE",
    );
    assert!(
        (rough(0, 1.0) - 1.0) < 1e-5,
        "each element alone is within the bound"
    );
}

#[test]
fn the_judge_rejects_a_wrong_parameter() {
    must_fail(|args| double(args, count(args) - 1, |_, v| v), "y[1756]");
}

/// A kernel that writes its input: only a shader can, the CPU player forbids it.
#[test]
fn the_judge_rejects_a_clobbered_input() {
    use hogwild::device::Wgsl;
    const CLOBBER: &str = "
struct Params { n: u32 }
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x < params.n { y[id.x] = 2.0 * x[id.x]; x[id.x] = 0.0; }
}";
    static LOOSE: Op = Op {
        name: "clobber",
        args: &[("x", Access::ReadWrite), ("y", Access::Write)],
        ..copy_of_double()
    };
    let Some(device) = adapter::adapter() else {
        return;
    };
    let kernel = Kernel {
        name: "canary",
        run: Run::Wgsl(Wgsl {
            file: "canary.wgsl",
            source: CLOBBER,
            consts: |_, _| Vec::new(),
            elements: &[],
            groups: |d, _| [d.params.get::<[u32; 1]>()[0].div_ceil(64), 1, 1],
            loads: None,
        }),
        fits: always,
    };
    let case = &(DOUBLE.cases)()[0];
    // Declared as read-only, the shader's binding does not agree with the op at all.
    let refused = judge(&device, &DOUBLE, &kernel, case);
    assert!(
        refused.is_err_and(|e| e.to_string().contains("arguments")),
        "read-only is enforced"
    );
    // Declared as written, the change is seen because the reference leaves x alone.
    let verdict = judge(&device, &LOOSE, &kernel, case).unwrap();
    assert!(
        matches!(&verdict, Verdict::Fail(p) if p.contains("left alone")),
        "{verdict:?}"
    );
}

const fn copy_of_double() -> Op {
    Op {
        name: "double",
        summary: "y = 2 x",
        params: &["n"],
        args: &[],
        reference: |args| double(args, count(args), |_, v| v),
        kernels: &[],
        cases: Vec::new,
        tolerance: Tolerance::with_abs(1e-6),
    }
}

#[test]
fn a_checked_run_stops_at_the_first_dispatch_that_disagrees() {
    use hogwild::device::{Dispatch, Recording, judge::play_checked};
    static WRONG: Op = Op {
        name: "wrong",
        args: &[("x", Access::Read), ("y", Access::Write)],
        kernels: &[Kernel {
            name: "off by a thousandth",
            run: Run::Cpu(|args| double(args, count(args), |_, v| v * 1.001)),
            fits: always,
        }],
        ..copy_of_double()
    };
    let device = Device::cpu();
    let tensors = || {
        let x: Vec<f32> = (0..100).map(|i| (i as f32).sin()).collect();
        vec![
            device.upload(&[100], DType::F32, &x).unwrap(),
            device.tensor(&[100], DType::F32).unwrap(),
        ]
    };
    let dispatch = |op| Dispatch {
        op,
        params: ParamBytes::new(&[100_u32]),
        args: tensors(),
    };
    let mut recording = Recording::default();
    recording.dispatches.push(dispatch(&DOUBLE));
    play_checked(&device, &recording).unwrap();
    recording.dispatches.push(dispatch(&WRONG));
    let error = play_checked(&device, &recording).unwrap_err().to_string();
    for word in ["op wrong", "off by a thousandth", "dispatch 1", "y["] {
        assert!(error.contains(word), "{word} is not in: {error}");
    }
}
