// Pseudo-random contents: word i of y is made of a hash of (seed, i).
//
// Floats are `mean + unit * scale` with `unit` one of 2048 numbers in [-1, 1); codes are the hash, and codes of
// 8-bit floats those below 2 among them; words of scales are the float `scale`, made up to half as large again,
// with the zero point `low` in its last byte. A lane goes over the words that are a whole grid apart.

struct Params {
    n_words: u32,
    seed: u32,
    mean: f32,
    scale: f32,
    low: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> y: array<u32>;         // [n_words]

const F32 = 0u;
const F16 = 1u;
const BF16 = 2u;
const CODES = 3u;
const SCALES = 4u;
const FLOAT_CODES = 5u;

// One round of a multiplicative hash; every bit of the input reaches the upper half (PCG's output function).
fn hash(i: u32) -> u32 {
    let state = (i ^ params.seed) * 747796405u + 2891336453u;
    let word = ((state >> ((state >> 28u) + 4u)) ^ state) * 277803737u;
    return (word >> 22u) ^ word;
}

fn value(i: u32) -> f32 {
    let unit = f32(hash(i) >> 21u) / 1024.0 - 1.0;
    return params.mean + unit * params.scale;
}

// The upper half of an f32, rounded to nearest, ties to even.
fn upper(v: f32) -> u32 {
    let bits = bitcast<u32>(v);
    return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}

@compute @workgroup_size(64)
fn main(
    @builtin(global_invocation_id) at: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    for (var i = at.x; i < params.n_words; i += groups.x * 64u) {
        var word = hash(i);
        if KIND == F32 {
            word = bitcast<u32>(value(i));
        } else if KIND == F16 {
            word = pack2x16float(vec2<f32>(value(2u * i), value(2u * i + 1u)));
        } else if KIND == BF16 {
            word = upper(value(2u * i)) | (upper(value(2u * i + 1u)) << 16u);
        } else if KIND == SCALES {
            word = ((bitcast<u32>(params.scale) + ((word & 0x3fu) << 16u)) & 0xffffff00u) | params.low;
        } else if KIND == FLOAT_CODES {
            word &= 0xbfbfbfbfu;
        }
        y[i] = word;
    }
}
