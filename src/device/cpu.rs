//! The player that needs no GPU: Rust kernels over host memory.

use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::op::{Access, Args, Kernel, Run, View};
use super::tensor::{Storage, padded_bytes};
use super::{Caps, DType, Dispatch, Recording, Tensor};

/// The CPU as a device.
#[derive(Debug, Default)]
pub struct Cpu;

/// What is known of the CPU path on this machine.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct CpuReport {
    /// Threads that kernels run on (`RAYON_NUM_THREADS` sets it).
    pub threads: usize,
    /// The widest instruction set that kernels use here.
    pub instructions: &'static str,
}

enum Guard<'a> {
    Read(RwLockReadGuard<'a, Vec<u32>>),
    Write(RwLockWriteGuard<'a, Vec<u32>>),
}

pub(super) const POISONED: &str = "no kernel panics while it holds a tensor";

impl Cpu {
    /// What is known of the CPU path on this machine.
    pub fn report() -> CpuReport {
        CpuReport {
            threads: rayon::current_num_threads(),
            instructions: instructions(),
        }
    }

    /// Bytes that programs may still take without others being moved to disk; none where the system does
    /// not say.
    pub(super) fn memory() -> Option<u64> {
        available(&std::fs::read_to_string("/proc/meminfo").ok()?)
    }

    pub(super) fn tensor(shape: &[usize], dtype: DType) -> Tensor {
        let bytes = padded_bytes(
            dtype
                .bytes(shape.iter().product())
                .expect("the caller checked"),
        );
        Tensor::new(shape, dtype, Storage::Cpu(RwLock::new(vec![0; bytes / 4])))
    }

    pub(super) fn write(tensor: &Tensor, offset: usize, bytes: &[u8]) {
        let mut words = words(tensor).write().expect(POISONED);
        let all: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
        all[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn read(tensor: &Tensor, offset: usize, len: usize) -> Vec<u8> {
        let words = words(tensor).read().expect(POISONED);
        bytemuck::cast_slice(&words)[offset..offset + len].to_vec()
    }

    pub(super) fn play(recording: &Recording) {
        for upload in &recording.uploads {
            Self::write(&upload.to, 0, &upload.bytes);
        }
        for dispatch in &recording.dispatches {
            Self::run(dispatch, Self::kernel(dispatch));
        }
    }

    /// The kernel that serves a dispatch; none means the reference.
    pub(super) fn kernel(dispatch: &Dispatch) -> Option<&'static Kernel> {
        dispatch
            .op
            .kernels
            .iter()
            .find(|k| matches!(k.run, Run::Cpu(_)) && (k.fits)(dispatch, &Caps::cpu()))
    }

    pub(super) fn run(dispatch: &Dispatch, kernel: Option<&Kernel>) {
        let mut guards: Vec<Guard<'_>> = dispatch
            .op
            .args
            .iter()
            .zip(&dispatch.args)
            .map(|((_, access), tensor)| match access {
                Access::Read => Guard::Read(words(tensor).read().expect(POISONED)),
                _ => Guard::Write(words(tensor).write().expect(POISONED)),
            })
            .collect();
        let views = guards
            .iter_mut()
            .zip(&dispatch.args)
            .map(|(guard, tensor)| match guard {
                Guard::Read(words) => View::read(tensor.dtype(), words),
                Guard::Write(words) => View::write(tensor.dtype(), words),
            })
            .collect();
        let mut args = Args::new(dispatch.params, views);
        match kernel.map(|k| &k.run) {
            Some(Run::Cpu(run)) => run(&mut args),
            _ => (dispatch.op.reference)(&mut args),
        }
    }
}

/// `MemAvailable` of Linux' `/proc/meminfo`, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

fn instructions() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    if pulp::x86::V3::try_new().is_some() {
        return "x86-64-v3 (AVX2, FMA)";
    }
    match std::env::consts::ARCH {
        "x86_64" => "x86-64",
        "aarch64" => "aarch64 (NEON)",
        other => other,
    }
}

pub(super) fn words(tensor: &Tensor) -> &RwLock<Vec<u32>> {
    match tensor.storage() {
        Storage::Cpu(words) => words,
        Storage::Gpu(_) => panic!("a tensor of a GPU was given to the CPU player"),
    }
}

#[cfg(test)]
mod tests {
    use super::available;

    #[test]
    fn available_memory_is_read_from_its_line() {
        let text = "MemTotal:       24689764 kB\nMemFree:         9689764 kB\nMemAvailable:   13689764 kB\n";
        assert_eq!(available(text), Some(13_689_764 * 1024));
        for bad in [
            "",
            "MemFree: 1 kB",
            "MemAvailable: x kB",
            "MemAvailable: 99999999999999999999 kB",
        ] {
            assert_eq!(available(bad), None, "{bad}");
        }
    }
}
