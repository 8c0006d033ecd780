// uses: quad
// Projection head by head: y[r, h, n] = sum_k weight[h, n, k] * x[r, h, k].
//
// A workgroup serves a stretch of one head's outputs for up to COLS rows: a weight is read once for all of
// them. A subgroup serves a quad of outputs, as in `parts/columns.wgsl`; a row's sum runs in the same order
// whatever COLS is. Gaps stand in front of each half of a head: those of x are passed over, those of y are
// filled with the channels behind the k of x, by the first workgroup of each head.

struct Params {
    n_rows: u32,
    n_heads: u32,
    k: u32,
    n_out: u32,
    x_cols: u32,
    y_cols: u32,
    x_gap: u32,
    y_gap: u32,
    group: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;         // [n_rows, x_cols]
@group(0) @binding(2) var<storage, read> weight: array<Weight8>;      // [n_heads, n_out, k]
@group(0) @binding(3) var<storage, read> scales: array<u32>;          // [n_heads, n_out, k / group], or one element
@group(0) @binding(4) var<storage, read_write> y: array<f32>;         // [n_rows, y_cols]

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) num_subgroups: u32,
    @builtin(subgroup_size) lanes: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let head = group.z;
    let first = group.y * COLS;
    let x_wide = params.k + 2u * (params.x_gap + params.y_gap);
    let y_wide = params.n_out + 2u * params.y_gap;
    let width = params.k / 8u; // Runs of eight; halves have as many fours.
    let gap = params.x_gap / 4u;
    let span = WEIGHT_RUNS * WEIGHT_RUNS;
    let stride = (width + span - 1u) / span * WEIGHT_RUNS;
    let n_groups = (width + GROUP - 1u) / GROUP;
    let n_quads = (params.n_out + 3u) / 4u;

    for (var i = local; group.x == 0u && i < COLS * 2u * params.y_gap; i += 64u) {
        let row = first + i / (2u * params.y_gap);
        let c = i % (2u * params.y_gap);
        if row < params.n_rows {
            let source = row * params.x_cols + head * x_wide + params.k + c;
            let behind = select(params.n_out / 2u, 0u, c < params.y_gap);
            y[row * params.y_cols + head * y_wide + behind + c] = x[source / 4u][source % 4u];
        }
    }

    for (var i = subgroup; i < QUADS; i += num_subgroups) {
        let quad = group.x * QUADS + i;
        // A quad behind the end computes the last one and stores nothing: all lanes stay together.
        let four = min(min(quad, n_quads - 1u) * 4u + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(params.n_out - 1u));
        let rows = four + head * params.n_out;
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
                    let lo = 2u * at + gap * select(2u, 1u, 2u * at < width);
                    let hi = 2u * at + 1u + gap * select(2u, 1u, 2u * at + 1u < width);
                    for (var c = 0u; c < COLS; c++) {
                        let row = min(first + c, params.n_rows - 1u);
                        let mine = (row * params.x_cols + head * x_wide) / 4u;
                        sums[c] = quad_add(sums[c], q, x[mine + lo], x[mine + hi]);
                    }
                }
            }
        }
        for (var c = 0u; c < COLS; c++) {
            sums[c] = subgroupAdd(sums[c]);
        }
        for (var base = 0u; base < COLS; base += lanes) {
            var mine = vec4<f32>();
            for (var c = 0u; c < COLS; c++) {
                mine = select(mine, sums[c], c == base + lane);
            }
            let row = first + base + lane;
            if base + lane < COLS && row < params.n_rows && quad < n_quads {
                for (var o = 0u; o < 4u; o++) {
                    let n = quad * 4u + o;
                    if n < params.n_out {
                        let behind = params.y_gap * select(2u, 1u, n < params.n_out / 2u);
                        y[row * params.y_cols + head * y_wide + behind + n] = mine[o];
                    }
                }
            }
        }
    }
}
