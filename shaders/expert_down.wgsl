// uses: quad
// Projection by chosen experts, added: y[r, n] += sum over slots of gates[r, slot] * (matrix of the expert
// in that slot)[n] times x[r, slot].
//
// A workgroup serves a stretch of outputs for up to COLS rows, over all experts that any of them chose, in
// ascending order: a weight is read once for all rows that chose its expert, and nothing is read of the
// others. A subgroup serves a quad of outputs. A row's sum runs over its own experts alone, in their order.

struct Params {
    n_rows: u32,
    k: u32,
    n_out: u32,
    group: u32,
    top_k: u32,
    first: u32,
    n_experts: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;         // [n_rows, top_k, k]
@group(0) @binding(2) var<storage, read> weight: array<Weight8>;      // [n_experts, n_out, k]
@group(0) @binding(3) var<storage, read> scales: array<u32>;          // [n_experts, n_out, k / group], or one element
@group(0) @binding(4) var<storage, read> chosen: array<u32>;          // [n_rows, top_k]
@group(0) @binding(5) var<storage, read> gates: array<f32>;           // [n_rows, top_k]
@group(0) @binding(6) var<storage, read_write> y: array<f32>;         // [n_rows, n_out]

var<workgroup> takers: array<atomic<u32>, EXPERTS>; // For each expert the rows that chose it, a bit each.
var<workgroup> slots: array<u32, COLS>; // The slot of each row whose turn comes next.

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
    for (var e = local; e < EXPERTS; e += 64u) {
        atomicStore(&takers[e], 0u);
    }
    for (var c = local; c < COLS; c += 64u) {
        // Slots of experts below this piece's first come before.
        slots[c] = 0u;
        if first + c < params.n_rows {
            for (var i = 0u; i < params.top_k; i++) {
                slots[c] += select(0u, 1u, chosen[(first + c) * params.top_k + i] < params.first);
            }
        }
    }
    workgroupBarrier();
    for (var i = local; i < COLS * params.top_k; i += 64u) {
        let c = i / params.top_k;
        if first + c < params.n_rows {
            let e = chosen[(first + c) * params.top_k + i % params.top_k] - params.first;
            // Below the first, the difference wraps and is large.
            if e < params.n_experts {
                atomicOr(&takers[e], 1u << c);
            }
        }
    }
    workgroupBarrier();

    let width = params.k / 8u;
    let span = WEIGHT_RUNS * WEIGHT_RUNS;
    let stride = (width + span - 1u) / span * WEIGHT_RUNS;
    let n_groups = (width + GROUP - 1u) / GROUP;
    let n_quads = (params.n_out + 3u) / 4u;
    for (var i = subgroup; i < QUADS; i += num_subgroups) {
        let quad = group.x * QUADS + i;
        // A quad behind the end computes the last one and stores nothing: all lanes stay together.
        let four = min(min(quad, n_quads - 1u) * 4u + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(params.n_out - 1u));
        var totals: array<vec4<f32>, COLS>;
        var slot: array<u32, COLS>;
        for (var c = 0u; c < COLS; c++) {
            totals[c] = vec4<f32>();
            slot[c] = slots[c];
        }
        for (var e = 0u; e < params.n_experts; e++) {
            let mask = atomicLoad(&takers[e]);
            if mask == 0u {
                continue;
            }
            let rows = four + e * params.n_out;
            var sums: array<vec4<f32>, COLS>;
            for (var c = 0u; c < COLS; c++) {
                sums[c] = vec4<f32>();
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
                            if (mask >> c & 1u) == 1u {
                                let x_row = (first + c) * params.top_k + slot[c];
                                let a = x[(x_row * width + at) * 2u];
                                let b = x[(x_row * width + at) * 2u + 1u];
                                sums[c] = quad_add(sums[c], q, a, b);
                            }
                        }
                    }
                }
            }
            for (var c = 0u; c < COLS; c++) {
                if (mask >> c & 1u) == 1u {
                    let gate = gates[(first + c) * params.top_k + slot[c]];
                    totals[c] = fma(sums[c], vec4<f32>(gate), totals[c]);
                    slot[c]++;
                }
            }
        }
        for (var c = 0u; c < COLS; c++) {
            let total = subgroupAdd(totals[c]);
            if lane == 0u && first + c < params.n_rows && quad < n_quads {
                for (var n = 0u; n < 4u; n++) {
                    if quad * 4u + n < params.n_out {
                        y[(first + c) * params.n_out + quad * 4u + n] += total[n];
                    }
                }
            }
        }
    }
}
