//! The bytes that kernels load: what each says of itself is measured, and then summed for a pass of a large
//! model.
//!
//! A shader is measured by one of its own: every `argument[index]` that is read passes its index through a
//! function that counts, for one workgroup of choice. A word counts once for all lanes, and again when the
//! same lane comes back to it after more than [`WINDOW`] other loads.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
#![allow(
    clippy::print_stdout,
    reason = "what a test measures is for people, too"
)]

#[path = "common/adapter.rs"]
mod adapter;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use hogwild::cache::KvCache;
use hogwild::cache::layout::{Layout, Shared};
use hogwild::cache::plan::{Batch, Logits, Turn, plan};
use hogwild::device::judge::pack;
use hogwild::device::{
    Access, Args, Case, DType, Data, Device, Dispatch, Ints, Kernel, Op, Run, Tensor, Variant,
    Wgsl, always, compose, traffic,
};
use hogwild::model::{Model, RandomWeights, Scratch, shapes};
use hogwild::ops::OPS;
use hogwild::ops::linear::By;

/// Loads of a lane after which a word is no longer near: 128 loads of 16 bytes by 64 lanes are 128 KiB.
const WINDOW: u32 = 128;

/// Words of counters that a case may need.
const MOST_COUNTERS: usize = 12 << 20;

/// Ops whose loads depend on numbers that the host never sees.
const NOT_KNOWN: &[&str] = &["sample", "route"];

/// Cases that a kernel is measured on: compiling takes longer than counting.
const MOST_CASES: usize = 6;

/// What a shader is rewritten with: how many words an element of each argument has.
struct Counted {
    text: String,
    lanes: usize,
    /// First counted word of each argument.
    bases: Vec<usize>,
    words: usize,
}

/// Rewrites a shader so that it counts its loads in one more argument.
fn counted(text: &str, op: &Op, args: &[Tensor]) -> Counted {
    let module = naga::front::wgsl::parse_str(text).unwrap();
    let entry = &module.entry_points[0];
    let lanes = entry.workgroup_size.iter().product::<u32>() as usize;
    let stride = |name: &str| {
        let found = module
            .global_variables
            .iter()
            .find(|(_, v)| v.name.as_deref() == Some(name));
        match module.types[found.unwrap().1.ty].inner {
            naga::TypeInner::Array { stride, .. } => stride as usize / 4,
            ref other => panic!("{name} is an array, not {other:?}"),
        }
    };
    let strides: Vec<usize> = op.args.iter().map(|(name, _)| stride(name)).collect();
    let (mut bases, mut words) = (Vec::new(), 0);
    for tensor in args {
        bases.push(words);
        words += tensor.bytes().div_ceil(4);
    }
    let code: String = text
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default().to_owned() + "\n")
        .collect();
    let mut sites = 0;
    let mut out = rewritten(&code, op, &mut sites);
    assert_eq!(sites, loads_of(&module), "{}: every load is found", op.name);

    let group = builtin(&mut out, "workgroup_id", "vec3<u32>", "counted_group");
    let lane = builtin(&mut out, "local_invocation_index", "u32", "counted_lane");
    let body = out.find("fn main(").unwrap();
    let open = body + out[body..].find('{').unwrap();
    out.insert_str(
        open + 1,
        &format!(
            "\n    counted_on = all({group} == vec3<u32>(counts[0], counts[1], counts[2]));\n    \
             counted_by = {lane};\n"
        ),
    );
    let _ = write!(
        out,
        "
        @group(0) @binding({}) var<storage, read_write> counts: array<u32>;
        var<private> counted_on: bool;
        var<private> counted_by: u32;
        var<private> counted_clock: u32;
        fn counted_words(first: u32, n: u32) {{
            if counted_on {{
                counted_clock++;
                for (var w = first; w < first + n; w++) {{
                    let at = 4u + (w * {lanes}u + counted_by) * 2u;
                    let last = counts[at];
                    if last == 0u || counted_clock - last > {WINDOW}u {{
                        counts[at + 1u] += 1u;
                    }}
                    counts[at] = counted_clock;
                }}
            }}
        }}\n",
        args.len() + 1
    );
    for (((name, _), base), stride) in op.args.iter().zip(&bases).zip(&strides) {
        let _ = write!(
            out,
            "fn counted_{name}(i: u32) -> u32 {{
                counted_words({base}u + i * {stride}u, {stride}u);
                return i;
            }}
            fn counted_{name}_part(i: u32, part: u32) -> u32 {{
                counted_words({base}u + i * {stride}u + part, 1u);
                return i;
            }}\n"
        );
    }
    Counted {
        text: out,
        lanes,
        bases,
        words,
    }
}

/// The name of a builtin of the entry point, which is added if it is missing.
fn builtin(text: &mut String, builtin: &str, ty: &str, name: &str) -> String {
    let attribute = format!("@builtin({builtin})");
    if let Some(at) = text.find(&attribute) {
        let rest = &text[at + attribute.len()..];
        return rest.split(':').next().unwrap().trim().to_owned();
    }
    let at = text.find("fn main(").unwrap() + "fn main(".len();
    text.insert_str(at, &format!("{attribute} {name}: {ty}, "));
    name.to_owned()
}

/// Lets the index of every read of an argument pass through its counting function.
fn rewritten(code: &str, op: &Op, sites: &mut usize) -> String {
    let mut out = String::new();
    let mut rest = code;
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    while let Some(c) = rest.chars().next() {
        let word: String = rest.chars().take_while(|&c| is_word(c)).collect();
        if word.is_empty() {
            out.push(c);
            rest = &rest[c.len_utf8()..];
            continue;
        }
        rest = &rest[word.len()..];
        let member = out.ends_with('.');
        let arg = op.args.iter().find(|(name, _)| *name == word);
        let (Some((name, _)), false, true) = (arg, member, rest.starts_with('[')) else {
            out.push_str(&word);
            continue;
        };
        let mut depth = 0;
        let end = rest
            .find(|c| {
                depth += i32::from(c == '[') - i32::from(c == ']');
                depth == 0
            })
            .unwrap();
        let index = rewritten(&rest[1..end], op, sites);
        rest = &rest[end + 1..];
        let part = rest
            .strip_prefix('.')
            .and_then(|r| "xyzw".find(r.chars().next()?))
            .filter(|_| !rest[2..].starts_with(is_word));
        let after = rest[if part.is_some() { 2 } else { 0 }..].trim_start();
        if after.starts_with('=') && !after.starts_with("==") {
            let _ = write!(out, "{name}[{index}]");
            continue;
        }
        *sites += 1;
        let _ = match part {
            Some(part) => write!(out, "{name}[counted_{name}_part({index}, {part}u)]"),
            None => write!(out, "{name}[counted_{name}({index})]"),
        };
    }
    out
}

/// Loads of storage in a module: where a rewritten shader must count.
fn loads_of(module: &naga::Module) -> usize {
    let of = |function: &naga::Function| {
        let expressions = &function.expressions;
        let from_storage = |mut pointer: naga::Handle<naga::Expression>| loop {
            match expressions[pointer] {
                naga::Expression::Access { base, .. }
                | naga::Expression::AccessIndex { base, .. } => pointer = base,
                naga::Expression::GlobalVariable(variable) => {
                    let space = module.global_variables[variable].space;
                    return matches!(space, naga::AddressSpace::Storage { .. });
                }
                _ => return false,
            }
        };
        let load = |e: &naga::Expression| match *e {
            naga::Expression::Load { pointer } => from_storage(pointer),
            _ => false,
        };
        expressions.iter().filter(|(_, e)| load(e)).count()
    };
    let functions = module.functions.iter().map(|(_, f)| of(f));
    functions.sum::<usize>()
        + module
            .entry_points
            .iter()
            .map(|e| of(&e.function))
            .sum::<usize>()
}

/// The arguments of a case as tensors, and its arrays of integers.
fn dispatch_of(device: &Device, op: &'static Op, case: &Case) -> (Dispatch, Ints<'static>) {
    let mut ints = Ints::default();
    let args = case.args.iter().map(|arg| {
        let words = match &arg.data {
            Data::Words(words) => words.clone(),
            Data::Floats(values) => pack(values.iter().copied(), arg.dtype),
            Data::Output => Vec::new(),
        };
        let tensor = device.tensor(&arg.shape, arg.dtype).unwrap();
        device
            .write(&tensor, 0, bytemuck::cast_slice(&words))
            .unwrap();
        if arg.dtype == DType::U32 {
            ints.insert(&tensor, words);
        }
        tensor
    });
    let args = args.collect();
    let params = case.params;
    (Dispatch { op, params, args }, ints)
}

fn leaked<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

/// Bytes that a workgroup loads of each argument, by running the shader; none if it has too many words.
fn measured(
    device: &Device,
    dispatch: &Dispatch,
    wgsl: &Wgsl,
    groups: &[[u32; 3]],
) -> Option<Vec<Vec<u64>>> {
    let variant = Variant::of(wgsl, dispatch, &device.caps());
    let composed = compose(wgsl, &variant).unwrap();
    let op = dispatch.op;
    let counted = counted(&composed.text, op, &dispatch.args);
    let n_counters = 4 + counted.words * counted.lanes * 2;
    if n_counters > MOST_COUNTERS {
        return None;
    }
    let mut args = op.args.to_vec();
    args.push(("counts", Access::ReadWrite));
    // The composer writes its first line of the prelude once more.
    let (first, text) = counted.text.split_once('\n').unwrap();
    assert!(first.contains("NEG_LARGE"), "the first line of the prelude");
    let text: &'static str = text.to_owned().leak();
    let op: &'static Op = leaked(Op {
        args: args.leak(),
        kernels: &[],
        ..*op
    });
    let kernel = Kernel {
        name: "counted",
        run: Run::Wgsl(Wgsl {
            file: wgsl.file,
            source: text,
            consts: |_, _| Vec::new(),
            elements: &[],
            groups: wgsl.groups,
            loads: None,
        }),
        fits: always,
    };
    let counts = device.tensor(&[n_counters], DType::U32).unwrap();
    let mut with_counts = dispatch.clone();
    with_counts.op = op;
    with_counts.args.push(counts.clone());
    let all = groups.iter().map(|group| {
        let mut words = vec![0u32; n_counters];
        words[..3].copy_from_slice(group);
        device
            .write(&counts, 0, bytemuck::cast_slice(&words))
            .unwrap();
        device.run(&with_counts, &kernel).unwrap();
        let bytes = device.read(&counts, 0, n_counters * 4).unwrap();
        let words: Vec<u32> = bytemuck::pod_collect_to_vec(&bytes);
        // Of every word, the lane that loaded it most often.
        let times: Vec<u32> = words[4..]
            .chunks_exact(2 * counted.lanes)
            .map(|lanes| lanes.chunks_exact(2).map(|l| l[1]).max().unwrap())
            .collect();
        let ends = counted.bases[1..].iter().copied().chain([counted.words]);
        let of = |(base, end): (&usize, usize)| {
            times[*base..end].iter().map(|&t| u64::from(t)).sum::<u64>() * 4
        };
        counted.bases.iter().zip(ends).map(of).collect()
    });
    Some(all.collect())
}

/// Some workgroups of a dispatch: both ends, and some between.
fn some_groups([x, y, z]: [u32; 3]) -> Vec<[u32; 3]> {
    let mut out = Vec::new();
    for part in 0..=3 {
        let at = |n: u32| (n - 1) * part / 3;
        out.push([at(x), at(y), at(z)]);
        out.push([at(x), at(y) / 2, z - 1]);
    }
    out.sort_unstable();
    out.dedup();
    out
}

/// What is wrong with the loads that a kernel declares, over the cases of its op; and how many were measured.
fn problems(device: &Device, op: &'static Op, kernel: &Kernel) -> (Vec<String>, usize) {
    let Run::Wgsl(wgsl) = &kernel.run else {
        return (Vec::new(), 0);
    };
    let caps = device.caps();
    let (mut out, mut count, mut fitting) = (Vec::new(), 0, 0);
    for case in (op.cases)() {
        if count == MOST_CASES {
            break;
        }
        let (dispatch, ints) = dispatch_of(device, op, &case);
        if !(kernel.fits)(&dispatch, &caps) {
            continue;
        }
        fitting += 1;
        let Some(loads) = wgsl.loads else {
            if NOT_KNOWN.contains(&op.name) {
                return (Vec::new(), 0);
            }
            let undeclared = format!("{} / {}: not declared", op.name, kernel.name);
            return (vec![undeclared], 0);
        };
        let groups = some_groups((wgsl.groups)(&dispatch, &caps));
        let Some(measured) = measured(device, &dispatch, wgsl, &groups) else {
            continue;
        };
        count += 1;
        for (group, got) in groups.into_iter().zip(measured) {
            let declared = loads(&dispatch, &caps, &ints, group);
            assert_eq!(
                declared.len(),
                op.args.len(),
                "one number for each argument"
            );
            for (((name, _), declared), got) in op.args.iter().zip(declared).zip(got) {
                if declared != got {
                    out.push(format!(
                        "{} / {} / {}: workgroup {group:?} loads {got} bytes of {name}, not {declared}",
                        op.name, kernel.name, case.name
                    ));
                }
            }
        }
    }
    if fitting > 0 && count == 0 {
        out.push(format!(
            "{} / {}: no case is small enough",
            op.name, kernel.name
        ));
    }
    (out, count)
}

#[test]
fn kernels_load_what_they_say() {
    let Some(device) = adapter::adapter() else {
        return;
    };
    let mut wrong = Vec::new();
    for op in OPS {
        for kernel in op.kernels {
            let (problems, count) = problems(&device, op, kernel);
            println!("{} / {}: {count} cases", op.name, kernel.name);
            wrong.extend(problems.into_iter().take(5));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Of the experts, a decode pass loads those that its rows chose, each once.
#[test]
fn experts_are_loaded_once_if_chosen() {
    let device = Device::cpu();
    let caps = device.caps();
    let mut most_takers = 0;
    for name in ["expert_up", "expert_down"] {
        let op = OPS.iter().copied().find(|op| op.name == name).unwrap();
        let arg = |name: &str| op.args.iter().position(|(n, _)| *n == name).unwrap();
        let param = |name: &str| op.params.iter().position(|n| *n == name).unwrap();
        let [weight, chosen] = ["weight", "chosen"].map(arg);
        let [first, n_experts] = ["first", "n_experts"].map(param);
        let kernel = op.kernels.iter().find_map(|k| match &k.run {
            Run::Wgsl(wgsl) => Some(wgsl),
            Run::Cpu(_) => None,
        });
        let wgsl = kernel.unwrap();
        for case in (op.cases)() {
            let (dispatch, ints) = dispatch_of(&device, op, &case);
            let choices = ints.get(&dispatch.args[chosen]);
            let words: Vec<u32> = bytemuck::pod_collect_to_vec(dispatch.params.as_bytes());
            let here = words[first]..words[first] + words[n_experts];
            let mut distinct: Vec<u32> = choices.to_vec();
            distinct.retain(|e| here.contains(e));
            distinct.sort_unstable();
            let chosen_in_all = distinct.len();
            distinct.dedup();
            if dispatch.args[chosen].shape()[0] > 16 {
                continue; // More rows than one group of columns: each group loads its own.
            }
            most_takers = most_takers.max(chosen_in_all - distinct.len());
            let one = dispatch.args[weight].bytes() / words[n_experts] as usize;
            let [nx, ny, nz] = (wgsl.groups)(&dispatch, &caps);
            let groups = (0..nz).flat_map(|z| (0..ny).map(move |y| (y, z)));
            let groups = groups.flat_map(|(y, z)| (0..nx).map(move |x| [x, y, z]));
            let loads = wgsl.loads.unwrap();
            let loaded: u64 = groups
                .map(|group| loads(&dispatch, &caps, &ints, group)[weight])
                .sum();
            let want = (distinct.len() * one) as u64;
            assert_eq!(loaded, want, "{name} / {}", case.name);
        }
    }
    assert!(most_takers > 0, "experts that several rows chose");
}

// Canaries: the op adds up pairs of numbers.

static SUM: Op = Op {
    name: "sum",
    summary: "y = the sum of x",
    params: &["n"],
    args: &[("x", Access::Read), ("y", Access::Write)],
    reference: |_: &mut Args<'_>| {},
    kernels: &[],
    cases: || {
        let case = |n: usize| Case {
            name: format!("{n} numbers"),
            params: hogwild::device::ParamBytes::new(&[u32::try_from(n).unwrap()]),
            args: vec![
                hogwild::device::CaseArg {
                    dtype: DType::F32,
                    shape: vec![n],
                    data: Data::Floats(vec![1.0; n]),
                },
                hogwild::device::CaseArg {
                    dtype: DType::F32,
                    shape: vec![64],
                    data: Data::Output,
                },
            ],
        };
        vec![case(64 * 200)]
    },
    tolerance: hogwild::device::Tolerance::with_abs(1e-6),
};

/// A kernel of two workgroups that goes over x as often as it says.
fn summing(source: &'static str) -> Kernel {
    Kernel {
        name: "canary",
        run: Run::Wgsl(Wgsl {
            file: "canary.wgsl",
            source,
            consts: |_, _| Vec::new(),
            elements: &[],
            groups: |_, _| [2, 1, 1],
            loads: Some(|d, _, _, _| vec![d.args[0].bytes() as u64, 0]),
        }),
        fits: always,
    }
}

const SUMMING: &str = "
struct Params { n: u32 }
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(64)
fn main(@builtin(local_invocation_id) local: vec3<u32>) {
    var sum = 0.0;
    for (var again = 0u; again < TIMES; again++) {
        for (var i = local.x; i < params.n; i += 64u) { sum += x[i]; }
    }
    y[local.x] = sum;
}";

#[test]
fn a_kernel_that_reads_twice_is_found_out() {
    let Some(device) = adapter::adapter() else {
        return;
    };
    let times = |times: &str| summing(SUMMING.replace("TIMES", times).leak());
    let (wrong, count) = problems(&device, &SUM, &times("1u"));
    assert!(
        wrong.is_empty() && count == 1,
        "once is what it says: {wrong:?}"
    );
    let (wrong, _) = problems(&device, &SUM, &times("2u"));
    assert!(
        wrong
            .iter()
            .any(|w| w.contains("loads 102400 bytes of x, not 51200")),
        "twice is not: {wrong:?}"
    );
}

/// Bytes that a decode pass of QwQ-32B in int4 loads, over those that it must: weights and cache once each.
/// `rows_per_work` is how many workers attention serves together.
fn qwq_pass(workers: usize, context: usize, rows_per_work: Option<usize>) -> f64 {
    let device = Arc::new(Device::noop().unwrap());
    let weights = RandomWeights {
        dtype: DType::U4,
        shared: false,
    };
    let config = shapes::find("qwq-32b").unwrap();
    let model = Model::random(device.clone(), &config, weights, context + 64).unwrap();
    let shape = model.cache_shape(DType::F16);
    let mut cache = KvCache::new(&device, shape, context / 16 + 64).unwrap();
    // A prompt, and steps of uneven length.
    let mut history = vec![context / 4];
    while history.iter().sum::<usize>() < context - 300 {
        history.push(40 + history.len() * 37 % 200);
    }
    let shared = Shared::after(&mut cache.pages, &history, workers).unwrap();
    let turn = |w| Turn {
        view: Layout::Combined.view(w, &shared),
        tokens: vec![7],
        logits: Logits::Last,
    };
    let batch = Batch {
        turns: (0..workers).map(turn).collect(),
    };
    let rows = rows_per_work.unwrap_or(model.rows_per_work());
    let plan = plan(&cache.pages, &batch, rows, model.windows());
    let recording = model
        .forward(&plan, By::Columns, &cache, &mut Scratch::default())
        .unwrap();
    let mut sums: BTreeMap<&str, u64> = BTreeMap::new();
    for dispatch in traffic(&recording, &device.caps()).unwrap() {
        for (name, bytes) in dispatch.args {
            let kind = match (dispatch.op, name) {
                (_, "weight" | "scales" | "table") => "weights",
                ("attend", "keys" | "values") => "cache",
                _ => "activations",
            };
            *sums.entry(kind).or_default() += bytes;
        }
    }
    let keys: usize = shared.blocks().map(|b| cache.pages.len(b)).sum();
    let must = model.weight_bytes(workers) + model.cache_bytes(shape, keys);
    let ratio = (sums["weights"] + sums["cache"]) as f64 / must as f64;
    println!(
        "W={workers}, {keys} keys: weights {:.3} GB, cache {:.3} GB, {ratio:.4} of what must move; \
         activations {:.3} GB from near",
        sums["weights"] as f64 / 1e9,
        sums["cache"] as f64 / 1e9,
        sums["activations"] as f64 / 1e9,
    );
    ratio
}

#[test]
fn a_pass_loads_weights_and_cache_once() {
    for workers in [1, 4] {
        let ratio = qwq_pass(workers, 16_384, None);
        assert!((0.99..=1.03).contains(&ratio), "W={workers}: {ratio}");
    }
}

#[test]
fn a_cache_that_is_read_once_for_each_worker_is_found_out() {
    let ratio = qwq_pass(4, 16_384, Some(1));
    assert!(ratio > 1.3, "four times the cache shows: {ratio}");
}
