//! Numbers for cases: seeded by the case's name, chosen to mean something.

use super::u32_of;
use crate::device::{Case, CaseArg, DType, Data, ParamBytes};

/// A stream of pseudo-random numbers (`SplitMix64`) that starts from a name.
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn named(name: &str) -> Self {
        // FNV-1a.
        let step = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3);
        Self(name.bytes().fold(0xcbf2_9ce4_8422_2325, step))
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [-1, 1).
    pub(super) fn unit(&mut self) -> f32 {
        let bits = u32::try_from(self.next() >> 40).expect("24 bits");
        bits as f32 / (1u32 << 23) as f32 - 1.0
    }

    /// Uniform in `0..n`.
    pub(super) fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).expect("below a usize")
    }

    pub(super) fn uniform(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.unit()).collect()
    }

    /// Uniform, with one in 97 a hundred times larger.
    pub(super) fn outliers(&mut self, n: usize) -> Vec<f32> {
        let large = |i: usize| if i % 97 == 13 { 100.0 } else { 1.0 };
        (0..n).map(|i| self.unit() * large(i)).collect()
    }

    pub(super) fn scaled(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.unit() * scale).collect()
    }
}

pub(super) fn floats(dtype: DType, shape: &[usize], values: Vec<f32>) -> CaseArg {
    CaseArg {
        dtype,
        shape: shape.to_vec(),
        data: Data::Floats(values),
    }
}

pub(super) fn words(shape: &[usize], values: Vec<u32>) -> CaseArg {
    CaseArg {
        dtype: DType::U32,
        shape: shape.to_vec(),
        data: Data::Words(values),
    }
}

/// Slot and index in its block of each of `n_rows` rows: slots backwards from the third, each once; indices
/// anywhere below `n_angles`.
pub(super) fn targets(rng: &mut Rng, n_rows: usize, n_slots: usize, n_angles: usize) -> CaseArg {
    let target = |row| [(n_slots + 2 - row) % n_slots, rng.below(n_angles)];
    let values = (0..n_rows).flat_map(target).map(u32_of).collect();
    words(&[n_rows, 2], values)
}

pub(super) fn output(dtype: DType, shape: &[usize]) -> CaseArg {
    CaseArg {
        dtype,
        shape: shape.to_vec(),
        data: Data::Output,
    }
}

pub(super) fn case<P: bytemuck::Pod>(name: &str, params: &P, args: Vec<CaseArg>) -> Case {
    Case {
        name: name.to_owned(),
        params: ParamBytes::new(params),
        args,
    }
}
