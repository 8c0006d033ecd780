// A linear op by columns: each weight is read once for COLS rows of x.
//
// The op's own part gives bindings, `n_quads`, `quad_rows` (the four weight rows that make a quad) and
// `finish` (what becomes of a quad's four sums for one row of x). A subgroup serves a quad: a lane reads
// four loads of weights at a time and uses each for all columns, the lanes' sums meet in subgroupAdd, and
// lane c finishes column c. A column's sum runs in the same order whatever COLS is.
//
// With NORM, x is normalised on the way: `x * gamma` goes into the sums, and the squares that are added up
// beside them scale what comes out. No other dispatch writes a normalised row.
fn linear(group: vec3<u32>, subgroup: u32, num_subgroups: u32, lane: u32, lanes: u32) {
    let width = params.k / 8u; // Runs of eight in a row of x.
    let span = WEIGHT_RUNS * WEIGHT_RUNS;
    let stride = (width + span - 1u) / span * WEIGHT_RUNS; // Loads in a row of the weight.
    let n_groups = (width + GROUP - 1u) / GROUP;
    let first = group.y * COLS;
    for (var i = subgroup; i < QUADS; i += num_subgroups) {
        let quad = group.x * QUADS + i;
        // A quad behind the end computes the last one and stores nothing: all lanes stay together.
        let rows = quad_rows(min(quad, n_quads() - 1u));
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
                // Runs of neighbouring lanes alternate, so that neighbours read neighbouring x.
                let at = j / WEIGHT_RUNS * span + run * WEIGHT_RUNS + j % WEIGHT_RUNS;
                if at < width {
                    let q = quad_run(w, run, rows, at, n_groups);
                    for (var c = 0u; c < COLS; c++) {
                        let row = min(first + c, params.n_rows - 1u);
                        var a = x[(row * width + at) * 2u];
                        var b = x[(row * width + at) * 2u + 1u];
                        if NORM == 1u {
                            squares[c] += dot8(a, b, a, b);
                            a *= gamma[at * 2u];
                            b *= gamma[at * 2u + 1u];
                        }
                        sums[c] = quad_add(sums[c], q, a, b);
                    }
                }
            }
        }
        for (var c = 0u; c < COLS; c++) {
            sums[c] = subgroupAdd(sums[c]);
            if NORM == 1u {
                sums[c] *= norm_scale(subgroupAdd(squares[c]));
            }
        }
        for (var base = 0u; base < COLS; base += lanes) {
            var mine = vec4<f32>();
            for (var c = 0u; c < COLS; c++) {
                mine = select(mine, sums[c], c == base + lane);
            }
            let row = first + base + lane;
            if base + lane < COLS && row < params.n_rows && quad < n_quads() {
                finish(quad, row, mine);
            }
        }
    }
}
