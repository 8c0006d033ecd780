//! Every shader, composed and validated with naga: no GPU is needed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use hogwild::device::{
    Access, Caps, DType, Kernel, Op, PARTS, Run, Variant, Wgsl, compose, reflect,
};
use hogwild::ops::OPS;

fn shaders() -> impl Iterator<Item = (&'static Op, &'static Kernel, &'static Wgsl)> {
    OPS.iter().flat_map(|op| {
        op.kernels
            .iter()
            .filter_map(move |kernel| match &kernel.run {
                Run::Wgsl(wgsl) => Some((*op, kernel, wgsl)),
                Run::Cpu(_) => None,
            })
    })
}

/// Variants of a shader: every element type, with the constants of every case.
fn variants(op: &Op, wgsl: &Wgsl) -> Vec<Variant> {
    let cpu = hogwild::device::Device::cpu();
    let mut out: Vec<Variant> = Vec::new();
    for case in (op.cases)() {
        let args = case
            .args
            .iter()
            .map(|a| cpu.tensor(&a.shape, a.dtype).unwrap())
            .collect();
        // The op is static in OPS; a dispatch needs it as such.
        let op = OPS.iter().find(|o| o.name == op.name).unwrap();
        let dispatch = hogwild::device::Dispatch {
            op,
            params: case.params,
            args,
        };
        // Subgroups as NVIDIA has them, and as llvmpipe has them.
        let caps = [(32, 16), (8, 8)].map(|(lanes, matrix)| Caps {
            subgroup: (lanes, lanes),
            matrix,
            ..Caps::cpu()
        });
        let all = caps.map(|caps| Variant::of(wgsl, &dispatch, &caps));
        let floats = [DType::F32, DType::F16, DType::BF16].map(|dtype| {
            let mut variant = all[0].clone();
            for element in &mut variant.elements {
                element.1 = dtype;
            }
            variant
        });
        for variant in all.into_iter().chain(floats) {
            if !out.contains(&variant) {
                out.push(variant);
            }
        }
    }
    out
}

#[test]
fn every_shader_is_valid_in_every_variant_and_declares_what_its_op_does() {
    let mut count = 0;
    for (op, kernel, wgsl) in shaders() {
        for variant in variants(op, wgsl) {
            let name = format!("{} / {} / {variant:?}", op.name, kernel.name);
            let composed = compose(wgsl, &variant).unwrap();
            let found = reflect(&composed).unwrap_or_else(|e| panic!("{name}: {e}"));
            let params: Vec<_> = (0u32..)
                .zip(op.params)
                .map(|(i, &n)| (n.to_owned(), 4 * i))
                .collect();
            assert_eq!(found.params, params, "{name}: params");
            assert_eq!(
                found.params_size as usize,
                4 * op.params.len(),
                "{name}: size of the params"
            );
            let args: Vec<_> = op
                .args
                .iter()
                .map(|&(n, a)| (n.to_owned(), a != Access::Read))
                .collect();
            assert_eq!(found.args, args, "{name}: arguments");
            assert!(
                found.workgroup_bytes <= 32 * 1024,
                "{name}: {} bytes",
                found.workgroup_bytes
            );
            assert!(
                found.args.len() <= 10,
                "{name}: more storage buffers than SwiftShader has"
            );
            count += 1;
        }
    }
    assert!(count > 40, "only {count} variants");
}

#[test]
fn params_in_rust_have_the_size_that_the_op_declares() {
    for op in OPS {
        for case in (op.cases)() {
            assert_eq!(
                case.params.as_bytes().len(),
                4 * op.params.len(),
                "{}: {}",
                op.name,
                case.name
            );
        }
    }
}

#[test]
fn every_shader_opens_with_a_comment_that_says_what_it_computes() {
    for (op, _, wgsl) in shaders() {
        let prose = wgsl
            .source
            .lines()
            .take_while(|l| l.starts_with("//"))
            .count();
        assert!(
            prose >= 2 || wgsl.source.starts_with("// Row"),
            "{}: {}",
            op.name,
            wgsl.file
        );
    }
}

#[test]
fn every_file_of_the_folder_is_used() {
    let mut used: Vec<String> = shaders().map(|(_, _, w)| w.file.to_owned()).collect();
    for file in &used {
        assert!(
            std::fs::exists(file).unwrap(),
            "{file} is named, but is no file"
        );
    }
    let part = |name: &str| format!("shaders/parts/{name}.wgsl");
    used.extend(PARTS.iter().map(|(name, _)| part(name)));
    used.extend(["f32", "f16", "bf16", "u4", "u8", "f8"].map(|t| part(&format!("element_{t}"))));
    for folder in [
        "shaders",
        "shaders/parts",
        "shaders/tiles",
        "shaders/matrix",
    ] {
        for file in std::fs::read_dir(folder).unwrap() {
            let name = format!("{folder}/{}", file.unwrap().file_name().to_string_lossy());
            assert!(
                std::path::Path::new(&name)
                    .extension()
                    .is_none_or(|e| e != "wgsl")
                    || used.contains(&name),
                "{name} is not used"
            );
        }
    }
}

#[test]
fn an_error_names_the_file_and_the_line() {
    let broken = |source| Wgsl {
        file: "where/it/lies/mine.wgsl",
        source,
        consts: |_, _| Vec::new(),
        elements: &[],
        groups: |_, _| [1, 1, 1],
        loads: None,
    };
    let variant = Variant {
        consts: vec![("N", 4)],
        elements: vec![("Weight", DType::F16)],
    };
    let error = |source| {
        let composed = compose(&broken(source), &variant);
        composed
            .and_then(|c| c.check().map(|_| ()))
            .unwrap_err()
            .to_string()
    };
    let syntax = error("// uses: rope\nfn f() {\n    let x = 1 +;\n}\n");
    assert!(
        syntax.starts_with("where/it/lies/mine.wgsl:3: "),
        "{syntax}"
    );
    let types = error("// A comment.\n\nfn f() -> u32 {\n    return 1.5f;\n}\n");
    assert!(types.starts_with("where/it/lies/mine.wgsl:"), "{types}");
    let part = error("// uses: nothing_of_that_name\n");
    assert!(part.starts_with("where/it/lies/mine.wgsl:1: "), "{part}");
    assert!(
        part.contains("nothing_of_that_name") && part.contains("rope"),
        "{part}"
    );
}
