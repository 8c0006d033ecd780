// The op `gate_up`: y[r, n] = silu(g) * u, g and u the rows n and n_out + n of the weight times norm(x)[r].
// A quad is two rows of the gate and the two of up that belong to them.
struct Params {
    n_rows: u32,
    k: u32,
    n_out: u32,
    count: u32,
    eps: f32,
    group: u32,
    tiled: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;         // [n_rows, k]
@group(0) @binding(2) var<storage, read> gamma: array<vec4<f32>>;     // [k]
@group(0) @binding(3) var<storage, read> weight: array<Weight8>;      // [2 * n_out, k]
@group(0) @binding(4) var<storage, read> scales: array<u32>;          // [2 * n_out, k / group], or one element
@group(0) @binding(5) var<storage, read> bias: array<f32>;            // [2 * n_out]
@group(0) @binding(6) var<storage, read_write> y: array<f32>;         // [n_rows, n_out]

const NORM = 1u;

fn n_quads() -> u32 {
    return (params.n_out + 1u) / 2u;
}

fn quad_rows(quad: u32) -> vec4<u32> {
    let n = min(vec2<u32>(quad * 2u, quad * 2u + 1u), vec2<u32>(params.n_out - 1u));
    return vec4<u32>(n, n + vec2<u32>(params.n_out));
}

fn finish(quad: u32, row: u32, sums: vec4<f32>) {
    for (var i = 0u; i < 2u; i++) {
        let n = quad * 2u + i;
        if n < params.n_out {
            let g = sums[i] + bias[n];
            let u = sums[i + 2u] + bias[params.n_out + n];
            y[row * params.n_out + n] = g / (1.0 + exp(-max(g, -80.0))) * u;
        }
    }
}
