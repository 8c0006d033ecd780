enable f16;
enable wgpu_cooperative_matrix;
// A linear op by cooperative matrices (tensor cores): for the many rows of a prefill.
//
// The op's own part gives bindings, `n_quads`, `quad_rows` (the four weight rows that make a quad) and
// `finish` (what becomes of a quad's four sums for one row of x). A workgroup serves 64 weight rows and 64
// rows of x; a subgroup holds 2 x 2 matrices of MATRIX x MATRIX sums in f32.
//
// Tensor cores multiply f16, and the sums shall be as exact as in f32. So a number goes in as two: its f16,
// and 2048 times what that left over. x times weight is then three products (two where f16 holds weights
// exactly), of which the small ones are added up apart. A row of x is scaled by a power of two that brings
// its largest number to 512..1024, and back at the end: f16 reaches no further than 65504, which weights
// are clamped to. A sum runs along k in order, so that a row's bits depend on no other row.
const ROWS = 64u;
const STEP = 32u; // Numbers along k that are in workgroup memory at once.
const PITCH = 40u; // Distance of two rows there, chosen to spread the banks.
const RAISE = 16.0;
const SIDE = ROWS / (2u * MATRIX); // Subgroups of a workgroup along each side.

var<workgroup> w_hi: array<f16, ROWS * PITCH>; // [row, k]
var<workgroup> w_lo: array<f16, ROWS * PITCH>;
var<workgroup> x_hi: array<f16, ROWS * PITCH>;
var<workgroup> x_lo: array<f16, ROWS * PITCH>;
var<workgroup> results: array<f32, 1024>;
var<workgroup> x_scale: array<f32, ROWS>; // Power of two on the way in, and what to multiply by at the end.
var<workgroup> x_back: array<f32, ROWS>;

// A number cut to the bits that f16 has, fewer below 2^-14. By arithmetic: a conversion there and back may
// be optimised away.
fn cut(v: f32) -> f32 {
    let normal = bitcast<f32>(bitcast<u32>(v) & 0xffffe000u);
    return select(normal, trunc(v * 16777216.0) * 5.9604644775390625e-8, abs(v) < 6.103515625e-5);
}

fn keep_weight(at: u32, v: f32) {
    if WEIGHT_SPLIT {
        let raised = clamp(v * RAISE, -65504.0, 65504.0);
        let hi = cut(raised);
        w_hi[at] = f16(hi);
        w_lo[at] = f16((raised - hi) * 2048.0);
    } else {
        w_hi[at] = f16(v);
    }
}

fn keep_x(at: u32, v: f32) {
    let hi = cut(v);
    x_hi[at] = f16(hi);
    x_lo[at] = f16((v - hi) * 2048.0);
}

// Scales of the rows of x, from their largest number and, with NORM, their squares.
fn scale_rows(first: u32, width: u32, local: u32) {
    for (var i = local / 8u; i < ROWS; i += 16u) {
        let row = min(first + i, params.n_rows - 1u);
        var best = 0.0;
        var squares = 0.0;
        for (var at = local % 8u; at < width; at += 8u) {
            var a = x[(row * width + at) * 2u];
            var b = x[(row * width + at) * 2u + 1u];
            if NORM == 1u {
                squares += dot8(a, b, a, b);
                a *= gamma[at * 2u];
                b *= gamma[at * 2u + 1u];
            }
            let larger = max(abs(a), abs(b));
            best = max(best, max(max(larger.x, larger.y), max(larger.z, larger.w)));
        }
        results[i * 8u + local % 8u] = best;
        results[512u + i * 8u + local % 8u] = squares;
    }
    workgroupBarrier();
    if local < ROWS {
        var best = 0.0;
        var squares = 0.0;
        for (var j = 0u; j < 8u; j++) {
            best = max(best, results[local * 8u + j]);
            squares += results[512u + local * 8u + j];
        }
        let exponent = bitcast<u32>(best) >> 23u;
        let scale = bitcast<f32>(clamp(263u - min(exponent, 262u), 1u, 253u) << 23u);
        x_scale[local] = scale;
        var back = 1.0 / scale;
        if WEIGHT_SPLIT {
            back /= RAISE;
        }
        if NORM == 1u {
            back *= norm_scale(squares);
        }
        x_back[local] = back;
    }
    workgroupBarrier();
}

// Hands one matrix of every subgroup to `finish`: the one at (down, right) of its 2 x 2.
fn hand_out(group: vec3<u32>, local: u32, down: u32, right: u32) {
    workgroupBarrier();
    for (var i = local; i < 256u; i += 128u) {
        let block = i / (MATRIX * MATRIX / 4u);
        let c = i / (MATRIX / 4u) % MATRIX;
        let r = i % (MATRIX / 4u) * 4u;
        let quad = group.x * (ROWS / 4u) + ((block / SIDE * 2u + down) * MATRIX + r) / 4u;
        let x_row = (block % SIDE * 2u + right) * MATRIX + c;
        let at = block * MATRIX * MATRIX + c * MATRIX + r;
        let sums = vec4<f32>(results[at], results[at + 1u], results[at + 2u], results[at + 3u]);
        if group.y * ROWS + x_row < params.n_rows && quad < n_quads() {
            finish(quad, group.y * ROWS + x_row, sums * x_back[x_row]);
        }
    }
    workgroupBarrier();
}

fn linear(group: vec3<u32>, local: u32, subgroup: u32) {
    let width = params.k / 8u; // Runs of eight in a row of x.
    let span = WEIGHT_RUNS * WEIGHT_RUNS;
    let stride = (width + span - 1u) / span * WEIGHT_RUNS; // Loads in a row of the weight.
    let n_groups = (width + GROUP - 1u) / GROUP;
    let first = group.y * ROWS;
    scale_rows(first, width, local);

    let my_w = subgroup / SIDE * 2u * MATRIX * PITCH;
    let my_x = subgroup % SIDE * 2u * MATRIX * PITCH;
    let next = MATRIX * PITCH;
    var large00 = MatrixC();
    var large01 = MatrixC();
    var large10 = MatrixC();
    var large11 = MatrixC();
    var small00 = MatrixC();
    var small01 = MatrixC();
    var small10 = MatrixC();
    var small11 = MatrixC();
    for (var base = 0u; base < width; base += STEP / 8u) {
        for (var i = local; i < ROWS * STEP / 8u; i += 128u) {
            let at = base + i % (STEP / 8u);
            let row = i / (STEP / 8u);
            let to = row * PITCH + i % (STEP / 8u) * 8u;

            let quad = min(group.x * (ROWS / 4u) + row / 4u, n_quads() - 1u);
            let w_row = quad_rows(quad)[row % 4u];
            var s = 0u;
            var scale = 1.0;
            if WEIGHT_CODED {
                s = scales[w_row * n_groups + min(at, width - 1u) / GROUP];
                scale = bitcast<f32>(s & WEIGHT_SCALE);
            }
            let j = at / span * WEIGHT_RUNS + at % WEIGHT_RUNS;
            let w = weight[w_row * stride + min(j, stride - 1u)];
            let lo = weight_run_lo(w, at % span / WEIGHT_RUNS, s) * scale;
            let hi = weight_run_hi(w, at % span / WEIGHT_RUNS, s) * scale;
            var a = vec4<f32>();
            var b = vec4<f32>();
            if at < width {
                let x_row = min(first + row, params.n_rows - 1u);
                a = x[(x_row * width + at) * 2u] * x_scale[row];
                b = x[(x_row * width + at) * 2u + 1u] * x_scale[row];
                if NORM == 1u {
                    a *= gamma[at * 2u];
                    b *= gamma[at * 2u + 1u];
                }
            }
            for (var d = 0u; d < 4u; d++) {
                keep_weight(to + d, lo[d]);
                keep_weight(to + d + 4u, hi[d]);
                keep_x(to + d, a[d]);
                keep_x(to + d + 4u, b[d]);
            }
        }
        workgroupBarrier();
        for (var k = 0u; k < STEP; k += MATRIX) {
            let w0 = coopLoadT<MatrixA>(&w_hi[my_w + k], PITCH);
            let w1 = coopLoadT<MatrixA>(&w_hi[my_w + next + k], PITCH);
            let x0 = coopLoad<MatrixB>(&x_hi[my_x + k], PITCH);
            let x1 = coopLoad<MatrixB>(&x_hi[my_x + next + k], PITCH);
            let rest0 = coopLoad<MatrixB>(&x_lo[my_x + k], PITCH);
            let rest1 = coopLoad<MatrixB>(&x_lo[my_x + next + k], PITCH);
            large00 = coopMultiplyAdd(w0, x0, large00);
            large01 = coopMultiplyAdd(w0, x1, large01);
            large10 = coopMultiplyAdd(w1, x0, large10);
            large11 = coopMultiplyAdd(w1, x1, large11);
            small00 = coopMultiplyAdd(w0, rest0, small00);
            small01 = coopMultiplyAdd(w0, rest1, small01);
            small10 = coopMultiplyAdd(w1, rest0, small10);
            small11 = coopMultiplyAdd(w1, rest1, small11);
            if WEIGHT_SPLIT {
                let left0 = coopLoadT<MatrixA>(&w_lo[my_w + k], PITCH);
                let left1 = coopLoadT<MatrixA>(&w_lo[my_w + next + k], PITCH);
                small00 = coopMultiplyAdd(left0, x0, small00);
                small01 = coopMultiplyAdd(left0, x1, small01);
                small10 = coopMultiplyAdd(left1, x0, small10);
                small11 = coopMultiplyAdd(left1, x1, small11);
            }
        }
        workgroupBarrier();
    }
    let to = subgroup * MATRIX * MATRIX;
    coopStore(large00 + small00 * 0.00048828125, &results[to], MATRIX);
    hand_out(group, local, 0u, 0u);
    coopStore(large01 + small01 * 0.00048828125, &results[to], MATRIX);
    hand_out(group, local, 0u, 1u);
    coopStore(large10 + small10 * 0.00048828125, &results[to], MATRIX);
    hand_out(group, local, 1u, 0u);
    coopStore(large11 + small11 * 0.00048828125, &results[to], MATRIX);
    hand_out(group, local, 1u, 1u);
}
