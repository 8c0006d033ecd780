//! The sampler against Hugging Face's processors.

use std::path::PathBuf;

use hogwild::sampler::Sampling;
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
