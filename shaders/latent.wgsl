// uses: rope
// Placement of latents: norms the first dim channels of x, rotates the others to their index in their
// block, stores both in their slot: half of the rotated channels in front of each half of the latent.
//
// One workgroup serves one row; a lane owns whole words of the cache, two channels each.

struct Params {
    n_rows: u32,
    dim: u32,
    count: u32,
    gap: u32,
    eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec2<f32>>;             // [n_rows, dim + 2 gap]
@group(0) @binding(2) var<storage, read> gamma: array<vec2<f32>>;         // [dim]
@group(0) @binding(3) var<storage, read> angles: array<vec4<f32>>;        // [n, gap, 2]: cos, sin
@group(0) @binding(4) var<storage, read> targets: array<vec2<u32>>;       // [n_rows]: slot, index in the block
@group(0) @binding(5) var<storage, read_write> keys: array<Kv2>;          // [n_slots, dim + 2 gap]

var<workgroup> sums: array<f32, 64>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
) {
    let n = params.dim / 2u; // Words of the latent, and of half the rotated channels.
    let gap = params.gap / 2u;
    let row = group.x * (n + 2u * gap);
    var sum = 0.0;
    for (var i = local.x; i < n; i += 64u) {
        sum += dot(x[row + i], x[row + i]);
    }
    sums[local.x] = sum;
    workgroupBarrier();
    var total = 0.0;
    for (var i = 0u; i < 64u; i++) {
        total += sums[i];
    }
    let scale = 1.0 / sqrt(total / f32(params.count) + params.eps);
    let place = targets[group.x];
    let to = place.x * (n + 2u * gap);
    for (var i = local.x; i < n; i += 64u) {
        let behind = select(2u * gap, gap, i < n / 2u);
        keys[to + behind + i] = kv2_store(x[row + i] * scale * gamma[i]);
    }
    for (var i = local.x; i < gap; i += 64u) {
        let a = x[row + n + i];
        let b = x[row + n + gap + i];
        let angle = angles[place.y * gap + i];
        let first = rope_rotate(a.x, b.x, angle.xy);
        let second = rope_rotate(a.y, b.y, angle.zw);
        keys[to + i] = kv2_store(vec2<f32>(first.x, second.x));
        keys[to + gap + n / 2u + i] = kv2_store(vec2<f32>(first.y, second.y));
    }
}
