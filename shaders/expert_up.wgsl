// uses: quad, norm_scale
// Gated projection by chosen experts: y[r, slot] = silu(g) * u, with g and u the rows n and n_out + n of the
// matrix of the expert that row r has chosen in that slot, times norm(x)[r].
//
// A workgroup serves a stretch of outputs of one expert for up to COLS rows of x. It looks up which of them
// chose the expert; where none did, it is done and reads nothing of the expert. Otherwise a weight is read
// once for all of those rows: a subgroup serves a quad, two rows of the gate and the two of up that belong
// to them, as in `gate_up`. A row's sum runs in the same order whoever else chose the expert.

struct Params {
    n_rows: u32,
    k: u32,
    n_out: u32,
    count: u32,
    eps: f32,
    group: u32,
    top_k: u32,
    first: u32,
    n_experts: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;         // [n_rows, k]
@group(0) @binding(2) var<storage, read> gamma: array<vec4<f32>>;     // [k]
@group(0) @binding(3) var<storage, read> weight: array<Weight8>;      // [n_experts, 2 * n_out, k]
@group(0) @binding(4) var<storage, read> scales: array<u32>;          // [n_experts, 2 * n_out, k / group], or one element
@group(0) @binding(5) var<storage, read> chosen: array<u32>;          // [n_rows, top_k]
@group(0) @binding(6) var<storage, read_write> y: array<f32>;         // [n_rows, top_k, n_out]

var<workgroup> slots: array<u32, COLS>; // Where in its row the expert stands, from 1; 0 if nowhere.
var<workgroup> n_takers: array<atomic<u32>, 1>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) num_subgroups: u32,
    @builtin(subgroup_size) lanes: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let first = group.y * COLS;
    for (var c = local; c < COLS; c += 64u) {
        slots[c] = 0u;
    }
    if local == 0u {
        atomicStore(&n_takers[0], 0u);
    }
    workgroupBarrier();
    for (var i = local; i < COLS * params.top_k; i += 64u) {
        let c = i / params.top_k;
        if first + c < params.n_rows && chosen[(first + c) * params.top_k + i % params.top_k] == params.first + group.z {
            slots[c] = i % params.top_k + 1u;
            atomicAdd(&n_takers[0], 1u);
        }
    }
    workgroupBarrier();
    if atomicLoad(&n_takers[0]) == 0u {
        return;
    }

    let width = params.k / 8u;
    let span = WEIGHT_RUNS * WEIGHT_RUNS;
    let stride = (width + span - 1u) / span * WEIGHT_RUNS;
    let n_groups = (width + GROUP - 1u) / GROUP;
    let n_quads = (params.n_out + 1u) / 2u;
    for (var i = subgroup; i < QUADS; i += num_subgroups) {
        let quad = group.x * QUADS + i;
        // A quad behind the end computes the last one and stores nothing: all lanes stay together.
        let n = min(min(quad, n_quads - 1u) * 2u + vec2<u32>(0u, 1u), vec2<u32>(params.n_out - 1u));
        let rows = vec4<u32>(n, n + params.n_out) + group.z * 2u * params.n_out;
        var sums: array<vec4<f32>, COLS>;
        var squares: array<f32, COLS>;
        for (var c = 0u; c < COLS; c++) {
            sums[c] = vec4<f32>();
            squares[c] = 0.0;
        }
        for (var j = lane; j < stride; j += lanes) {
            let w = array<Weight8, 4>(
                weight[rows.x * stride + j],
                weight[rows.y * stride + j],
                weight[rows.z * stride + j],
                weight[rows.w * stride + j],
            );
            for (var run = 0u; run < WEIGHT_RUNS; run++) {
                let at = j / WEIGHT_RUNS * span + run * WEIGHT_RUNS + j % WEIGHT_RUNS;
                if at < width {
                    let q = quad_run(w, run, rows, at, n_groups);
                    for (var c = 0u; c < COLS; c++) {
                        if slots[c] != 0u {
                            var a = x[((first + c) * width + at) * 2u];
                            var b = x[((first + c) * width + at) * 2u + 1u];
                            squares[c] += dot8(a, b, a, b);
                            a *= gamma[at * 2u];
                            b *= gamma[at * 2u + 1u];
                            sums[c] = quad_add(sums[c], q, a, b);
                        }
                    }
                }
            }
        }
        for (var c = 0u; c < COLS; c++) {
            let sum = subgroupAdd(sums[c]) * norm_scale(subgroupAdd(squares[c]));
            if lane == 0u && slots[c] != 0u && quad < n_quads {
                let to = ((first + c) * params.top_k + slots[c] - 1u) * params.n_out + quad * 2u;
                y[to] = sum.x / (1.0 + exp(-max(sum.x, -80.0))) * sum.z;
                if quad * 2u + 1u < params.n_out {
                    y[to + 1u] = sum.y / (1.0 + exp(-max(sum.y, -80.0))) * sum.w;
                }
            }
        }
    }
}
