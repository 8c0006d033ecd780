// Gather: y[r, i] = x[r, order[i]] for i < count. One lane copies one number; what is behind a row's
// `count` is left alone.

struct Params {
    n_rows: u32,
    count: u32,
    cols: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;               // [n_rows, cols]
@group(0) @binding(2) var<storage, read> order: array<u32>;           // [count]
@group(0) @binding(3) var<storage, read_write> y: array<f32>;         // [n_rows, cols]

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
) {
    let i = group.x * 64u + local.x;
    if i < params.count {
        let row = group.y * params.cols;
        y[row + i] = x[row + order[i]];
    }
}
