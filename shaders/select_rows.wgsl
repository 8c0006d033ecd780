// Row selection: y[i] = x[rows[i]]. One workgroup copies one row.

struct Params {
    n_rows: u32,
    dim: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> rows: array<u32>;            // [n_rows]
@group(0) @binding(2) var<storage, read> x: array<f32>;               // [n, dim]
@group(0) @binding(3) var<storage, read_write> y: array<f32>;         // [n_rows, dim]

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
) {
    let row = rows[group.x];
    for (var i = local.x; i < params.dim; i += 64u) {
        y[group.x * params.dim + i] = x[row * params.dim + i];
    }
}
