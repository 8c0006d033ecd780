//! The judge: holds a kernel to its op's reference.
//!
//! Outputs start as NaN, every buffer ends in guard words that must survive, inputs must come back
//! unchanged, elements that the reference leaves alone must be left alone, and a NaN can never pass.
//! What is before a buffer needs no guard: an index below zero wraps to one far behind its end.

use std::collections::HashSet;

use half::{bf16, f16};

use super::compose::Variant;
use super::op::{Access, Args, Bound, Case, CaseArg, Data, Kernel, Op, Run, View, Wgsl};
use super::{DType, Device, Dispatch, Recording, Tensor};
use crate::{Error, Result};

/// Guard elements behind every buffer, at least.
const GUARD: usize = 64;

/// What the judge found.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// The kernel agrees with the reference.
    Pass(Agreement),
    /// It does not; the sentence says where.
    Fail(String),
    /// The kernel does not serve this case on this device. Never a pass.
    Unsupported,
}

/// How close a kernel came.
#[derive(Clone, Copy, Debug, Default)]
pub struct Agreement {
    /// Largest absolute difference of an element.
    pub worst: f64,
    /// Largest normalised mean squared error of an output.
    pub nmse: f64,
}

/// Judges one kernel on one case.
///
/// # Errors
/// Those of the device; a disagreement is a [`Verdict::Fail`], not an error.
///
/// # Panics
/// If the case does not fit the op.
pub fn judge(device: &Device, op: &'static Op, kernel: &Kernel, case: &Case) -> Result<Verdict> {
    let (dispatch, before) = stage(device, op, case)?;
    if !(kernel.fits)(&dispatch, &device.caps()) {
        return Ok(Verdict::Unsupported);
    }
    device.run(&dispatch, kernel)?;
    let mut after = Vec::new();
    for tensor in &dispatch.args {
        after.push(read_words(device, tensor)?);
    }
    let want = reference(op, &dispatch, &before);
    let dtypes: Vec<DType> = case.args.iter().map(|a| a.dtype).collect();
    Ok(match compare(op, &dtypes, &before, &want, &after, true) {
        Ok(agreement) => Verdict::Pass(agreement),
        Err(problem) => Verdict::Fail(problem),
    })
}

/// A case on a device: its dispatch, and the words of its arguments.
fn stage(device: &Device, op: &'static Op, case: &Case) -> Result<(Dispatch, Vec<Vec<u32>>)> {
    assert_eq!(
        case.args.len(),
        op.args.len(),
        "{}: case '{}'",
        op.name,
        case.name
    );
    let before: Vec<Vec<u32>> = case.args.iter().map(initial).collect();
    let mut args = Vec::new();
    for (arg, words) in case.args.iter().zip(&before) {
        let tensor = device.tensor(&guarded_shape(&arg.shape), arg.dtype)?;
        device.write(&tensor, 0, bytemuck::cast_slice(words))?;
        args.push(tensor);
    }
    let params = case.params;
    Ok((Dispatch { op, params, args }, before))
}

/// Lets a device run shaders without runtime checks of their indices and loops; returns the number of
/// variants that it then does that with.
///
/// All shaders of the ops are judged on all cases first, with the checks, and again without. A variant
/// that no case needs keeps its checks, and so does a shader that is of none of the ops.
///
/// # Errors
/// [`Error::Disagree`] if a kernel fails a case; those of the device.
pub fn trust(device: &Device, ops: &[&'static Op]) -> Result<usize> {
    let Device::Gpu(gpu) = device else {
        return Ok(0);
    };
    let passed = judge_variants(device, ops)?;
    for (wgsl, variant) in &passed {
        gpu.trust(wgsl, variant.clone());
    }
    judge_variants(device, ops)?;
    let addresses = passed.iter().map(|(w, v)| (w.source.as_ptr(), v));
    Ok(addresses.collect::<HashSet<_>>().len())
}

/// The variants of all shaders that cases need, each of which passed.
fn judge_variants(device: &Device, ops: &[&'static Op]) -> Result<Vec<(&'static Wgsl, Variant)>> {
    let mut out = Vec::new();
    for &op in ops {
        for (at, case) in (op.cases)().iter().enumerate() {
            for kernel in op.kernels {
                let Run::Wgsl(wgsl) = &kernel.run else {
                    continue;
                };
                match judge(device, op, kernel, case)? {
                    Verdict::Pass(_) => {
                        let (dispatch, _) = stage(device, op, case)?;
                        out.push((wgsl, Variant::of(wgsl, &dispatch, &device.caps())));
                    }
                    Verdict::Unsupported => {}
                    Verdict::Fail(problem) => {
                        return Err(Error::Disagree {
                            op: op.name.into(),
                            kernel: kernel.name.into(),
                            dispatch: at,
                            problem: format!("case '{}': {problem}", case.name),
                        });
                    }
                }
            }
        }
    }
    Ok(out)
}

/// Plays a recording dispatch by dispatch, kernel and reference side by side on the same inputs.
///
/// # Errors
/// [`Error::Disagree`] at the first dispatch whose kernel is out of bounds; those of the device.
pub fn play_checked(device: &Device, recording: &Recording) -> Result<()> {
    for upload in &recording.uploads {
        device.play(&Recording {
            uploads: vec![upload.clone()],
            dispatches: Vec::new(),
        })?;
    }
    for (at, dispatch) in recording.dispatches.iter().enumerate() {
        let mut before = Vec::new();
        for tensor in &dispatch.args {
            before.push(read_words(device, tensor)?);
        }
        let Some(kernel) = device.kernel(dispatch)? else {
            device.play(&Recording {
                uploads: Vec::new(),
                dispatches: vec![dispatch.clone()],
            })?;
            continue;
        };
        device.run(dispatch, kernel)?;
        let mut after = Vec::new();
        for tensor in &dispatch.args {
            after.push(read_words(device, tensor)?);
        }
        let want = reference(dispatch.op, dispatch, &before);
        let dtypes: Vec<DType> = dispatch.args.iter().map(Tensor::dtype).collect();
        compare(dispatch.op, &dtypes, &before, &want, &after, false).map_err(|problem| {
            Error::Disagree {
                op: dispatch.op.name.into(),
                kernel: kernel.name.into(),
                dispatch: at,
                problem,
            }
        })?;
    }
    Ok(())
}

fn read_words(device: &Device, tensor: &Tensor) -> Result<Vec<u32>> {
    let bytes = device.read(tensor, 0, super::tensor::padded_bytes(tensor.bytes()))?;
    Ok(bytemuck::pod_collect_to_vec(&bytes))
}

fn reference(op: &Op, dispatch: &Dispatch, before: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let mut want = before.to_vec();
    let views = want
        .iter_mut()
        .zip(&dispatch.args)
        .zip(op.args)
        .map(|((words, tensor), (_, access))| match access {
            Access::Read => View::read(tensor.dtype(), words),
            _ => View::write(tensor.dtype(), words),
        })
        .collect();
    (op.reference)(&mut Args::new(dispatch.params, views));
    want
}

/// Room for the guard, in whole rows of the first dimension.
fn guarded_shape(shape: &[usize]) -> Vec<usize> {
    let row: usize = shape[1..].iter().product::<usize>().max(1);
    let mut shape = shape.to_vec();
    shape[0] += GUARD.div_ceil(row);
    shape
}

/// The words of an argument before the kernel runs: contents or poison, then noise as guard.
fn initial(arg: &CaseArg) -> Vec<u32> {
    let len: usize = arg.shape.iter().product();
    let total: usize = guarded_shape(&arg.shape).iter().product();
    let guard = |i: usize| if i.is_multiple_of(2) { 3.0e4 } else { -2.0e4 };
    match (&arg.data, arg.dtype) {
        (Data::Words(words), dtype) => {
            let [len, total] = [len, total].map(|n| dtype.bytes(n).expect("small").div_ceil(4));
            assert_eq!(words.len(), len, "the data fills the shape");
            let guard = std::iter::repeat_n(0x7fff_fff0, total - len);
            words.iter().copied().chain(guard).collect()
        }
        (Data::Output, DType::U32 | DType::U4 | DType::U8 | DType::F8) => {
            vec![0xdead_beef; arg.dtype.bytes(total).expect("small").div_ceil(4)]
        }
        (data, dtype) => {
            let value = |i: usize| match data {
                Data::Floats(values) if i < len => values[i],
                _ if i < len => f32::NAN,
                _ => guard(i),
            };
            if let Data::Floats(values) = data {
                assert_eq!(values.len(), len, "the data fills the shape");
            }
            pack((0..total).map(value), dtype)
        }
    }
}

/// Packs numbers into words of a storage type.
///
/// # Panics
/// If the type is of integers.
pub fn pack(values: impl Iterator<Item = f32>, dtype: DType) -> Vec<u32> {
    let halves = |halves: Vec<u16>| {
        halves
            .chunks(2)
            .map(|h| u32::from(h[0]) | u32::from(*h.get(1).unwrap_or(&0)) << 16)
            .collect()
    };
    match dtype {
        DType::F32 => values.map(f32::to_bits).collect(),
        DType::F16 => halves(values.map(|v| f16::from_f32(v).to_bits()).collect()),
        DType::BF16 => halves(values.map(|v| bf16::from_f32(v).to_bits()).collect()),
        DType::U32 | DType::U4 | DType::U8 | DType::F8 => {
            panic!("floats are not packed into integers")
        }
    }
}

/// An element as bits and number; of codes, a whole word.
fn element(words: &[u32], dtype: DType, at: usize) -> (u32, f64) {
    if !matches!(dtype, DType::F16 | DType::BF16) {
        let bits = words[at];
        let value = if dtype == DType::F32 {
            f64::from(f32::from_bits(bits))
        } else {
            bits.into()
        };
        return (bits, value);
    }
    let half = (words[at / 2] >> (16 * (at % 2))) & 0xffff;
    let bits = u16::try_from(half).expect("masked");
    let value = match dtype {
        DType::F16 => f64::from(f16::from_bits(bits)),
        _ => f64::from(bf16::from_bits(bits)),
    };
    (half, value)
}

/// Compares all arguments; `strict` also asks that outputs are large against the absolute bound.
fn compare(
    op: &Op,
    dtypes: &[DType],
    before: &[Vec<u32>],
    want: &[Vec<u32>],
    got: &[Vec<u32>],
    strict: bool,
) -> Result<Agreement, String> {
    let mut all = Agreement::default();
    for (i, (name, access)) in op.args.iter().enumerate() {
        if *access == Access::Read {
            if let Some(at) = (0..before[i].len()).find(|&at| before[i][at] != got[i][at]) {
                return Err(format!("input {name} was clobbered at word {at}"));
            }
            continue;
        }
        let bound = op.tolerance.of(dtypes[i]);
        let agreement = compare_output(
            name,
            dtypes[i],
            bound,
            [&before[i], &want[i], &got[i]],
            strict,
        )?;
        all.worst = all.worst.max(agreement.worst);
        all.nmse = all.nmse.max(agreement.nmse);
    }
    Ok(all)
}

fn compare_output(
    name: &str,
    dtype: DType,
    bound: Bound,
    [before, want, got]: [&[u32]; 3],
    strict: bool,
) -> Result<Agreement, String> {
    let len = match dtype {
        DType::F16 | DType::BF16 => want.len() * 2,
        _ => want.len(),
    };
    let (mut worst, mut error, mut power, mut count) = (0.0_f64, 0.0, 0.0, 0usize);
    for at in 0..len {
        let (was, (want, w), (bits, g)) = (
            element(before, dtype, at).0,
            element(want, dtype, at),
            element(got, dtype, at),
        );
        if want == was {
            if bits != was {
                return Err(format!("{name}[{at}] is {g}, but must be left alone"));
            }
            continue;
        }
        let d = (g - w).abs();
        if d.is_nan() || d > bound.abs + bound.rel * w.abs() {
            return Err(format!("{name}[{at}] is {g}, the reference says {w}"));
        }
        worst = worst.max(d);
        error += d * d;
        power += w * w;
        count += 1;
    }
    if count == 0 {
        return if strict {
            Err(format!("the reference writes nothing to {name}"))
        } else {
            Ok(Agreement::default())
        };
    }
    let nmse = if power > 0.0 { error / power } else { error };
    if nmse.is_nan() || nmse > bound.nmse {
        return Err(format!(
            "{name} has NMSE {nmse:.1e}, allowed is {:.0e}",
            bound.nmse
        ));
    }
    let rms = (power / count as f64).sqrt();
    let is_float = matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
    if strict && is_float && rms < 100.0 * bound.abs {
        return Err(format!(
            "the case is too small to judge {name}: rms {rms:.1e}"
        ));
    }
    Ok(Agreement { worst, nmse })
}
