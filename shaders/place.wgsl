// uses: rope
// Placement of new tokens: norms q and k by head, rotates k to its index in its block, stores k and v.
//
// One workgroup serves one head of one row: first the query heads, then those of k, then those of v. A
// lane holds four channels, 2 l and 2 l + 1 of the first half and their partners in the second, so that
// it owns whole pairs of the rotation and whole words of the cache.

struct Params {
    n_rows: u32,
    n_heads: u32,
    n_kv_heads: u32,
    head_dim: u32,
    eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> qkv: array<vec2<f32>>;           // [n_rows, n_heads + 2 n_kv_heads, HEAD_DIM]
@group(0) @binding(2) var<storage, read> q_norm: array<vec2<f32>>;        // [HEAD_DIM]
@group(0) @binding(3) var<storage, read> k_norm: array<vec2<f32>>;        // [HEAD_DIM]
@group(0) @binding(4) var<storage, read> angles: array<vec4<f32>>;        // [n, HEAD_DIM / 2, 2]: cos, sin
@group(0) @binding(5) var<storage, read> targets: array<vec2<u32>>;       // [n_rows]: slot, index in the block
@group(0) @binding(6) var<storage, read_write> q: array<vec2<f32>>;       // [n_rows, n_heads, HEAD_DIM]
@group(0) @binding(7) var<storage, read_write> keys: array<Kv2>;          // [n_slots, n_kv_heads, HEAD_DIM]
@group(0) @binding(8) var<storage, read_write> values: array<Kv2>;        // [n_slots, n_kv_heads, HEAD_DIM]

const HALF = HEAD_DIM / 4u; // Words of two channels in half a head; at most 64.

var<workgroup> sums: array<f32, 64>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
) {
    let row = group.x;
    let head = group.y;
    let lane = local.x;
    let busy = lane < HALF;
    let n_qk = params.n_heads + params.n_kv_heads;
    let at = (row * (n_qk + params.n_kv_heads) + head) * HEAD_DIM / 2u + lane;
    var a = vec2<f32>();
    var b = vec2<f32>();
    if busy {
        a = qkv[at];
        b = qkv[at + HALF];
    }
    sums[lane] = dot(a, a) + dot(b, b);
    workgroupBarrier();
    if head < n_qk {
        var total = 0.0;
        for (var i = 0u; i < HALF; i++) {
            total += sums[i];
        }
        let scale = 1.0 / sqrt(total / f32(HEAD_DIM) + params.eps);
        if busy {
            if head < params.n_heads {
                a = a * scale * q_norm[lane];
                b = b * scale * q_norm[lane + HALF];
            } else {
                a = a * scale * k_norm[lane];
                b = b * scale * k_norm[lane + HALF];
            }
        }
    }
    if busy {
        let place = targets[row];
        if head < params.n_heads {
            let to = (row * params.n_heads + head) * HEAD_DIM / 2u + lane;
            q[to] = a;
            q[to + HALF] = b;
        } else if head < n_qk {
            let angle = angles[place.y * HALF + lane];
            let first = rope_rotate(a.x, b.x, angle.xy);
            let second = rope_rotate(a.y, b.y, angle.zw);
            let to = (place.x * params.n_kv_heads + head - params.n_heads) * HEAD_DIM / 2u + lane;
            keys[to] = kv2_store(vec2<f32>(first.x, second.x));
            keys[to + HALF] = kv2_store(vec2<f32>(first.y, second.y));
        } else {
            let to = (place.x * params.n_kv_heads + head - n_qk) * HEAD_DIM / 2u + lane;
            values[to] = kv2_store(a);
            values[to + HALF] = kv2_store(b);
        }
    }
}
