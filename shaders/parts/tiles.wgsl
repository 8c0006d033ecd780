// A linear op by tiles: for the many rows of a prefill, where a weight serves 32 rows of x at once.
//
// The op's own part gives bindings, `n_quads`, `quad_rows` (the four weight rows that make a quad) and
// `finish` (what becomes of a quad's four sums for one row of x). A workgroup serves 16 quads and 32 rows
// of x: 64 weights of each row and as many numbers of x come to workgroup memory, then a lane adds up its
// own quad for eight rows of x. A sum runs along k in order, so that a row's bits depend on no other row.
//
// With NORM, x is normalised on the way: `x * gamma` goes into the sums, and the squares that are added up
// beside them scale what comes out.
const TILE_QUADS = 16u;
const TILE_ROWS = 32u;
const STEP = 8u; // Runs of eight along k that are in workgroup memory at once.
const FOURS = TILE_ROWS / 4u;

var<workgroup> tile_weight: array<vec4<f32>, STEP * 8u * TILE_QUADS>; // [k, quad]: the quad's four rows
var<workgroup> tile_x: array<vec4<f32>, STEP * 8u * FOURS>; // [k, row / 4]: four rows of x
var<workgroup> tile_squares: array<vec4<f32>, 64>;

fn linear(group: vec3<u32>, local: u32) {
    let width = params.k / 8u; // Runs of eight in a row of x.
    let span = WEIGHT_RUNS * WEIGHT_RUNS;
    let stride = (width + span - 1u) / span * WEIGHT_RUNS; // Loads in a row of the weight.
    let n_groups = (width + GROUP - 1u) / GROUP;
    let first = group.y * TILE_ROWS;
    let my_quad = local % TILE_QUADS;
    let my_rows = local / TILE_QUADS * 2u; // In fours.
    var sums: array<vec4<f32>, 8>;
    for (var i = 0u; i < 8u; i++) {
        sums[i] = vec4<f32>();
    }
    // A lane brings one run of four rows of x.
    let four = local % FOURS;
    let x_rows = min(vec4<u32>(first + four * 4u) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(params.n_rows - 1u));
    var squares = vec4<f32>();

    for (var base = 0u; base < width; base += STEP) {
        for (var i = local; i < TILE_QUADS * STEP; i += 64u) {
            let quad = i % TILE_QUADS;
            let at = base + i / TILE_QUADS;
            let rows = quad_rows(min(group.x * TILE_QUADS + quad, n_quads() - 1u));
            let j = at / span * WEIGHT_RUNS + at % WEIGHT_RUNS;
            let run = at % span / WEIGHT_RUNS;
            var lo: array<vec4<f32>, 4>;
            var hi: array<vec4<f32>, 4>;
            for (var r = 0u; r < 4u; r++) {
                var s = 0u;
                var scale = 1.0;
                if WEIGHT_CODED {
                    s = scales[rows[r] * n_groups + min(at, width - 1u) / GROUP];
                    scale = bitcast<f32>(s & WEIGHT_SCALE);
                }
                let w = weight[rows[r] * stride + min(j, stride - 1u)];
                lo[r] = weight_run_lo(w, run, s) * scale;
                hi[r] = weight_run_hi(w, run, s) * scale;
            }
            let to = i / TILE_QUADS * 8u * TILE_QUADS + quad;
            for (var d = 0u; d < 4u; d++) {
                tile_weight[to + d * TILE_QUADS] = vec4<f32>(lo[0][d], lo[1][d], lo[2][d], lo[3][d]);
                tile_weight[to + (d + 4u) * TILE_QUADS] = vec4<f32>(hi[0][d], hi[1][d], hi[2][d], hi[3][d]);
            }
        }
        let at = base + local / FOURS;
        var a: array<vec4<f32>, 4>;
        var b: array<vec4<f32>, 4>;
        for (var r = 0u; r < 4u; r++) {
            a[r] = vec4<f32>();
            b[r] = vec4<f32>();
            if at < width {
                a[r] = x[(x_rows[r] * width + at) * 2u];
                b[r] = x[(x_rows[r] * width + at) * 2u + 1u];
                if NORM == 1u {
                    squares[r] += dot8(a[r], b[r], a[r], b[r]);
                    a[r] *= gamma[at * 2u];
                    b[r] *= gamma[at * 2u + 1u];
                }
            }
        }
        let to = local / FOURS * 8u * FOURS + four;
        for (var d = 0u; d < 4u; d++) {
            tile_x[to + d * FOURS] = vec4<f32>(a[0][d], a[1][d], a[2][d], a[3][d]);
            tile_x[to + (d + 4u) * FOURS] = vec4<f32>(b[0][d], b[1][d], b[2][d], b[3][d]);
        }
        workgroupBarrier();
        // A sum of short sums errs less than one long chain.
        var short: array<vec4<f32>, 8>;
        for (var i = 0u; i < 8u; i++) {
            short[i] = vec4<f32>();
        }
        for (var k = 0u; k < STEP * 8u; k++) {
            let w = tile_weight[k * TILE_QUADS + my_quad];
            let lo = tile_x[k * FOURS + my_rows];
            let hi = tile_x[k * FOURS + my_rows + 1u];
            short[0] = fma(w, vec4<f32>(lo.x), short[0]);
            short[1] = fma(w, vec4<f32>(lo.y), short[1]);
            short[2] = fma(w, vec4<f32>(lo.z), short[2]);
            short[3] = fma(w, vec4<f32>(lo.w), short[3]);
            short[4] = fma(w, vec4<f32>(hi.x), short[4]);
            short[5] = fma(w, vec4<f32>(hi.y), short[5]);
            short[6] = fma(w, vec4<f32>(hi.z), short[6]);
            short[7] = fma(w, vec4<f32>(hi.w), short[7]);
        }
        for (var i = 0u; i < 8u; i++) {
            sums[i] += short[i];
        }
        workgroupBarrier();
    }
    tile_squares[local] = squares;
    workgroupBarrier();
    let quad = group.x * TILE_QUADS + my_quad;
    for (var i = 0u; i < 8u; i++) {
        let c = my_rows * 4u + i;
        var total = sums[i];
        if NORM == 1u {
            var all = 0.0;
            for (var j = 0u; j < STEP; j++) {
                all += tile_squares[j * FOURS + c / 4u][c % 4u];
            }
            total *= norm_scale(all);
        }
        if first + c < params.n_rows && quad < n_quads() {
            finish(quad, first + c, total);
        }
    }
}
