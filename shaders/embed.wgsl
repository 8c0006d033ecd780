// Embedding lookup: x[r] = table[tokens[r] - first].
//
// One workgroup copies one row, eight elements a lane at a time. A token that this piece of the table
// does not hold leaves its row alone.

struct Params {
    n_rows: u32,
    dim: u32,
    first: u32,
    n_table: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;              // [n_rows]
@group(0) @binding(2) var<storage, read> table: array<Weight8>;           // [n_table, dim]
@group(0) @binding(3) var<storage, read_write> x: array<vec4<f32>>;       // [n_rows, dim]

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
) {
    let token = tokens[group.x];
    if token >= params.first && token - params.first < params.n_table {
        let width = params.dim / 8u;
        let from_row = (token - params.first) * width;
        for (var i = local.x; i < width; i += 64u) {
            let v = table[from_row + i];
            let to = (group.x * width + i) * 2u;
            x[to] = weight8_lo(v);
            x[to + 1u] = weight8_hi(v);
        }
    }
}
