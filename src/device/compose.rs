//! Puts a WGSL kernel together: prelude of constants, shared parts, element types, the file itself.
//!
//! No preprocessor: a part is prepended whole, an element type is a part with its name filled in.
//! Every line of the result knows the file it came from, so that errors point there.

use std::borrow::Cow;
use std::fmt::Write as _;

use super::op::Wgsl;
use super::{Caps, DType, Dispatch};
use crate::{Error, Result};

/// The parts that a kernel can name in its first line, `// uses: a, b`.
pub const PARTS: &[(&str, &str)] = &[
    (
        "softmax_state",
        include_str!("../../shaders/parts/softmax_state.wgsl"),
    ),
    ("rope", include_str!("../../shaders/parts/rope.wgsl")),
    ("quad", include_str!("../../shaders/parts/quad.wgsl")),
    (
        "norm_scale",
        include_str!("../../shaders/parts/norm_scale.wgsl"),
    ),
    ("columns", include_str!("../../shaders/parts/columns.wgsl")),
    ("tiles", include_str!("../../shaders/parts/tiles.wgsl")),
    ("matrix", include_str!("../../shaders/parts/matrix.wgsl")),
    (
        "project_op",
        include_str!("../../shaders/parts/project_op.wgsl"),
    ),
    (
        "gate_up_op",
        include_str!("../../shaders/parts/gate_up_op.wgsl"),
    ),
    ("qkv_op", include_str!("../../shaders/parts/qkv_op.wgsl")),
];

const ELEMENT_F32: &str = include_str!("../../shaders/parts/element_f32.wgsl");
const ELEMENT_F16: &str = include_str!("../../shaders/parts/element_f16.wgsl");
const ELEMENT_BF16: &str = include_str!("../../shaders/parts/element_bf16.wgsl");
const ELEMENT_U4: &str = include_str!("../../shaders/parts/element_u4.wgsl");
const ELEMENT_U8: &str = include_str!("../../shaders/parts/element_u8.wgsl");
const ELEMENT_F8: &str = include_str!("../../shaders/parts/element_f8.wgsl");

/// How the directives begin that WGSL wants before everything else.
const ENABLE: &str = "enable ";

/// The constant that brings the types of cooperative matrices of its size: `MatrixA`, `MatrixB`, `MatrixC`.
const MATRIX: &str = "MATRIX";

/// A composed shader and where its lines came from.
#[derive(Clone, Debug)]
pub struct Composed {
    /// The WGSL text.
    pub text: String,
    /// For each piece: its file, and its first line in `text`, from 1.
    pieces: Vec<(String, usize)>,
}

impl Composed {
    /// Appends a file. Its `enable` lines are left blank: they stand in the prelude.
    fn push(&mut self, file: &str, text: &str) {
        self.pieces
            .push((file.to_owned(), self.text.lines().count() + 1));
        for line in text.lines() {
            if !line.starts_with(ENABLE) {
                self.text.push_str(line);
            }
            self.text.push('\n');
        }
    }

    /// The file and line that a line of the composed text came from.
    pub fn origin(&self, line: usize) -> (&str, usize) {
        let piece = self.pieces.iter().rev().find(|(_, first)| *first <= line);
        piece.map_or(("", line), |(file, first)| {
            (file.as_str(), line - first + 1)
        })
    }

    /// Parses and validates the text with naga.
    ///
    /// # Errors
    /// [`Error::Shader`] with the file and line of the first problem.
    pub fn check(&self) -> Result<(naga::Module, naga::valid::ModuleInfo)> {
        let module = naga::front::wgsl::parse_str(&self.text).map_err(|e| {
            let line = e.location(&self.text).map_or(1, |l| l.line_number as usize);
            self.error(line, e.message())
        })?;
        let capabilities = naga::valid::Capabilities::SUBGROUP
            | naga::valid::Capabilities::SHADER_FLOAT16_IN_FLOAT32
            | naga::valid::Capabilities::SHADER_FLOAT16
            | naga::valid::Capabilities::COOPERATIVE_MATRIX;
        let mut validator =
            naga::valid::Validator::new(naga::valid::ValidationFlags::all(), capabilities);
        validator.subgroup_stages(naga::valid::ShaderStages::COMPUTE);
        validator.subgroup_operations(naga::valid::SubgroupOperationSet::all());
        let info = validator.validate(&module).map_err(|e| {
            let line = e.location(&self.text).map_or(1, |l| l.line_number as usize);
            let mut message = e.as_inner().to_string();
            let mut source = std::error::Error::source(e.as_inner());
            while let Some(inner) = source {
                message = format!("{message}: {inner}");
                source = inner.source();
            }
            self.error(line, &message)
        })?;
        Ok((module, info))
    }

    fn error(&self, line: usize, message: &str) -> Error {
        let (file, line) = self.origin(line);
        Error::Shader {
            file: file.to_owned(),
            line,
            message: message.to_owned(),
        }
    }
}

/// What the text of a kernel depends on, and therefore the key of its pipeline.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Variant {
    /// Constants of the prelude.
    pub consts: Vec<(&'static str, u32)>,
    /// Element types: name and storage type.
    pub elements: Vec<(&'static str, DType)>,
}

impl Variant {
    /// The variant of a kernel that a dispatch needs.
    pub fn of(wgsl: &Wgsl, dispatch: &Dispatch, caps: &Caps) -> Self {
        Self {
            consts: (wgsl.consts)(dispatch, caps),
            elements: wgsl
                .elements
                .iter()
                .map(|&(n, at)| (n, dispatch.args[at].dtype()))
                .collect(),
        }
    }
}

/// Composes the text of one variant of a kernel.
///
/// # Errors
/// [`Error::Shader`] if the first line names a part that does not exist.
///
/// # Panics
/// If an element type is [`DType::U32`].
pub fn compose(wgsl: &Wgsl, variant: &Variant) -> Result<Composed> {
    let mut pieces: Vec<(String, Cow<'static, str>)> = Vec::new();
    for (name, dtype) in &variant.elements {
        let (file, template) = match dtype {
            DType::F32 => ("shaders/parts/element_f32.wgsl", ELEMENT_F32),
            DType::F16 => ("shaders/parts/element_f16.wgsl", ELEMENT_F16),
            DType::BF16 => ("shaders/parts/element_bf16.wgsl", ELEMENT_BF16),
            DType::U4 => ("shaders/parts/element_u4.wgsl", ELEMENT_U4),
            DType::U8 => ("shaders/parts/element_u8.wgsl", ELEMENT_U8),
            DType::F8 => ("shaders/parts/element_f8.wgsl", ELEMENT_F8),
            DType::U32 => panic!("integers are no element type"),
        };
        let text = template
            .replace("Element", name)
            .replace("element", &name.to_lowercase())
            .replace("ELEMENT", &name.to_uppercase());
        pieces.push((file.to_owned(), text.into()));
    }
    let first = wgsl.source.lines().next().unwrap_or_default();
    let uses = first.strip_prefix("// uses:").unwrap_or_default();
    for name in uses.split(',').map(str::trim).filter(|n| !n.is_empty()) {
        let Some((_, text)) = PARTS.iter().find(|(part, _)| *part == name) else {
            let known: Vec<_> = PARTS.iter().map(|(n, _)| *n).collect();
            return Err(Error::Shader {
                file: wgsl.file.to_owned(),
                line: 1,
                message: format!("no part is called '{name}'; there are {}", known.join(", ")),
            });
        };
        pieces.push((format!("shaders/parts/{name}.wgsl"), (*text).into()));
    }
    pieces.push((wgsl.file.to_owned(), wgsl.source.into()));

    let mut out = Composed {
        text: String::new(),
        pieces: vec![("(prelude)".to_owned(), 1)],
    };
    let lines = pieces.iter().flat_map(|(_, text)| text.lines());
    for line in lines.filter(|line| line.starts_with(ENABLE)) {
        out.text.push_str(line);
        out.text.push('\n');
    }
    out.text.push_str("const NEG_LARGE = -3.0e38f;\n");
    for (name, value) in &variant.consts {
        // Writing to a string cannot fail.
        let _ = writeln!(out.text, "const {name} = {value}u;");
        if *name == MATRIX {
            for (role, number) in [("A", "f16"), ("B", "f16"), ("C", "f32")] {
                let ty = format!("coop_mat{value}x{value}<{number}, {role}>");
                let _ = writeln!(out.text, "alias Matrix{role} = {ty};");
            }
        }
    }
    for (file, text) in pieces {
        out.push(&file, &text);
    }
    Ok(out)
}
