// uses: dot8
// Gated projection: y[r, n] = silu(g) * u, g and u the rows n and n_out + n of the weight times x[r].
//
// A workgroup serves 8 outputs and COLS rows of x, one subgroup for each output: a lane reads eight
// weights of both rows at a time, once for all columns. A column's sum runs in the same order whatever
// COLS is.

struct Params {
    n_rows: u32,
    k: u32,
    n_out: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;         // [n_rows, k]
@group(0) @binding(2) var<storage, read> weight: array<Weight8>;      // [2 * n_out, k]
@group(0) @binding(3) var<storage, read> bias: array<f32>;            // [2 * n_out]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;         // [n_rows, n_out]

const OUT_PER_GROUP = 8u;

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
    for (var i = subgroup; i < OUT_PER_GROUP; i += num_subgroups) {
        let n = group.x * OUT_PER_GROUP + i;
        // An output behind the end computes output 0 and stores nothing: all lanes stay together.
        let gate_row = select(0u, n, n < params.n_out);
        let up_row = gate_row + params.n_out;
        var gates: array<f32, COLS>;
        var ups: array<f32, COLS>;
        for (var c = 0u; c < COLS; c++) {
            gates[c] = 0.0;
            ups[c] = 0.0;
        }
        for (var j = lane; j < width; j += subgroup_size) {
            let gate = weight[gate_row * width + j];
            let up = weight[up_row * width + j];
            for (var c = 0u; c < COLS; c++) {
                let row = min(first_row + c, params.n_rows - 1u);
                let at = (row * width + j) * 2u;
                let a = x[at];
                let b = x[at + 1u];
                gates[c] += dot8(gate, a, b);
                ups[c] += dot8(up, a, b);
            }
        }
        for (var c = 0u; c < COLS; c++) {
            let gate_sum = subgroupAdd(gates[c]);
            let up_sum = subgroupAdd(ups[c]);
            let row = first_row + c;
            if lane == 0u && n < params.n_out && row < params.n_rows {
                let g = gate_sum + bias[n];
                let u = up_sum + bias[params.n_out + n];
                y[row * params.n_out + n] = g / (1.0 + exp(-max(g, -80.0))) * u;
            }
        }
    }
}
