//! The sampler against Hugging Face's processors, and the devices against the sampler.

#[path = "common/adapter.rs"]
mod adapter;

use std::path::PathBuf;

use hogwild::device::{DType, Device, Recording};
use hogwild::ops::sample::{NONE, mask, sample};
use hogwild::sampler::{Sampling, philox};
use safetensors::SafeTensors;

#[test]
#[allow(clippy::cast_possible_truncation, reason = "values of a golden file")]
fn probabilities_are_those_of_hugging_face() {
    // `HOGWILD_GOLDEN_DIR` where it has such a case, else the committed one.
    let other =
        std::env::var_os("HOGWILD_GOLDEN_DIR").map(|dir| PathBuf::from(dir).join("sampling"));
    let dir = other
        .filter(|dir| dir.exists())
        .unwrap_or_else(|| "tests/golden/sampling".into());
    let script = std::fs::read_to_string(dir.join("script.json")).expect("the golden case");
    let script: serde_json::Value = serde_json::from_str(&script).expect("JSON");
    let bytes = std::fs::read(dir.join("expected.safetensors")).expect("the golden case");
    let tensors = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let floats = |name: &str| -> Vec<f32> {
        let tensor = tensors.tensor(name).expect("a tensor of the case");
        let chunks = tensor.data().chunks_exact(4);
        chunks
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect()
    };
    let logits = floats("logits");
    let cases = script["cases"].as_array().expect("cases");
    for case in cases {
        let name = case["name"].as_str().expect("a name");
        let number = |key: &str, default: f64| case[key].as_f64().unwrap_or(default);
        let sampling = Sampling {
            temperature: number("temperature", 1.0) as f32,
            top_k: case["top_k"].as_u64().unwrap_or(0) as usize,
            top_p: number("top_p", 1.0) as f32,
            min_p: number("min_p", 0.0) as f32,
            ..Sampling::default()
        };
        sampling.check().expect("sound values");
        let ids = case["suppressed"].as_array().expect("ids");
        let suppressed: Vec<u32> = ids
            .iter()
            .map(|id| id.as_u64().expect("an id") as u32)
            .collect();
        let want = floats(name);
        let kept = case["kept"].as_array().expect("counts");
        for (row, (logits, want)) in logits.chunks(512).zip(want.chunks(512)).enumerate() {
            let got = sampling.probabilities(logits, &suppressed);
            for (id, (g, w)) in got.iter().zip(want).enumerate() {
                let off = (g - w).abs();
                assert!(
                    off <= 1e-5,
                    "{name}, row {row}, id {id}: {g} instead of {w}"
                );
            }
            let n = want.iter().filter(|p| **p > 0.0).count() as u64;
            assert_eq!(
                Some(n),
                kept[row].as_u64(),
                "{name}, row {row}: the case itself"
            );
            let chosen = sampling
                .sample(logits, &suppressed, 0, row as u64)
                .expect("finite logits");
            assert!(
                want[chosen as usize] > 0.0,
                "{name}, row {row}: {chosen} was cut"
            );
        }
    }
    assert_eq!(cases.len(), 6, "all cases");
}

/// A stream of pseudo-random numbers.
struct Numbers(u32);

impl Numbers {
    fn next(&mut self) -> u32 {
        self.0 += 1;
        philox([self.0, 0, 0, 0], [16, 1992])[0]
    }

    fn below(&mut self, n: u32) -> u32 {
        self.next() % n
    }

    fn unit(&mut self) -> f32 {
        (self.next() >> 8) as f32 / (1 << 24) as f32
    }

    /// One of a few values that a person may give, or any other.
    fn setting(&mut self, usual: [f32; 3]) -> f32 {
        match self.below(4) {
            3 => self.unit(),
            at => usual[at as usize],
        }
    }
}

/// Random rows under random settings, on a device: the ids are those of the sampler, all of them.
fn ids_are_those_of_the_sampler(device: &Device) {
    let mut numbers = Numbers(0);
    let (mut n_tokens, mut n_none) = (0, 0);
    for round in 0..150 {
        let vocab = [1, 3, 31, 64, 257, 1757, 4096, 9001][numbers.below(8) as usize];
        let n_rows = 1 + numbers.below(4) as usize;
        let sampling = Sampling {
            temperature: 2.0 * numbers.setting([0.5, 0.3, 0.0]),
            top_k: [0, 1, 20, 40, 256, 300][numbers.below(6) as usize],
            top_p: numbers.setting([1.0, 0.95, 0.0]),
            min_p: numbers.setting([0.0, 0.05, 0.0]).min(0.5),
            seed: 5,
            limit: (numbers.below(3) == 0).then_some(vocab / 2 + 1),
        };
        sampling.check().expect("sound values");
        let suppressed: Vec<u32> = (0..numbers.below(4))
            .map(|_| numbers.below(u32::try_from(vocab).expect("small")))
            .collect();
        // Smooth, in steps with many ties, and peaked.
        let kind = numbers.below(3);
        let mut logit = || match kind {
            0 => numbers.unit() * 30.0 - 15.0,
            1 => (numbers.unit() * 12.0).floor() * 0.75,
            _ => -(numbers.unit() * 1e4 + 1.0).ln() * 6.0,
        };
        let mut logits: Vec<f32> = (0..n_rows * vocab).map(|_| logit()).collect();
        for _ in 0..numbers.below(3) {
            let at = numbers.below(u32::try_from(logits.len()).expect("small")) as usize;
            let odd = [f32::NEG_INFINITY, -0.0, f32::MIN, 1e-42, f32::NAN, 15.0];
            logits[at] = odd[numbers.below(6) as usize];
        }
        let draws: Vec<u64> = (0..n_rows).map(|row| sampling.draw(row, round)).collect();
        let upload = |shape: &[usize], dtype, words: &[u32]| {
            device.upload(shape, dtype, words).expect("it fits")
        };
        let bits: Vec<u32> = logits.iter().map(|l| l.to_bits()).collect();
        let on_device = upload(&[n_rows, vocab], DType::F32, &bits);
        let mask = mask(&suppressed, vocab);
        let mask = upload(&[mask.len()], DType::U32, &mask);
        let draws = upload(&[n_rows, 2], DType::U32, bytemuck::cast_slice(&draws));
        let ids = upload(&[n_rows], DType::U32, &vec![7; n_rows]);
        let mut recording = Recording::default();
        let rule = sampling.rule();
        sample(
            &mut recording,
            &rule,
            &on_device,
            [&mask, &draws],
            &ids,
            n_rows,
        );
        device.play(&recording).expect("it plays");
        let got = device.read(&ids, 0, 4 * n_rows).expect("it is read");
        let got: &[u32] = &bytemuck::pod_collect_to_vec::<u8, u32>(&got);
        for (row, logits) in logits.chunks(vocab).enumerate() {
            let want = sampling.sample(logits, &suppressed, row, round);
            assert_eq!(
                got[row],
                want.unwrap_or(NONE),
                "round {round}, row {row} of {n_rows}, {vocab} tokens: {sampling:?}"
            );
            n_tokens += 1;
            n_none += usize::from(want.is_none());
        }
    }
    assert!(n_tokens > 300, "only {n_tokens} tokens were compared");
    assert!(
        n_none > 5 && n_none < n_tokens / 4,
        "{n_none} of {n_tokens} are none"
    );
}

#[test]
fn the_cpu_chooses_what_the_sampler_does() {
    ids_are_those_of_the_sampler(&Device::cpu());
}

#[test]
fn the_adapter_chooses_what_the_sampler_does() {
    if let Some(device) = adapter::adapter() {
        ids_are_those_of_the_sampler(&device);
    }
}
