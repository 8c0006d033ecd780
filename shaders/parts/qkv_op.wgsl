// The op `qkv`: queries, keys and values of norm(x); keys rotated to their index in their block; keys and
// values stored in their slot. A quad is channels 2 i and 2 i + 1 of the first half of a head and their
// partners in the second: whole pairs of the rotation, whole words of the cache. First the query heads,
// then those of k, then those of v.
struct Params {
    n_rows: u32,
    k: u32,
    n_heads: u32,
    n_kv_heads: u32,
    head_dim: u32,
    count: u32,
    eps: f32,
    group: u32,
    tiled: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;         // [n_rows, k]
@group(0) @binding(2) var<storage, read> gamma: array<vec4<f32>>;     // [k]
@group(0) @binding(3) var<storage, read> weight: array<Weight8>;      // [(n_heads + 2 n_kv_heads) * HEAD_DIM, k]
@group(0) @binding(4) var<storage, read> scales: array<u32>;          // [.., k / group], or one element
@group(0) @binding(5) var<storage, read> bias: array<f32>;            // [(n_heads + 2 n_kv_heads) * HEAD_DIM]
@group(0) @binding(6) var<storage, read> angles: array<vec4<f32>>;    // [n, HEAD_DIM / 2, 2]: cos, sin
@group(0) @binding(7) var<storage, read> targets: array<vec2<u32>>;   // [n_rows]: slot, index in the block
@group(0) @binding(8) var<storage, read_write> q: array<vec2<f32>>;   // [n_rows, n_heads, HEAD_DIM]
@group(0) @binding(9) var<storage, read_write> keys: array<Kv2>;      // [n_slots, n_kv_heads, HEAD_DIM]
@group(0) @binding(10) var<storage, read_write> values: array<Kv2>;   // [n_slots, n_kv_heads, HEAD_DIM]

const NORM = 1u;
const HALF = HEAD_DIM / 4u; // Quads of a head; words of two channels in half a head.

fn n_quads() -> u32 {
    return (params.n_heads + 2u * params.n_kv_heads) * HALF;
}

fn quad_rows(quad: u32) -> vec4<u32> {
    let row = quad / HALF * HEAD_DIM + quad % HALF * 2u;
    return vec4<u32>(row, row + 1u, row + 2u * HALF, row + 2u * HALF + 1u);
}

fn finish(quad: u32, row: u32, sums: vec4<f32>) {
    let rows = quad_rows(quad);
    let v = sums + vec4<f32>(bias[rows.x], bias[rows.y], bias[rows.z], bias[rows.w]);
    let head = quad / HALF;
    let i = quad % HALF;
    if head < params.n_heads {
        let to = (row * params.n_heads + head) * HALF * 2u + i;
        q[to] = v.xy;
        q[to + HALF] = v.zw;
        return;
    }
    let place = targets[row];
    if head < params.n_heads + params.n_kv_heads {
        let angle = angles[place.y * HALF + i];
        let a = rope_rotate(v.x, v.z, angle.xy);
        let b = rope_rotate(v.y, v.w, angle.zw);
        let to = (place.x * params.n_kv_heads + head - params.n_heads) * HALF * 2u + i;
        keys[to] = kv2_store(vec2<f32>(a.x, b.x));
        keys[to + HALF] = kv2_store(vec2<f32>(a.y, b.y));
    } else {
        let to = (place.x * params.n_kv_heads + head - params.n_heads - params.n_kv_heads) * HALF * 2u + i;
        values[to] = kv2_store(v.xy);
        values[to + HALF] = kv2_store(v.zw);
    }
}
