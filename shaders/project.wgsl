// uses: dot8
// Projection: y[r, first + n] = (y if add) + sum_k x[r, k] * weight[n, k] + bias[first + n].
//
// A workgroup serves 8 rows of the weight and COLS rows of x, one subgroup for each weight row: a lane
// reads eight weights at a time, once for all columns, and the lanes' sums meet in subgroupAdd. A
// column's sum runs in the same order whatever COLS is.

struct Params {
    n_rows: u32,
    k: u32,
    n_out: u32,
    y_cols: u32,
    first: u32,
    add: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;         // [n_rows, k]
@group(0) @binding(2) var<storage, read> weight: array<Weight8>;      // [n_out, k]
@group(0) @binding(3) var<storage, read> bias: array<f32>;            // [first + n_out]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;         // [n_rows, y_cols]

const ROWS_PER_GROUP = 8u;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) num_subgroups: u32,
    @builtin(subgroup_size) subgroup_size: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let width = params.k / 8u;
    let first_row = group.y * COLS;
    for (var i = subgroup; i < ROWS_PER_GROUP; i += num_subgroups) {
        let n = group.x * ROWS_PER_GROUP + i;
        // A row behind the end computes row 0 and stores nothing: all lanes stay together.
        let weight_row = select(0u, n, n < params.n_out) * width;
        var sums: array<f32, COLS>;
        for (var c = 0u; c < COLS; c++) {
            sums[c] = 0.0;
        }
        for (var j = lane; j < width; j += subgroup_size) {
            let w = weight[weight_row + j];
            for (var c = 0u; c < COLS; c++) {
                let row = min(first_row + c, params.n_rows - 1u);
                let at = (row * width + j) * 2u;
                sums[c] += dot8(w, x[at], x[at + 1u]);
            }
        }
        for (var c = 0u; c < COLS; c++) {
            let sum = subgroupAdd(sums[c]);
            let row = first_row + c;
            if lane == 0u && n < params.n_out && row < params.n_rows {
                let out = params.first + n;
                let at = row * params.y_cols + out;
                let value = sum + bias[out];
                if params.add == 1u {
                    y[at] += value;
                } else {
                    y[at] = value;
                }
            }
        }
    }
}
