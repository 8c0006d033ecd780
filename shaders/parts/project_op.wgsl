// The op `project`: y[r, first + n] = (y if add) + sum_k norm(x)[r, k] * weight[n, k] + bias[first + n].
// A quad is four rows of the weight below each other.
struct Params {
    n_rows: u32,
    k: u32,
    n_out: u32,
    y_cols: u32,
    first: u32,
    add: u32,
    norm: u32,
    count: u32,
    eps: f32,
    group: u32,
    tiled: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;         // [n_rows, k]
@group(0) @binding(2) var<storage, read> gamma: array<vec4<f32>>;     // [k], or one element without norm
@group(0) @binding(3) var<storage, read> weight: array<Weight8>;      // [n_out, k]
@group(0) @binding(4) var<storage, read> scales: array<u32>;          // [n_out, k / group], or one element
@group(0) @binding(5) var<storage, read> bias: array<f32>;            // [first + n_out]
@group(0) @binding(6) var<storage, read_write> y: array<f32>;         // [n_rows, y_cols]

fn n_quads() -> u32 {
    return (params.n_out + 3u) / 4u;
}

fn quad_rows(quad: u32) -> vec4<u32> {
    return min(vec4<u32>(quad * 4u) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(params.n_out - 1u));
}

fn finish(quad: u32, row: u32, sums: vec4<f32>) {
    for (var i = 0u; i < 4u; i++) {
        let n = quad * 4u + i;
        if n < params.n_out {
            let at = row * params.y_cols + params.first + n;
            let value = sums[i] + bias[params.first + n];
            if params.add == 1u {
                y[at] += value;
            } else {
                y[at] = value;
            }
        }
    }
}
